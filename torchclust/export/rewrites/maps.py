"""Averages of maps, and what is made of averages, so that no TRANSPOSE is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import (
    Substitute,
    arguments,
    flattened_pixels,
    identity,
    operator,
    shape,
    source,
)
from torchclust.export.rewrites.traced import Traced, is_channels_last

_LEAST = torch.finfo(torch.float32).tiny  # whose inverse root is finite


def mean(traced: Traced, node: fx.Node) -> Substitute | None:
    """Average a map over its pixels with the axes kept, as AdaptiveAvgPool2d does, then drop them.

    Without ``keepdim`` the converter averages a transposed map, which no Ethos-U takes.
    """
    before = source(node)
    axes, whole = _axes(node), shape(before)
    if len(whole) == 3 and axes == [2]:
        maps = _maps_behind(before)
        # A sequence (N, C, L) goes the converter's own way for 1-D layers, as (N, C, 1, L).
        whole = shape(maps) or (*whole[:2], 1, whole[2])
        if maps is not None and before is not None:
            traced.substitutes[before] = identity
    elif _is_over_channels(traced, before, axes) or _is_over_last(traced, before, axes):
        return _of_mean(traced, node, identity, lambda y, _: y)
    elif len(whole) != 4 or axes != [2, 3]:
        return None
    size = shape(node)

    def average(x: Tensor, *_: object, **__: object) -> Tensor:
        maps = x if x.shape == whole else x.reshape(whole)
        return maps.mean((2, 3), keepdim=True).reshape(size)

    return average


def total(traced: Traced, node: fx.Node) -> Substitute | None:
    """A sum as a multiple of the mean, which int8 holds without saturating."""
    return _of_mean(traced, node, lambda x: x, lambda y, count: y * count)


def norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """The root of the mean square times the count."""
    return _of_squares(traced, node, _root)


def _of_squares(
    traced: Traced, node: fx.Node, outside: Callable[[Tensor], Tensor]
) -> Substitute | None:
    """A function of the sum of squares, of which the operator is the root."""
    if float(arguments(node).get("ord", 2)) != 2:
        return None
    return _of_mean(traced, node, lambda x: x * x, lambda y, count: outside(y * count))


def root(traced: Traced, node: fx.Node) -> Substitute:
    """A square root."""
    return _root


def power(traced: Traced, node: fx.Node) -> Substitute | None:
    """Roots, and small whole powers as products."""
    return _POWERS.get(arguments(node)["exponent"])


def _root(x: Tensor, *_: object) -> Tensor:
    """As a product with the inverse root: accelerators have no other."""
    return x * torch.rsqrt(x.clamp(min=_LEAST))


_POWERS: dict[object, Substitute] = {
    0.5: _root,
    3: lambda x, *_, **__: x * x * x,
    4: lambda x, *_, **__: (x * x) * (x * x),
}


def over_length(traced: Traced, node: fx.Node) -> Substitute | None:
    """A division by a length, as in `F.normalize`, as a product with an inverse root.

    Accelerators have that root, and no division.
    """
    length, between, floors = arguments(node)["other"], [], []
    while isinstance(length, fx.Node) and operator(length) in ("expand", "expand_as", "clamp_min"):
        between.append(length)
        if operator(length) == "clamp_min":
            floors.append(arguments(length)["min"])
        length = source(length)
    if length is None or operator(length) != "linalg_vector_norm":
        return None
    if any(len(n.users) > 1 for n in (length, *between)) or arguments(node).get("rounding_mode"):
        return None
    grows = shape(source(node)) != shape(node)  # by the expansion, which is left out
    if grows or any(isinstance(floor, fx.Node) for floor in floors):
        return None
    squares = _of_squares(traced, length, identity)
    if squares is None:
        return None
    traced.substitutes |= {length: squares, **dict.fromkeys(between, identity)}
    least = max([_LEAST, *(max(floor, 0.0) ** 2 for floor in floors)])

    def product(x: Tensor, squares: Tensor, **_: object) -> Tensor:
        return x * torch.rsqrt(squares.clamp(min=least) if floors else squares)

    return product


def cosine(traced: Traced, node: fx.Node) -> Substitute | None:
    """A mean of products by the roots of two mean squares, whose counts cancel."""
    given, size = arguments(node), shape(node)
    left, right = given["x1"], given["x2"]
    if shape(left) != shape(right):
        return None
    axes = [int(given["dim"]) % len(shape(left))]
    mean = average(traced, left, axes)
    least = max(_LEAST, float(given["eps"]) ** 2 / shape(left)[axes[0]])

    def cosine(a: Tensor, b: Tensor, *_: object, **__: object) -> Tensor:
        lengths = [torch.rsqrt(mean(x * x).clamp(min=least)) for x in (a, b)]
        return mean((a * lengths[0]) * (b * lengths[1])).reshape(size)

    return cosine


def _of_mean(
    traced: Traced,
    node: fx.Node,
    inside: Callable[[Tensor], Tensor],
    outside: Callable[[Tensor, float], Tensor],
) -> Substitute | None:
    """A function of the mean of a function of ``x``, over the operator's axes."""
    before = shape(source(node))
    if not before or len(node.args) < 1:
        return None
    axes, size = _axes(node), shape(node)
    count, mean = math.prod(before[axis] for axis in axes), average(traced, source(node), axes)

    def reduced(x: Tensor, *_: object, **__: object) -> Tensor:
        return outside(_shaped(mean(inside(x)), size), float(count))

    return reduced


def average(traced: Traced, before: fx.Node | None, axes: list[int]) -> Callable[[Tensor], Tensor]:
    """The mean over axes that are kept, in the form that an NPU has.

    Over a map's channels that is a convolution. Over the last of four axes, as those of attention
    heads, Vela takes only rows of one map.
    """
    whole = shape(before)
    if _is_over_channels(traced, before, axes):
        weight = traced.constant(torch.full((1, whole[1], 1, 1), 1 / whole[1]))
        return lambda x: torch.conv2d(x, weight())
    if _is_over_last(traced, before, axes):
        rows, kept = (1, math.prod(whole[:-1]), whole[-1]), (*whole[:-1], 1)
        return lambda x: x.reshape(rows).mean(2, keepdim=True).reshape(kept)
    return lambda x: x.mean(axes, keepdim=True)


def _is_over_channels(traced: Traced, before: fx.Node | None, axes: list[int]) -> bool:
    return axes == [1] and len(shape(before)) == 4 and is_channels_last(traced, before)


def _is_over_last(traced: Traced, before: fx.Node | None, axes: list[int]) -> bool:
    rank = len(shape(before))
    return axes == [rank - 1] and rank > 3 and not is_channels_last(traced, before)


def deviation(traced: Traced, node: fx.Node) -> Substitute | None:
    """The root of the variance."""
    spread = _spread(traced, node, shape(node))
    return None if spread is None else lambda x, *_, **__: _root(spread(x)[0])


def variance(traced: Traced, node: fx.Node) -> Substitute | None:
    """The mean squared distance from the mean."""
    spread = _spread(traced, node, shape(node))
    return None if spread is None else lambda x, *_, **__: spread(x)[0]


def variance_and_mean(traced: Traced, node: fx.Node) -> Substitute | None:
    """Both, of the same mean."""
    spread = _spread(traced, node, tuple(node.meta["val"][0].shape))
    return None if spread is None else lambda x, *_, **__: spread(x)


def _spread(
    traced: Traced, node: fx.Node, size: tuple[int, ...]
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Variance and mean, in the shape of the operator's results."""
    before, axes, given = shape(source(node)), _axes(node), arguments(node)
    count, mean = math.prod(before[axis] for axis in axes), average(traced, source(node), axes)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    divisor = count - float(1 if correction is None else correction)
    if divisor <= 0:
        return None

    def spread(x: Tensor) -> tuple[Tensor, Tensor]:
        middle = mean(x)
        distance = x - middle
        variance = mean(distance * distance) * (count / divisor)
        return _shaped(variance, size), _shaped(middle, size)

    return spread


def _shaped(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Reshaped where it has to be: behind a reshaping a map is none to the converter."""
    return x if tuple(x.shape) == size else x.reshape(size)


def _axes(node: fx.Node | None) -> list[int]:
    given = arguments(node) if node is not None else {}
    rank = len(shape(source(node)))
    return sorted(axis % rank for axis in given.get("dim") or range(rank))


def _maps_behind(node: fx.Node | None) -> fx.Node | None:
    """The maps whose average over pixels is that of ``node`` over its last axis, for one reader.

    In ``x.mean(3).mean(2)`` and ``x.flatten(2).mean(2)`` that is ``x``.
    """
    if node is None or len(node.users) > 1:
        return None
    if operator(node) == "mean" and len(shape(source(node))) == 4 and _axes(node) == [3]:
        return source(node)
    return flattened_pixels(node)
