"""Averages of maps, and what is made of averages, so that no TRANSPOSE is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from torchclust.export.rewrites.traced import (
    Substitute,
    Traced,
    arguments,
    flattened_pixels,
    identity,
    operator,
    shape,
    source,
)

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
    elif len(whole) == 4 and axes == [1]:
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


def _root(x: Tensor, *_: object) -> Tensor:
    """As a product with the inverse root: accelerators have no other."""
    return x * torch.rsqrt(x.clamp(min=_LEAST))


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
    count, average = math.prod(before[axis] for axis in axes), _average(traced, before, axes)

    def reduced(x: Tensor, *_: object, **__: object) -> Tensor:
        return outside(average(inside(x)).reshape(size), float(count))

    return reduced


def _average(
    traced: Traced, before: tuple[int, ...], axes: list[int]
) -> Callable[[Tensor], Tensor]:
    """The mean over axes that are kept; over a map's channels a convolution, which an NPU has."""
    if len(before) != 4 or axes != [1]:
        return lambda x: x.mean(axes, keepdim=True)
    weight = traced.constant(torch.full((1, before[1], 1, 1), 1 / before[1]))
    return lambda x: torch.conv2d(x, weight())


def deviation(traced: Traced, node: fx.Node) -> Substitute | None:
    """The root of the mean squared distance from the mean."""
    before, axes, size = shape(source(node)), _axes(node), shape(node)
    given, average = arguments(node), _average(traced, before, axes)
    count = math.prod(before[axis] for axis in axes)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    divisor = count - float(1 if correction is None else correction)
    if divisor <= 0:
        return None

    def deviation(x: Tensor, *_: object, **__: object) -> Tensor:
        distance = x - average(x)
        mean = average(distance * distance)
        return _root(mean.reshape(size) * (count / divisor))

    return deviation


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
