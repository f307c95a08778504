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
    if float(arguments(node).get("ord", 2)) != 2:
        return None
    return _of_mean(traced, node, lambda x: x * x, lambda y, count: torch.sqrt(y * count))


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
    count = float(math.prod(before[axis] for axis in axes))

    def reduced(x: Tensor, *_: object, **__: object) -> Tensor:
        return outside(inside(x).mean(axes, keepdim=True).reshape(size), count)

    return reduced


def deviation(traced: Traced, node: fx.Node) -> Substitute | None:
    """The root of the mean squared distance from the mean."""
    before, axes, size = shape(source(node)), _axes(node), shape(node)
    given = arguments(node)
    count = math.prod(before[axis] for axis in axes)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    divisor = count - float(1 if correction is None else correction)
    if divisor <= 0:
        return None

    def deviation(x: Tensor, *_: object, **__: object) -> Tensor:
        distance = x - x.mean(axes, keepdim=True)
        mean = (distance * distance).mean(axes, keepdim=True)
        return torch.sqrt(mean.reshape(size) * (count / divisor))

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
