"""The model as it is converted: a plain float32 copy, batch 1, channels last at its ends.

The accelerator's layout is NHWC, torch's is NCHW. Inside the graph the converter moves to NHWC by
itself; here are the ends, and `rewrites` has what else it cannot know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from torchclust.export.backends import ExportError, first_line, quietly
from torchclust.export.names import input_names, output_names
from torchclust.export.rewrites.nodes import operator, returned
from torchclust.export.rewrites.rules import rewrite
from torchclust.export.rewrites.traced import Traced
from torchclust.model.cluster import strip_

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

PIXELS = torch.uint8  # of an input that a camera fills; the file has it quantized, scale 1


class Deployed(nn.Module):
    """The model behind positional inputs and a flat tuple of outputs, in the file's layout.

    ``keys``: the names under which the model takes its inputs, or None for positional ones.
    ``moved``: per input whether the file's has its channels last.
    """

    def __init__(
        self, traced: Traced, keys: tuple[str, ...] | None, moved: tuple[bool, ...], last: bool
    ) -> None:
        super().__init__()
        self.model = traced.model
        self.constants = traced.constants
        self.traced = traced
        self.keys = keys
        self.moved = moved
        self.last = last

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model, substitutes in place, on inputs in the file's layout."""
        args = [
            channels_first(x) if moved else x for x, moved in zip(inputs, self.moved, strict=True)
        ]
        return self.moved_out(self.traced.run(args))

    def moved_out(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs in the file's layout: maps, and sequences of a 1-D layer, with channels last."""
        wanted = zip(outputs, self.traced.maps_out(), strict=True)
        return tuple(channels_last(y) if self.last and is_map else y for y, is_map in wanted)

    @property
    def moved_outputs(self) -> tuple[bool, ...]:
        """Per output whether the file's has its channels last."""
        return tuple(self.last and is_map for is_map in self.traced.maps_out())


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is converted, and how to compare it with the model that it came from.

    ``module``: to convert. ``arguments``: the example inputs, batch 1, as the model takes them.
    ``original``: the stripped float32 copy in the user's layout. ``columns``: per parameter name,
    the order in which its columns stand in the converted module. ``dilations``: per parameter name,
    by how much its kernel is spread. ``used``: parameters that the graph reads. ``names``: the
    inputs', and the outputs'.
    """

    module: Deployed
    arguments: tuple[Tensor, ...]
    original: nn.Module
    columns: dict[str, Tensor]
    dilations: dict[str, tuple[int, ...]]
    used: frozenset[str]
    names: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The example inputs in the file's layout."""
        return self.to_file_layout(self.arguments)

    def to_file_layout(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One sample in the user's layout, as the file's inputs; pixels are floats there."""
        floats = (x.float() if x.dtype == PIXELS else x for x in inputs)
        return tuple(
            channels_last(x) if moved else x
            for x, moved in zip(floats, self.module.moved, strict=True)
        )

    @torch.no_grad()
    def reference(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The float model's outputs for one sample, in the file's layout."""
        return self.module.moved_out(call(self.original, self.module.keys, inputs))


def prepare(model: nn.Module, example: Inputs, *, last: bool, float_file: bool = False) -> Prepared:
    """Copy, strip, trace and re-lay the model; the one that is given stays as it is.

    For a float file also keep shared values apart from BatchNorms.

    Raises:
        ExportError: ``torch.export`` cannot trace the model on these inputs; its outputs change
            from call to call; an output holds integers, or a parameter NaN.
    """
    plain = _plain_copy(model)
    keys, args = named_inputs(example)
    args = _batch_of_one(args)
    _check_repeats(plain, keys, args)
    program = _trace(plain, keys, args)
    _check_outputs(program)
    names = input_names(program)
    moved = tuple(last and _is_map(program, n, x) for n, x in zip(names, args, strict=True))
    traced = Traced(plain, program, dict(zip(names, moved, strict=True)))
    rewrite(traced, float_file=float_file)
    module = Deployed(traced, keys, moved, last).eval()
    ends = input_names(program), output_names(program)
    moves = traced.columns, traced.dilations
    return Prepared(module, args, plain, *moves, _used(program), ends)


def named_inputs(inputs: Inputs) -> tuple[tuple[str, ...] | None, tuple[Tensor, ...]]:
    """Example inputs as (keyword names or None, tensors)."""
    if isinstance(inputs, Tensor):
        return None, (inputs,)
    if isinstance(inputs, Mapping):
        keys, args = tuple(inputs), tuple(inputs.values())
    else:
        keys, args = None, tuple(inputs)
    for x in args:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"example_inputs must be a tensor, a tuple of tensors or a dict of tensors, "
                f"got {type(inputs).__name__} holding {type(x).__name__}"
            )
    return keys, args


def call(
    model: nn.Module, keys: tuple[str, ...] | None, args: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run a model and flatten whatever it returns into a tuple of tensors.

    It gets copies: one that works in place must not change a user's samples.
    """
    own = [x.clone() for x in args]
    outputs = model(*own) if keys is None else model(**dict(zip(keys, own, strict=True)))
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return tuple(y for y in leaves if isinstance(y, Tensor))


def channels_last(x: Tensor) -> Tensor:
    """(N, C, ...) as (N, ..., C); a sequence by way of (N, C, 1, L), as `channels_first`."""
    if x.ndim == 3:
        return x.unsqueeze(2).permute(0, 2, 3, 1).squeeze(1).contiguous()
    return x.permute(0, *range(2, x.ndim), 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """(N, ..., C) as (N, C, ...).

    A sequence (N, L, C) goes by way of (N, C, 1, L), the map that the converter makes of it for a
    1-D convolution: then its own transposition cancels.
    """
    if x.ndim == 3:
        return x.unsqueeze(1).permute(0, 3, 1, 2).squeeze(2).contiguous()
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1)).contiguous()


def module_of(tensor_name: str, root: nn.Module) -> str | None:
    """The path of the torch module that made a tensor, from the name the converter gave it.

    The converter writes the stack of modules, each as ``class_attribute``, outermost first;
    operators fused into one are joined by ``;;``, the last applied first.
    """
    for part in tensor_name.split(";"):
        module, path = root, []
        for step in part.split("/")[1:]:
            child = _child_named(module, step)
            if child is None:
                break
            path.append(child)
            module = getattr(module, child)
        if len(path) > 1:
            return ".".join(path[1:])
    return None


def _child_named(module: nn.Module, step: str) -> str | None:
    for name, child in module.named_children():
        cls = type(child)
        if step == f"{cls.__module__}.{cls.__qualname__}_{name}":
            return name
    return None


def _plain_copy(model: nn.Module) -> nn.Module:
    # What hooks computed, as those of pruning and weight_norm do, torch refuses to copy.
    made = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in made if not t.is_leaf}
    plain = strip_(copy.deepcopy(model, memo)).to("cpu").float().eval()
    for name, parameter in plain.named_parameters():
        if parameter.isnan().any():
            raise ExportError(f"{name!r} holds NaN: training diverged; export an earlier state")
        parameter.requires_grad_(False)
        parameter.grad = None
    return plain


def _batch_of_one(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if any(x.ndim == 0 for x in args):
        raise ValueError("example_inputs need a batch dimension, got a scalar")
    floats = (x.detach().to("cpu") for x in args)
    return tuple((x.float() if x.is_floating_point() else x)[:1].contiguous() for x in floats)


def _trace(
    model: nn.Module, keys: tuple[str, ...] | None, args: tuple[Tensor, ...]
) -> torch.export.ExportedProgram:
    kwargs = None if keys is None else dict(zip(keys, args, strict=True))
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(model, () if kwargs else args, kwargs, strict=False)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in args)
        raise ExportError(
            f"{type(model).__name__} cannot be traced on inputs of shape {shapes}: "
            f"{first_line(error)}\nTry it alone:  torch.export.export(model.eval(), inputs)"
        ) from error


@torch.no_grad()
def _check_repeats(
    model: nn.Module, keys: tuple[str, ...] | None, args: tuple[Tensor, ...]
) -> None:
    """Refuse what answers differently a second time: a file would have its first state for ever.

    On a copy, whose state may change; parameters do not. What cannot run is told of by tracing.
    """
    try:
        trial = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        first, second = (call(trial, keys, args) for _ in range(2))
    except Exception:
        return
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ExportError(
                f"output {number} of {type(model).__name__} changes from call to call on the same "
                f"inputs: the model keeps a state or draws random numbers, and a file does "
                f"neither. Make the state an input and an output:  y, state = model(x, state)"
            )


def _check_outputs(program: torch.export.ExportedProgram) -> None:
    """Refuse outputs of integers: no file of int8 values holds them."""
    for number, node in enumerate(returned(program)):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, Tensor) and not value.is_floating_point() and node.op != "placeholder":
            raise ExportError(
                f"output {number} holds {value.dtype} made by {operator(node) or node.name!r}, "
                f"which stays outside an int8 file: return what goes into it, and compute it from "
                f"the file's codes, whose order is that of the values:  codes.argmax(-1)"
            )


def _is_map(program: torch.export.ExportedProgram, name: str, x: Tensor) -> bool:
    """Whether an input is a map whose channels come first: 4-D, or read by a 1-D or 3-D layer."""
    if x.ndim == 4:
        return True
    users = [u for node in program.graph.nodes if node.name == name for u in node.users]
    kinds = (f"{x.ndim - 2}d", "batch_norm")
    return x.ndim > 2 and any(kind in operator(u) for u in users for kind in kinds)


def _used(program: torch.export.ExportedProgram) -> frozenset[str]:
    parameters = program.graph_signature.inputs_to_parameters
    return frozenset(
        parameters[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in parameters and node.users
    )
