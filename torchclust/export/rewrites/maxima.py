"""The largest along an axis, as a pooling: the quantizer leaves REDUCE_MAX in float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import (
    Substitute,
    arguments,
    flattened_pixels,
    identity,
    shape,
    source,
)
from torchclust.export.rewrites.traced import Traced, is_channels_last


def amax(traced: Traced, node: fx.Node) -> Substitute | None:
    """Over all pixels, over channels, or over the last axis."""
    rank = len(shape(source(node)))
    axes = sorted(axis % rank for axis in arguments(node)["dim"] or range(rank))
    return _largest(traced, node, axes, shape(node))


def max_dim(traced: Traced, node: fx.Node) -> Substitute | None:
    """The same of `torch.max` with an axis, where nobody asks which one it was."""
    if node.target is not torch.ops.aten.max.dim or any(u.args[1] and u.users for u in node.users):
        return None
    after = tuple(node.meta["val"][0].shape)
    axis = int(arguments(node)["dim"]) % len(shape(source(node)))
    pooled = _largest(traced, node, [axis], after)
    return None if pooled is None else lambda x, *_, **__: (pooled(x), None)


def _largest(
    traced: Traced, node: fx.Node, axes: list[int], after: tuple[int, ...]
) -> Substitute | None:
    before = source(node)
    whole = shape(before)
    if len(whole) == 4 and axes == [2, 3]:
        return lambda x, *_, **__: F.max_pool2d(x, whole[2:]).reshape(after)
    if len(whole) == 4 and axes == [1] and is_channels_last(traced, before):
        pixels = whole[2] * whole[3]
        return lambda x, *_, **__: _of_rows(
            x.permute(0, 2, 3, 1).reshape(whole[0], 1, pixels, whole[1]), after
        )
    if len(whole) < 3 or axes != [len(whole) - 1]:
        return None
    maps = flattened_pixels(before) if before is not None and len(before.users) == 1 else None
    if maps is not None and before is not None:
        traced.substitutes[before] = identity
        return lambda x, *_, **__: F.max_pool2d(x, x.shape[2:]).reshape(after)
    if len(whole) == 3:  # a sequence goes the converter's own way for 1-D layers
        return lambda x, *_, **__: F.max_pool2d(x.unsqueeze(2), (1, whole[2])).reshape(after)
    if is_channels_last(traced, before):
        return None
    return lambda x, *_, **__: _of_rows(x.reshape(whole[0], 1, -1, whole[-1]), after)


def _of_rows(x: Tensor, after: tuple[int, ...]) -> Tensor:
    return F.max_pool2d(x, (1, x.shape[3])).reshape(after)
