"""Which weights matter: the empirical Fisher information's diagonal, and tensors tried in turn.

In: a model, batches, a loss. The weights that a forward really reads (`weights_read`) collect
squared gradients; or each tensor is clustered alone. Out: importances, or curves for `knapsack`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from torchclust.allocation.encoded_size import Measure, encoded_bytes
from torchclust.allocation.knapsack import Choice
from torchclust.data_aware.blocks import evaluating
from torchclust.data_aware.divergence import divergence
from torchclust.model.cluster import cluster_
from torchclust.model.slots import weights_read
from torchclust.weight.config import ClusterConfig

CANDIDATES = (2, 4, 6, 8, 12, 16, 24, 32, 64)
"""Numbers of clusters that are tried; odd int8 codebooks hold one code less."""
_AT_ONCE = 250  # samples

Distance: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def fisher_information(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """Measure how much the loss minds a change of each weight, for ``cluster_(importance=...)``.

    A weight's sensitivity is its squared gradient, averaged over the batches: to second order, the
    loss grows by it times the squared change (LeCun et al., "Optimal Brain Damage", 1989, with the
    Hessian's diagonal replaced by the Fisher's). One squared gradient a batch: batches of a single
    sample give the empirical Fisher exactly, larger ones the same ranking with less work.

    Args:
        model: plain or clustered; evaluated in eval mode, so dropout and batch statistics do not
            blur the gradients. Its parameters, gradients and mode are left as they were.
        batches: pairs ``(inputs, target)``; inputs may be one tensor, a tuple of positional
            arguments or a dict of keyword arguments.
        loss_fn: ``loss_fn(model(inputs), target)`` gives a scalar.

    Returns:
        A float32 tensor >= 0 for every floating-point parameter, by name, of its shape.

    Raises:
        ValueError: no batch, or a batch that is no pair.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> batches = [(torch.randn(8, 4), torch.tensor([0, 1] * 4))]
        >>> fisher = fisher_information(model, batches, torch.nn.functional.cross_entropy)
        >>> fisher["weight"].shape
        torch.Size([2, 4])
    """
    total: dict[str, Tensor] = {}
    count = 0
    with _differentiable(model):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            for name, gradient in _gradients(model, batch, loss_fn).items():
                squared = gradient.detach().float().square()
                total[name] = total[name] + squared if name in total else squared
    if count == 0:
        raise ValueError(
            "fisher_information needs at least one batch, got none. An iterator that was read "
            "before gives nothing any more; pass a list or a DataLoader"
        )
    return {name: squared / count for name, squared in total.items()}


def sensitivity_curves(
    model: nn.Module,
    configs: Mapping[str, Sequence[ClusterConfig]],
    inputs: Tensor | Sequence[Tensor],
    measure: Measure,
    *,
    distance: Distance | None = None,
    seed: int = 0,
) -> dict[str, list[Choice]]:
    """Cluster one tensor at a time, in each of several ways, and see what it costs and spoils.

    The loss of a choice is the distance of the model's outputs from those before clustering. It
    needs no labels.

    Args:
        model: plain or pruned, in any mode; it stays unchanged.
        configs: how to try which tensor, for example `candidates` by name.
        inputs: the model's, one tensor (n, ...) each; a thousand samples are enough.
        measure: bytes of an encoded tensor, for example
            `torchclust.allocation.encoded_size.entropy_bytes`.
        distance: of outputs, by default `class_divergence`.
        seed: for the inits that draw at random.

    Returns:
        For every tensor its choices, in the order of its configurations.
    """
    start = copy.deepcopy(model).eval()
    apart = distance or class_divergence
    before = _outputs(start, inputs)
    curves: dict[str, list[Choice]] = {name: [] for name in configs}
    for name, config in ((name, config) for name, tried in configs.items() for config in tried):
        clustered = cluster_(copy.deepcopy(start), {name: config}, seed=seed)
        loss = float(apart(_outputs(clustered, inputs), before))
        if math.isnan(loss):
            raise ValueError(
                f"the model's outputs are not numbers, with {name!r} clustered or before, so "
                f"nothing tells what a choice costs: look at the inputs and the weights"
            )
        n_bytes = encoded_bytes(clustered, measure, [name])[name]
        kind = config.codebook_dtype
        curves[name].append(Choice(config.n_clusters, n_bytes, max(0.0, loss), kind))
    return curves


def candidates(config: ClusterConfig, n_elements: int) -> list[ClusterConfig]:
    """Return `config` with each of `CANDIDATES` that it and a tensor of so many elements allow."""
    least = 3 if config.preserve_sparsity or config.codebook_dtype == "int8" else 2
    return [
        dataclasses.replace(config, n_clusters=k) for k in CANDIDATES if least <= k < n_elements
    ]


def class_divergence(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the mean Kullback-Leibler divergence of class probabilities, in nats, from logits.

    To second order that is half the Fisher information along the change of the weights, all of it
    and not its diagonal; and unlike that it also holds where the change is large, as with three
    codes.
    """
    return divergence(outputs[0].double(), wanted[0].double())


def _outputs(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return what a model gives for all samples, one tensor for each of its outputs."""
    columns = [inputs] if isinstance(inputs, Tensor) else inputs
    batches = [column.split(_AT_ONCE) for column in columns]
    with torch.inference_mode():
        parts = [tree_leaves(model(*part)) for part in zip(*batches, strict=True)]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _gradients(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"a batch must be a pair (inputs, target), got {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}"
        )
    inputs, target = batch
    with torch.inference_mode(False), torch.enable_grad(), parametrize.cached():
        loss = loss_fn(_call(model, inputs), target)
        floating = {n: w for n, w in weights_read(model).items() if w.is_floating_point()}
        read = {name: weight for name, weight in floating.items() if weight.requires_grad}
        if not (loss.requires_grad and read):
            raise ValueError(
                "the loss does not depend on any weight: the forward pass or loss_fn detaches it. "
                "Leave out torch.no_grad(), detach() and item() there"
            )
        found = torch.autograd.grad(loss, list(read.values()), allow_unused=True)
    gradients = dict(zip(read, found, strict=True))
    return {
        name: torch.zeros_like(weight) if (got := gradients.get(name)) is None else got
        for name, weight in floating.items()
    }


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode with every floating-point parameter differentiable; both put back afterwards.

    Recurrent modules are in training mode, in which alone cuDNN differentiates them, without their
    dropout: the same function.
    """
    dropouts = {m: m.dropout for m in model.modules() if isinstance(m, nn.RNNBase)}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        with evaluating(model):
            for recurrent in dropouts:
                recurrent.dropout, recurrent.training = 0.0, True
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for recurrent, dropout in dropouts.items():
            recurrent.dropout = dropout
