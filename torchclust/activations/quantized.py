"""Quantization-aware fine-tuning: round activations in training as the int8 file will.

`quantize_activations_` makes a model's forward round every tensor that the exported graph stores
to int8, with straight-through gradients, so that fine-tuning meets the errors of deployment. With
an int8 codebook the weights are on their grid already: together this is the cluster-preserving
quantization-aware training of TFMOT (CQAT; with ``preserve_sparsity``, PCQAT). BatchNorm stays
live, biases and weights that are not clustered stay in float.

**Mechanism.** The forward runs under a `TorchFunctionMode`: functional calls and modules alike are
seen, control flow stays the user's, and `torch.compile`, `torch.export`, DDP, deep copies and
pickling work (the last not with clusterings: torch pickles no module with a parametrization).
Nothing of `torch.ao.quantization` is used: its eager mode rounds modules' outputs only (no
``x + y``, and a convolution before its BatchNorm), its graph modes replace the model by a trace,
and all of it is deprecated. Which outputs to round is found once, by running the model on example
inputs (`torchclust.activations.record`) and applying the converter's fusion rules
(`torchclust.activations.plan`).

**Ranges.** Per tensor, asymmetric, 0 included, scale and zero point computed as LiteRT's
``static_wi8_ai8`` does. They start at what the example inputs give and follow each training batch's
minimum and maximum with an exponential moving average; in eval mode they stand still.
Learning them by gradient (LSQ, TQT) needs parameters that optimizers, schedules and weight decay
know of; on one seed of a small network with three codes it was 0.4 to 0.7 points better, within the
error of 5,000 test images (0.55), which does not settle it.
`torchclust.export.to_tflite` reads them from the model, finds their tensors in the file by value,
and observes the calibration data only for what it does not find.

**State.** Three buffers of the model: ``activation_ranges`` (groups, 2), ``activation_plan`` (the
names, JSON as bytes) and ``activation_batches``. So state dicts, safetensors and `restore_` work
as for clusterings. `strip_` removes everything. Checkpointed segments
(`torch.utils.checkpoint`) run once more outside the forward and do not work with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torchclust.activations.arguments import INPUT
from torchclust.activations.forward import (
    BUFFERS,
    attach_,
    detach_,
    is_replaced,
    plan_of,
    refuse_replaced,
    rounding_modules,
)
from torchclust.activations.plan import Group, Plan, plan
from torchclust.activations.record import Record, record, tensors_in
from torchclust.activations.rounding import (
    PLAN,
    RANGES,
    Range,
    average_over_ranks,
    ends_of,
    widest,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def quantize_activations_(model: ModuleT, example_inputs: Inputs) -> ModuleT:
    """Round activations to int8 in the model's forward, where the exported graph will; in place.

    From now on training batches move the ranges, and evaluation uses them as they are. Cluster
    first, then call this. A model that only passes its inputs on to one module (a LightningModule,
    DistributedDataParallel, a compiled one) has that module quantized, so export either of them.

    Args:
        model: any module that `torchclust.export.to_tflite` can take. What was quantized in it
            before is quantized anew.
        example_inputs: a batch of its inputs: a tensor, a tuple of tensors, or a dict by argument
            name. The ranges start at what these give, so take real data, not noise.

    Returns:
        The same object. An error leaves it as it was, and the inputs are never changed.

    Raises:
        ValueError: nothing in the forward derives from the inputs; a value in it is empty, NaN or
            infinite; the module's ``forward`` was replaced, as some tools do, and calls past ours.

    Warns:
        UserWarning: from a later forward in which a module runs more often than here, as a cell
            does on longer sequences: what it computes then stays in float.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> net = quantize_activations_(net, torch.rand(16, 4))
        >>> list(activation_ranges(net))
        [':input', '1:relu', '2:linear']
    """
    if isinstance(example_inputs, Mapping):
        quantize_call_(model, (), dict(example_inputs))
    else:
        single = isinstance(example_inputs, Tensor)
        quantize_call_(model, (example_inputs,) if single else tuple(example_inputs), {})
    return model


def quantize_call_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`quantize_activations_` for a call ``model(*args, **kwargs)``."""
    root, recorded = model, record(model, args, kwargs, ends_of)
    while (child := _only_child(recorded)) is not None:
        root, args, kwargs = child
        recorded = record(root, args, kwargs, ends_of)
    refuse_replaced([root])
    found = plan(recorded)
    if not found.groups or all(call.operator == INPUT for call in recorded.calls):
        raise ValueError(
            f"cannot quantize activations of {type(root).__name__}: its forward computes nothing "
            f"from the example inputs. Pass inputs as forward takes them:  "
            f"quantize_activations_(model, (x, y)), or a dict by argument name"
        )
    device = next((t.device for t in tensors_in((args, kwargs))), None)
    ranges = torch.tensor(_first_ranges(root, found, recorded), device=device)
    remove_quantized_activations_(model)
    attach_(root, found, ranges, torch.tensor(1, device=device))


def remove_quantized_activations_(model: ModuleT) -> ModuleT:
    """Undo `quantize_activations_`: the class, buffers and hooks as they were. Idempotent."""
    for _, root in list(quantized_modules(model)):
        detach_(root)
    return model


def activation_ranges(model: nn.Module) -> dict[str, Range]:
    """The present range of every tensor that is rounded, by name; empty if none is.

    A name tells where the tensor comes up: the module's path, the operator, and ``#n`` from the
    second use on, as in ``layer1.0.relu#1:relu``. Inputs are counted by forward's parameters, those
    in a list or dict have their place there: ``:input``, ``:input#1['mask']``. Ranges are those of
    scale and zero point, so they contain 0.

    Example:
        >>> activation_ranges(quantize_activations_(torch.nn.ReLU(), torch.tensor([-1.0, 2.0])))
        {':input': (-1.0, 2.0), ':relu': (0.0, 2.0)}
    """
    found = {}
    for path, root in quantized_modules(model):
        for group, (low, high) in zip(groups_of(root), ranges_of(root), strict=True):
            for key in group.quantized:
                joined = f"{path}{key}" if not path or key.startswith(":") else f"{path}.{key}"
                found[joined] = (low, high)
    return found


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules within a model whose forward rounds activations, with their paths."""
    return rounding_modules(model)


def rounding_buffers(model: nn.Module) -> set[str]:
    """What `quantize_activations_` added to the state dict, by name; `strip_` takes it away."""
    found = rounding_modules(model, every_name=True)
    return {f"{path}.{name}" if path else name for path, _ in found for name in BUFFERS}


def groups_of(root: nn.Module) -> tuple[Group, ...]:
    """A quantized module's groups of tensors with one range."""
    return plan_of(root).groups


def ranges_of(root: nn.Module) -> list[Range]:
    """A quantized module's ranges, one per group of its plan, 0 included."""
    ranges = root.get_buffer(RANGES).detach().float().cpu()
    return [(min(low, 0.0), max(high, 0.0)) for low, high in ranges.tolist()]


def match_quantized_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the model round activations exactly where a state dict's does; values come by loading.

    Raises:
        ValueError: the state dict names a module that the model lacks, or whose forward was
            replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = [path for path in map(_path, state) if path is not None]
    for path in saved:
        if path not in modules:
            raise ValueError(
                f"the state dict has activation ranges of {path!r}, this model has no such module: "
                f"restore_ needs the architecture that was saved"
            )
    # A module of several names is saved under each.
    prefixes = {modules[path]: f"{path}." if path else "" for path in saved}
    present = {root: root.get_buffer(PLAN).cpu() for _, root in quantized_modules(model)}
    if present.keys() == prefixes.keys() and all(
        torch.equal(present[root], state[prefix + PLAN].cpu()) for root, prefix in prefixes.items()
    ):
        return
    refuse_replaced(list(prefixes))
    remove_quantized_activations_(model)
    for root, prefix in prefixes.items():
        ranges, encoded, batches = (state[prefix + name].detach().clone() for name in BUFFERS)
        attach_(root, Plan.decoded(encoded), ranges, batches)


@contextmanager
def kept_quantized(model: nn.Module) -> Iterator[None]:
    """Keep quantized activations through something that removes them, such as `strip_`."""
    buffers = {
        f"{path}.{name}" if path else name: root.get_buffer(name)
        for path, root in quantized_modules(model)
        for name in BUFFERS
    }
    yield
    match_quantized_(model, buffers)


class FirstCalls:
    """Quantizes whatever modules are called from outside while it watches, on their own inputs.

    For a training loop that is not ours: a LightningModule's step may call itself, one network or
    several. Only modules with parameters that train count, not frozen teachers, losses or metrics.
    A module that is found is rounded from its second call on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._seen = model, set[int]()
        self._handles = [
            module.register_forward_pre_hook(self._called, with_kwargs=True)
            for module in model.modules()
            if any(p.requires_grad for p in module.parameters())
        ]

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._model and is_replaced(module):  # Lightning's DDP: by its training_step
            return
        inside = {id(m) for m in module.modules()}
        if not inside & self._seen:
            self._seen |= inside
            quantize_call_(module, args, kwargs)
            for _, root in quantized_modules(module):
                average_over_ranks(root.get_buffer(RANGES))


def _first_ranges(root: nn.Module, found: Plan, recorded: Record) -> list[Range]:
    """What each group spans with the example inputs, or what its kernel prescribes."""
    ranges = []
    for group in found.groups:
        range_ = group.fixed or widest(recorded.values[key] for key in group.quantized)
        if not all(map(isfinite, range_)):
            raise ValueError(
                f"cannot quantize activations of {type(root).__name__}: with the example inputs "
                f"{group.quantized[0]!r} is empty, or holds NaN or infinity. Pass inputs that give "
                f"finite values, for ranges start at them"
            )
        ranges.append(range_)
    return ranges


def _only_child(recorded: Record) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The one module that a wrapper passes its inputs to, if it does nothing else."""
    own = [c for c in recorded.calls if c.key.startswith(":") and c.operator != INPUT]
    if own or len(recorded.children) != 1:
        return None
    child = recorded.children[0]
    layers = [name for name, _ in child[0].named_children() if name != "parametrizations"]
    return child if layers else None


def _path(key: str) -> str | None:
    """The module whose plan a state dict's key holds."""
    path, _, name = key.rpartition(".")
    return path if name == PLAN else None
