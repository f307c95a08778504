"""Rewrites of the copy that is converted, found in its traced graph.

The converter gets nearly everything right by itself. Two things it cannot: it leaves a TRANSPOSE
between a map and the Linear that reads it flattened, because the Linear's columns follow torch's
order; and it folds a BatchNorm into a 2-D convolution only: not into a 1-D one, which it makes a
2-D one, and into a transposed one with a bias of a shape that the quantizer spoils.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Operators that neither move nor mix elements, so a permutation passes through them.
_POINTWISE = ("dropout", "clone", "contiguous", "alias", "detach", "detach_", "relu", "relu_", "to")
_MOST_SHARED = 256  # values in a tensor, the most clusters there can be
_UNFOLDED = ("conv1d", "conv_transpose1d", "conv_transpose2d")
_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")
_MOVES = (*_RESHAPES, "permute", "transpose", "unsqueeze", "squeeze")
# Operators whose map the converter keeps in NHWC.
_SPATIAL = ("conv", "pool", "batch_norm", "upsample", "pixel_shuffle")


class FromChannelsLast(nn.Module):
    """A Linear whose columns follow the order (spatial, C) though its input is (C, spatial).

    The reshape back to the map and its permutation cancel against what the converter put before
    the flattening, so none of them is left in the file.
    """

    def __init__(self, linear: nn.Linear, shape: tuple[int, ...]) -> None:
        super().__init__()
        # A 1-D map is (C, 1, L) to the converter: with the same unit axis here, both cancel.
        self.shape = shape if len(shape) > 2 else (shape[0], 1, *shape[1:])
        self.linear = linear
        self.linear.weight = nn.Parameter(linear.weight.detach()[:, column_order(shape)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the flattened (N, C * spatial) map."""
        maps = x.reshape(-1, *self.shape)
        y: Tensor = self.linear(maps.permute(0, *range(2, maps.ndim), 1).flatten(1))
        return y


def column_order(shape: tuple[int, ...]) -> Tensor:
    """For each column of the channels-last order, its place in the flattened (C, spatial) map."""
    order = torch.arange(math.prod(shape)).view(shape)
    return order.permute(*range(1, len(shape)), 0).reshape(-1)


def permute_flattened(
    model: nn.Module, program: torch.export.ExportedProgram, inputs_last: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Replace Linears that read a flattened map; returns each one's column order by parameter name.

    Args:
        model: the copy, changed in place.
        program: its trace.
        inputs_last: for every input's name in the trace, whether the file has its channels last.
    """
    columns = {}
    for name, shape in _flattened_linears(program, inputs_last).items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and owner and _owns_alone(model, owner, nn.Linear):
            linear = model.get_submodule(owner)
            assert isinstance(linear, nn.Linear)
            _replace(model, owner, FromChannelsLast(linear, shape))
            columns[name] = column_order(shape)
    return columns


def fold_batch_norm(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Fold BatchNorms into 1-D and transposed convolutions where nothing else reads those."""
    for conv_path, norm_path in _norms_behind(program, _UNFOLDED):
        layer: Any = model.get_submodule(conv_path)
        statistics: Any = model.get_submodule(norm_path)
        transposed = type(layer) in (nn.ConvTranspose1d, nn.ConvTranspose2d)
        known = type(layer) is nn.Conv1d or (transposed and layer.groups == 1)
        if known and type(statistics) in (nn.BatchNorm1d, nn.BatchNorm2d):
            _replace(model, conv_path, fuse_conv_bn_eval(layer, statistics, transposed))
            _replace(model, norm_path, nn.Identity())


def keep_shared_values(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Make a BatchNorm behind a convolution of shared values a depthwise 1x1 convolution.

    Folded, it would give every output channel values of its own, and a zip archive would find
    little that repeats: 8 bits a weight instead of 5, with 32 values. An int8 file needs none of
    this, because there the factors go into the channels' scales.
    """
    for conv_path, norm_path in _norms_behind(program, ("conv2d", "convolution")):
        layer: Any = model.get_submodule(conv_path)
        statistics: Any = model.get_submodule(norm_path)
        known = type(layer) is nn.Conv2d and type(statistics) is nn.BatchNorm2d
        if known and _shares_values(layer.weight):
            channels = layer.out_channels
            scaling = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
            nn.init.ones_(scaling.weight)
            _replace(model, norm_path, fuse_conv_bn_eval(scaling.eval(), statistics))


def _norms_behind(
    program: torch.export.ExportedProgram, convolutions: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Paths of a convolution and of the BatchNorm that alone reads it, each used once."""
    signature = program.graph_signature
    for norm in program.graph.nodes:
        conv = source(norm)
        if operator(norm) != "batch_norm" or conv is None or len(conv.users) > 1:
            continue
        if operator(conv) in convolutions:
            conv_path = _only_user_of(signature.inputs_to_parameters, conv.args[1])
            norm_path = _only_user_of(signature.inputs_to_buffers, norm.args[3])
            if conv_path and norm_path:
                yield conv_path, norm_path


def operator(node: fx.Node) -> str:
    """The operator's name without overload: ``max_pool2d`` of ``aten.max_pool2d.default``."""
    target: Any = node.target
    return str(getattr(target, "_opname", "")) if node.op == "call_function" else ""


def source(node: fx.Node) -> fx.Node | None:
    """The first tensor argument of an operator."""
    argument = node.args[0] if node.args else None
    if isinstance(argument, (list, tuple)):
        argument = argument[0] if argument else None
    return argument if isinstance(argument, fx.Node) else None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _flattened_linears(
    program: torch.export.ExportedProgram, inputs_last: Mapping[str, bool]
) -> dict[str, tuple[int, ...]]:
    """Parameters of Linears that only read flattened maps of one shape (C, spatial...)."""
    parameters = program.graph_signature.inputs_to_parameters
    found: dict[str, set[tuple[int, ...] | None]] = {}
    for node in program.graph.nodes:
        for weight in node.all_input_nodes:
            if weight.name in parameters:
                is_weight = operator(node) == "linear" and node.args[1] is weight
                shape = _flattened(node, inputs_last) if is_weight else None
                found.setdefault(parameters[weight.name], set()).add(shape)
    shapes = {name: next(iter(s)) for name, s in found.items() if len(s) == 1}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _flattened(linear: fx.Node, inputs_last: Mapping[str, bool]) -> tuple[int, ...] | None:
    """The map's shape if ``linear`` reads a flattened NHWC map of more than one pixel, or None."""
    node = source(linear)
    while node is not None and operator(node) in _POINTWISE:
        node = source(node)
    if node is None or operator(node) not in _RESHAPES:
        return None
    before = source(node)
    shape = _shape(before)
    if before is None or len(shape) < 3 or _shape(node) != (1, math.prod(shape)):
        return None
    trivial = shape[1] == 1 or math.prod(shape[2:]) == 1
    return None if trivial or not _is_channels_last(before, inputs_last) else shape[1:]


def _is_channels_last(node: fx.Node | None, inputs_last: Mapping[str, bool]) -> bool:
    """Whether the converter holds this map in NHWC: it comes from a spatial layer, or is moved."""
    rank = len(_shape(node))
    while node is not None and len(_shape(node)) == rank:
        if node.op == "placeholder":
            return inputs_last.get(node.name, False)
        if any(kind in operator(node) for kind in _SPATIAL):
            return True
        if operator(node) in _MOVES:
            return False
        node = source(node)
    return False


def _shares_values(weight: Tensor) -> bool:
    """Whether few values make up a tensor, so that it was clustered, with one codebook for all."""
    return len(weight.unique()) <= min(_MOST_SHARED, weight.numel() // 4)


def _only_user_of(names: Mapping[str, str], node: Any) -> str:
    """The path of the module that owns a parameter or buffer read only once, or ''."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return ""
    return names.get(node.name, "").rpartition(".")[0]


def _owns_alone(model: nn.Module, path: str, kind: type[nn.Module]) -> bool:
    """Whether the module is exactly of that kind and shares its weight with no other."""
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    everything = model.named_parameters(remove_duplicate=False)
    return type(module) is kind and sum(p is weight for _, p in everything) == 1


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
