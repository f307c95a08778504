"""Linears that read a flattened map: their columns go into the accelerator's order.

The converter leaves a TRANSPOSE between a map and the Linear that reads it flattened, because the
Linear's columns follow torch's order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from torchclust.export.rewrites.nodes import Substitute, flattened_map, operator, shape, source
from torchclust.export.rewrites.traced import Traced, is_channels_last

# Operators that neither move nor mix elements, so a permutation passes through them.
_POINTWISE = ("dropout", "clone", "contiguous", "alias", "detach", "detach_", "relu", "relu_", "to")


def column_order(shape: tuple[int, ...]) -> Tensor:
    """For each column of the channels-last order, its place in the flattened (C, spatial) map."""
    order = torch.arange(math.prod(shape)).view(shape)
    return order.permute(*range(1, len(shape)), 0).reshape(-1)


def permute_flattened(traced: Traced) -> None:
    """Let Linears that only read flattened maps of one shape read them channels last."""
    read = _flattened_weights(traced)
    for node in traced.nodes:
        name = traced.name(node.args[1]) if operator(node) == "linear" else None
        if name in read:
            weight = traced.value(node.args[1])
            assert weight is not None
            traced.columns[name] = column_order(read[name])
            traced.substitutes[node] = _from_channels_last(traced, weight, read[name])


def _from_channels_last(traced: Traced, weight: Tensor, map_shape: tuple[int, ...]) -> Substitute:
    """A linear whose columns follow the order (spatial, C) though its input is (C, spatial).

    The reshape back to the map and its permutation cancel against what the converter put before
    the flattening, so none of them is left in the file.
    """
    moved = traced.constant(weight[:, column_order(map_shape)])
    # A 1-D map is (C, 1, L) to the converter: with the same unit axis here, both cancel.
    whole = map_shape if len(map_shape) > 2 else (map_shape[0], 1, *map_shape[1:])

    def linear(x: Tensor, _: Tensor, bias: Tensor | None = None) -> Tensor:
        maps = x.reshape(-1, *whole)
        columns = maps.permute(0, *range(2, maps.ndim), 1).flatten(1)
        return nn.functional.linear(columns, moved(), bias)

    return linear


def _flattened_weights(traced: Traced) -> dict[str, tuple[int, ...]]:
    """Weights, by name, that only multiply flattened maps of one shape (C, spatial...)."""
    found: dict[str, set[tuple[int, ...] | None]] = {}
    for node in traced.nodes:
        for weight in node.all_input_nodes:
            name = traced.name(weight)
            if name is not None:
                is_weight = operator(node) == "linear" and node.args[1] is weight
                map_shape = _flattened(traced, node) if is_weight else None
                found.setdefault(name, set()).add(map_shape)
    shapes = {name: next(iter(s)) for name, s in found.items() if len(s) == 1}
    return {
        name: map_shape
        for name, map_shape in shapes.items()
        if map_shape is not None and _is_alone(traced.model, name)
    }


def _flattened(traced: Traced, linear: fx.Node) -> tuple[int, ...] | None:
    """The map's shape if ``linear`` reads a flattened NHWC map of more than one pixel, or None."""
    node = source(linear)
    while operator(node) in _POINTWISE:
        node = source(node)
    before = flattened_map(node)
    if before is None:
        return None
    whole = shape(before)
    trivial = whole[1] == 1 or math.prod(whole[2:]) == 1
    return None if trivial or not is_channels_last(traced, before) else whole[1:]


def _is_alone(model: nn.Module, name: str) -> bool:
    """Whether no other name stands for the same tensor."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    weight = dict(named).get(name)
    return weight is not None and sum(tensor is weight for _, tensor in named) == 1
