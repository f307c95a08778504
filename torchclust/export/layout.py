"""The model as it is converted: a plain float32 copy, batch 1, channels last at its ends.

The accelerator's layout is NHWC, torch's is NCHW. Inside the graph the converter moves to NHWC by
itself; what it cannot know is handled here: inputs and outputs, and a Linear that reads a flattened
map, whose columns must be permuted, or a TRANSPOSE stays in the file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchclust.export.backends import ExportError, quietly
from torchclust.model import strip_

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

# Operators that neither move nor mix elements, so a permutation passes through them.
_POINTWISE = ("dropout", "clone", "contiguous", "alias", "detach", "detach_", "relu", "relu_", "to")
_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")
# Operators whose map the converter keeps in NHWC.
_SPATIAL = ("conv", "pool", "batch_norm", "upsample", "pixel_shuffle")


class Deployed(nn.Module):
    """The model behind positional inputs and a flat tuple of outputs, in the file's layout.

    ``keys``: the names under which the model takes its inputs, or None for positional ones.
    ``moved``: per input whether the file's has its channels last.
    """

    def __init__(
        self, model: nn.Module, keys: tuple[str, ...] | None, moved: tuple[bool, ...], last: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.keys = keys
        self.moved = moved
        self.last = last

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model on inputs in the file's layout."""
        args = [
            channels_first(x) if moved else x for x, moved in zip(inputs, self.moved, strict=True)
        ]
        outputs = call(self.model, self.keys, args)
        return tuple(channels_last(y) if self.last and y.ndim == 4 else y for y in outputs)


class FromChannelsLast(nn.Module):
    """A Linear whose columns follow the order (spatial, C) though its input is (C, spatial).

    The reshape back to the map and its permutation cancel against what the converter put before
    the flattening, so none of them is left in the file.
    """

    def __init__(self, linear: nn.Linear, shape: tuple[int, ...]) -> None:
        super().__init__()
        # A converter's 1-D map is (C, 1, L): with the same unit axis here, both cancel.
        self.shape = shape if len(shape) > 2 else (shape[0], 1, *shape[1:])
        self.columns = column_order(shape)
        self.linear = linear
        self.linear.weight = nn.Parameter(linear.weight.detach()[:, self.columns])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the flattened (N, C * spatial) map."""
        y: Tensor = self.linear(channels_last(x.reshape(-1, *self.shape)).flatten(1))
        return y


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is converted, and how to compare it with the model that it came from.

    ``module``: to convert. ``example``: its inputs, batch 1, in the file's layout. ``original``:
    the stripped float32 copy in the user's layout. ``columns``: per parameter name, the order in
    which its columns stand in the converted module. ``used``: parameters that the graph reads.
    """

    module: Deployed
    example: tuple[Tensor, ...]
    original: nn.Module
    columns: dict[str, Tensor]
    used: frozenset[str]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The example inputs, batch 1, in the model's own layout."""
        return tuple(
            channels_first(x) if moved else x
            for x, moved in zip(self.example, self.module.moved, strict=True)
        )

    def to_file_layout(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One sample in the user's layout, as the file's inputs."""
        return tuple(
            channels_last(x) if moved else x
            for x, moved in zip(inputs, self.module.moved, strict=True)
        )

    @torch.no_grad()
    def reference(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The float model's outputs for one sample, in the file's layout."""
        outputs = call(self.original, self.module.keys, inputs)
        last = self.module.last
        return tuple(channels_last(y) if last and y.ndim == 4 else y for y in outputs)


def prepare(model: nn.Module, example: Inputs, *, last: bool) -> Prepared:
    """Copy, strip, trace and re-lay the model; the one that is given stays as it is.

    Raises:
        ExportError: ``torch.export`` cannot trace the model on these inputs.
    """
    plain = _plain_copy(model)
    keys, args = named_inputs(example)
    args = tuple(_batch_of_one(x) for x in args)
    program = _trace(plain, keys, args)
    moved = tuple(last and _is_map(program, i, x) for i, x in enumerate(args))
    deployed = copy.deepcopy(plain)
    columns = {}
    for name, shape in _flattened_linears(program, moved).items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and _permute_linear(deployed, owner, shape):
            columns[name] = column_order(shape)
    module = Deployed(deployed, keys, moved, last).eval()
    example_inputs = tuple(channels_last(x) if m else x for x, m in zip(args, moved, strict=True))
    return Prepared(module, example_inputs, plain, columns, _used(program))


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
    """Run a model and flatten whatever it returns into a tuple of tensors."""
    outputs = model(*args) if keys is None else model(**dict(zip(keys, args, strict=True)))
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return tuple(y for y in leaves if isinstance(y, Tensor))


def channels_last(x: Tensor) -> Tensor:
    """(N, C, ...) as (N, ..., C)."""
    return x.permute(0, *range(2, x.ndim), 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """(N, ..., C) as (N, C, ...).

    A sequence (N, L, C) goes by way of (N, C, 1, L), the map that the converter makes of it for a
    1-D convolution: then its own transposition cancels.
    """
    if x.ndim == 3:
        return x.unsqueeze(1).permute(0, 3, 1, 2).squeeze(2)
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def column_order(shape: tuple[int, ...]) -> Tensor:
    """For each column of the channels-last order, its place in the flattened (C, spatial) map."""
    order = torch.arange(math.prod(shape)).view(shape)
    return order.permute(*range(1, len(shape)), 0).reshape(-1)


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
        path = [p for p in path if p != "linear" or not isinstance(module, nn.Linear)]
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
    plain = strip_(copy.deepcopy(model)).to("cpu").float().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return plain


def _batch_of_one(x: Tensor) -> Tensor:
    x = x.detach().to("cpu")
    x = x.float() if x.is_floating_point() else x
    if x.ndim == 0:
        raise ValueError("example_inputs must have a batch dimension, got a scalar")
    return x[:1].contiguous()


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
            f"{_first_line(error)}\nTry it alone:  torch.export.export(model.eval(), inputs)"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _name(node: torch.fx.Node) -> str:
    """The operator's name without overload: ``max_pool2d`` of ``aten.max_pool2d.default``."""
    target: Any = node.target
    return str(getattr(target, "_opname", "")) if node.op == "call_function" else ""


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _source(node: torch.fx.Node) -> torch.fx.Node | None:
    """The first tensor argument of an operator."""
    argument = node.args[0] if node.args else None
    if isinstance(argument, (list, tuple)):
        argument = argument[0] if argument else None
    return argument if isinstance(argument, torch.fx.Node) else None


def _user_inputs(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    return tuple(str(name) for name in program.graph_signature.user_inputs)


def _is_map(program: torch.export.ExportedProgram, index: int, x: Tensor) -> bool:
    """Whether an input is a map whose channels come first: 4-D or more, or read by a 1-D layer."""
    if x.ndim != 3:
        return x.ndim > 3
    name = _user_inputs(program)[index]
    users = [u for node in program.graph.nodes if node.name == name for u in node.users]
    return any("1d" in _name(u) or "batch_norm" in _name(u) for u in users)


def _flattened_linears(
    program: torch.export.ExportedProgram, moved: tuple[bool, ...]
) -> dict[str, tuple[int, ...]]:
    """Parameters of Linears that read a flattened map, with the map's shape (C, spatial...)."""
    parameters = program.graph_signature.inputs_to_parameters
    inputs = dict(zip(_user_inputs(program), moved, strict=True))
    found: dict[str, set[tuple[int, ...] | None]] = {}
    for node in program.graph.nodes:
        for weight in node.all_input_nodes:
            if weight.name in parameters:
                is_weight = _name(node) == "linear" and node.args[1] is weight
                shape = _flattened(node, inputs) if is_weight else None
                found.setdefault(parameters[weight.name], set()).add(shape)
    shapes = {name: next(iter(s)) for name, s in found.items() if len(s) == 1}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _flattened(linear: torch.fx.Node, inputs: Mapping[str, bool]) -> tuple[int, ...] | None:
    """The map's shape if ``linear`` reads a flattened NHWC map of more than one pixel, or None."""
    node = _source(linear)
    while node is not None and _name(node) in _POINTWISE:
        node = _source(node)
    if node is None or _name(node) not in _RESHAPES:
        return None
    source = _source(node)
    shape = _shape(source)
    if source is None or len(shape) < 3 or _shape(node) != (1, math.prod(shape)):
        return None
    trivial = shape[1] == 1 or math.prod(shape[2:]) == 1
    return None if trivial or not _is_channels_last(source, inputs) else shape[1:]


def _is_channels_last(node: torch.fx.Node | None, inputs: Mapping[str, bool]) -> bool:
    """Whether the converter holds this map in NHWC: it comes from a spatial layer, or is moved."""
    rank = len(_shape(node))
    while node is not None and len(_shape(node)) == rank:
        if node.op == "placeholder":
            return inputs.get(node.name, False)
        if any(kind in _name(node) for kind in _SPATIAL):
            return True
        if _name(node) in (*_RESHAPES, "permute", "transpose"):
            return False
        node = _source(node)
    return False


def _permute_linear(model: nn.Module, owner: str, shape: tuple[int, ...]) -> bool:
    """Replace a Linear by one that reads its map channels last; False where it is not a Linear."""
    linear = model.get_submodule(owner)
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is getattr(linear, "weight", None)
    ]
    if type(linear) is not nn.Linear or not owner or len(names) != 1:
        return False
    parent, _, attribute = owner.rpartition(".")
    setattr(model.get_submodule(parent), attribute, FromChannelsLast(linear, shape))
    return True


def _used(program: torch.export.ExportedProgram) -> frozenset[str]:
    parameters = program.graph_signature.inputs_to_parameters
    return frozenset(
        parameters[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in parameters and node.users
    )
