"""The verbs: `cluster_`, `refit_` and `strip_`, in place, on a whole model.

In: a model and rules. The rules choose slots (`model.slots`), fitting or data-aware fitting makes
each slot's tensors, `model.surgery` swaps them in. Out: the same model, its weights lookups.

Order matters for safety. `cluster_` first resolves every rule, then fits every codebook, and only
then touches the model, so whatever goes wrong (a NaN in the fifth tensor, a misspelt pattern)
leaves the model exactly as it was.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchclust.activations.quantized import remove_quantized_activations_
from torchclust.data_aware.fit import fit_to_inputs
from torchclust.data_aware.layers import Layer
from torchclust.model.alike import Book, books_of_alike
from torchclust.model.clustering import check_distinct, named_clusterings
from torchclust.model.larger import warn_if_larger
from torchclust.model.places import clustered_places, clustered_weight
from torchclust.model.pretrained import warn_of_plain_names
from torchclust.model.rules import Rules
from torchclust.model.slots import Slot, chosen_slots, clustered_slots, slots_of
from torchclust.model.surgery import attach, detach, make_for, make_plain
from torchclust.progress import track
from torchclust.weight.clustered import ClusteredWeight
from torchclust.weight.config import ClusterConfig
from torchclust.weight.parametrization import fit_weight

ModuleT = TypeVar("ModuleT", bound=nn.Module)
TaskT = TypeVar("TaskT")
MadeT = TypeVar("MadeT")


def cluster_(
    model: ModuleT,
    rules: Rules = 16,
    *,
    importance: Mapping[str, Tensor] | None = None,
    inputs: Iterable[Any] | None = None,
    strict: bool = True,
    seed: int = 0,
    **options: Any,
) -> ModuleT:
    """Replace a model's weights by codebook lookups, in place, ready to be fine-tuned.

    Afterwards ``module.weight`` is computed from a codebook of at most ``n_clusters`` values, and
    the optimizer sees the codebook: build the optimizer after this call. A weight behind
    `torch.nn.utils.prune` or another parametrization (``weight_norm``) is evaluated, and that
    value is what gets clustered; `strip_` then leaves a plain parameter.

    Args:
        model: any module; only its parameters' structure changes. All of it: a tensor that is tied
            to one outside of the module given is not seen to be, and parted from it.
        rules: an int, a `ClusterConfig`, or a mapping from pattern to int, `ClusterConfig`, dict of
            fields, or None to leave alone; the last match wins. A pattern is a glob over parameter
            names or a module class name. What is not clustered by default (biases, norms,
            depthwise convolutions) is reached only by a pattern that names it: its full name, or
            a glob that reaches nothing else.
        importance: per-weight sensitivities by parameter name, each of its tensor's shape, as
            `fisher_information` makes them; they weigh the squared errors of the fit.
        inputs: unlabelled inputs, a few hundred, as an iterable of batches (a tensor, a tuple of
            arguments, a dict, or pairs whose label is not read) or as one tensor. Each layer is
            then fitted so that its output changes least (`torchclust.data_aware`), and biases and
            BatchNorm statistics take up the mean error. With `importance` too, that weighs whole
            output channels. With a ``rate`` all layers pay the same for a bit in what
            their errors do to the model's outputs (`torchclust.data_aware.bit_prices`), which err
            by 0.7 ``rate`` of their variance at most, as far as the inputs can tell.
        strict: raise for a pattern that matches nothing or cannot apply; else warn.
        seed: for the inits that draw at random.
        **options: `ClusterConfig` fields, for every rule that does not say otherwise.

    Returns:
        The same object.

    Warns:
        UserWarning: a tensor will take more bits than its plain int8 codes, as where one outlier
            leaves all others a few small codes: fewer clusters then, or none.

    Raises:
        TypeError, ValueError: rules that cannot be resolved, NaN or infinity in a weight,
            importance that does not fit. The model is then unchanged.

    Example:
        >>> model = cluster_(torch.nn.Linear(64, 64), 4)
        >>> model.weight.unique().numel()
        4
        >>> model.parametrizations.weight.original.shape
        torch.Size([4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"cluster_ takes a module, got {type(model).__name__}. Weights in a state dict: load "
            f"them into their module first:  model.load_state_dict(state_dict)"
        )
    chosen = chosen_slots(model, rules, options, strict)
    warn_of_plain_names(model, (slot for slot, _ in chosen))
    weights = _checked_importance(importance or {}, [slot for slot, _ in chosen])

    fits: list[ClusteredWeight]
    corrected: dict[str, Tensor] = {}
    if inputs is None:
        fits = _fit_slots(chosen, weights, seed)
    else:
        fits, corrected = _fit_to_inputs(model, chosen, weights, inputs, seed)
    for (slot, _), fitted in zip(chosen, fits, strict=True):
        warn_if_larger(slot, fitted)  # all of them before the first is clustered: it may raise
    for (slot, _), fitted in zip(chosen, fits, strict=True):
        attach(slot, fitted)
    state = model.state_dict() if corrected else {}  # shares memory with the model
    for name, value in corrected.items():
        state[name].copy_(value)
    return model


def _fit_to_inputs(
    model: nn.Module,
    chosen: list[tuple[Slot, ClusterConfig]],
    weights: Mapping[str, Tensor],
    inputs: Iterable[Any],
    seed: int,
) -> tuple[list[ClusteredWeight], dict[str, Tensor]]:
    """Fit on a copy that is clustered layer by layer: the weights, and what makes up for them."""
    twin = copy.deepcopy(model)
    copies = {slot.candidate.name: slot for slot in slots_of(twin)}
    layers = []
    for slot, config in chosen:
        name = slot.candidate.name
        make_plain(copies[name].places)
        module, tensor_name = copies[name].places[0]
        layers.append(
            Layer(
                name=name,
                path=name.rpartition(".")[0],
                module=module,
                tensor_name=tensor_name,
                config=config,
                channel_dim=slot.channel_dim,
                importance=weights.get(name),
                tied=len(slot.places) > 1,
            )
        )
    fits = fit_to_inputs(model, twin, layers, inputs, seed)
    made = [make_for(slot, config, fits.weights[slot.candidate.name]) for slot, config in chosen]
    return made, fits.corrected


def strip_(model: ModuleT, *, validate: bool = True) -> ModuleT:
    """Make every clustered tensor a plain parameter again: same values to the bit, same class.

    Terminal: one optimizer step afterwards and the clusters are gone, so it belongs at the end.
    Activations that `torchclust.activations` rounds are float again. Idempotent; a model without
    clusterings is returned as it is.

    Args:
        model: clustered or not.
        validate: check that no tensor holds more values than its codebook may.

    Raises:
        ValueError: with ``validate``, naming the tensor; the model is then still clustered.

    Example:
        >>> model = strip_(cluster_(torch.nn.Linear(64, 64), 4))
        >>> type(model), model.weight.unique().numel()
        (<class 'torch.nn.modules.linear.Linear'>, 4)
    """
    found = [(module, name) for _, module, name in clustered_places(model)]
    with torch.no_grad():
        values = {id(clustered_weight(m, n)): getattr(m, n).detach().clone() for m, n in found}
    if validate:
        for path, clustering in named_clusterings(model):
            value = values[id(clustered_weight(clustering.module, clustering.tensor_name))]
            check_distinct(path, clustering, value)
    remove_quantized_activations_(model)
    for module, name in found:
        detach(module, name, values[id(clustered_weight(module, name))])
    return model


def refit_(model: ModuleT, *, seed: int = 0) -> ModuleT:
    """Fit every codebook anew to the present weights, each with the configuration it has.

    With ``"nearest"`` those are the weights that train behind the lookup. Codebooks may change
    their size, so build the optimizer after it.

    Args:
        model: clustered; tensors that are not stay as they are.
        seed: for the inits that draw at random.

    Returns:
        The same object.

    Example:
        >>> model = cluster_(torch.nn.Linear(64, 64), 4, assignment="nearest")
        >>> _ = model.parametrizations.weight.original.data.mul_(2)  # training, in short
        >>> refit_(model).weight.unique().numel()
        4
    """
    tasks = list(clustered_slots(model))
    fits = _fit_slots(tasks, {}, seed)
    for (slot, _), fitted in zip(tasks, fits, strict=True):
        attach(slot, fitted)
    return model


def _fit_slots(
    chosen: list[tuple[Slot, ClusterConfig]], importance: Mapping[str, Tensor], seed: int
) -> list[ClusteredWeight]:
    """Fit every tensor on its own, in threads, but for small ones alike, which are one pass."""
    books = books_of_alike(chosen, importance)

    def fit(task: tuple[Slot, ClusterConfig]) -> ClusteredWeight:
        slot, config = task
        name = slot.candidate.name
        return _fit_slot(slot, config, importance.get(name), seed, books.get(name))

    return _in_threads(fit, chosen)


def _fit_slot(
    slot: Slot, config: ClusterConfig, importance: Tensor | None, seed: int, book: Book | None
) -> ClusteredWeight:
    try:
        tensors = fit_weight(
            slot.value(),
            config,
            channel_dim=slot.channel_dim,
            importance=importance,
            seed=seed,
            book=book,
        )
    except ValueError as error:
        raise ValueError(
            f"cannot cluster {slot.candidate.name!r} ({slot.candidate.kind}): {error}"
        ) from None
    return make_for(slot, config, tensors)


def _checked_importance(importance: Mapping[str, Tensor], slots: list[Slot]) -> dict[str, Tensor]:
    by_name = {name: slot for slot in slots for name in slot.candidate.names}
    checked = {}
    for name, tensor in importance.items():
        slot = by_name.get(name)
        if slot is None:
            continue  # fisher_information covers every parameter, the rules choose among them
        shape = slot.value().shape
        if tensor.shape != shape:
            raise ValueError(
                f"importance of {name!r} must have its shape {tuple(shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        checked[slot.candidate.name] = tensor
    if importance and not checked:
        raise ValueError(
            f"importance names no tensor that is clustered: it has {sorted(importance)[:4]}, "
            f"clustered are {sorted(by_name)[:4]}"
        )
    return checked


def _in_threads(function: Callable[[TaskT], MadeT], tasks: list[TaskT]) -> list[MadeT]:
    """Map in order on all cores; numpy's sorts run outside the interpreter lock."""
    with ThreadPoolExecutor(max_workers=max(1, min(len(tasks), os.cpu_count() or 1))) as pool:
        return list(track(pool.map(function, tasks), "Fitting codebooks", len(tasks)))
