"""Averages of maps, said so that no TRANSPOSE and no CPU operator is left."""

from __future__ import annotations

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
