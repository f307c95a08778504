"""Nearest resizing where the converter rounds otherwise than torch, or gathers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import Substitute, shape, source
from torchclust.export.rewrites.traced import Traced

_MOST = 4  # times that a map is enlarged before pixels are picked; above, rows are gathered


def nearest(traced: Traced, node: fx.Node) -> Substitute | None:
    """Enlarge by a whole number, then keep every n-th pixel; else gather rows and columns.

    Which pixels torch takes is asked of torch itself: it rounds its own way, differently for sizes
    and for factors.
    """
    before, after = shape(source(node)), shape(node)
    if len(before) != 4 or before[2:] == after[2:]:
        return None
    rows, columns = _picked(node, before)
    if all(
        m % n == 0 and bool((p == torch.arange(m) // (m // n)).all())
        for n, m, p in zip(before[2:], after[2:], (rows, columns), strict=True)
    ):
        return None
    ratio = _ratio(rows)
    if ratio is not None and ratio == _ratio(columns):
        up, keep = ratio

        def pick(x: Tensor, *_: object, **__: object) -> Tensor:
            large = x if up == 1 else F.interpolate(x, scale_factor=float(up))
            return F.max_pool2d(large, 1, keep)[:, :, : after[2], : after[3]]

        return pick
    gathered = traced.constant(rows), traced.constant(columns)
    return lambda x, *_, **__: x.index_select(2, gathered[0]()).index_select(3, gathered[1]())


def nearest_in_a_row(traced: Traced, node: fx.Node) -> Substitute | None:
    """A sequence so many times as long: copies of each of its values beside it."""
    before, after = shape(source(node)), shape(node)
    count = after[-1] // before[-1]
    if after[-1] != count * before[-1]:
        return None
    return lambda x, *_, **__: torch.cat([x.unsqueeze(-1)] * count, -1).reshape(after)


def _picked(node: fx.Node, before: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The rows and the columns of which the result is made."""
    target = node.target
    assert callable(target)
    height, width = torch.arange(before[2]).float(), torch.arange(before[3]).float()
    rows = height[None, None, :, None].expand(1, 1, before[2], before[3]).contiguous()
    columns = width[None, None, None, :].expand(1, 1, before[2], before[3]).contiguous()
    y = target(torch.cat([rows, columns], 1), *node.args[1:], **node.kwargs).round().long()
    return y[0, 0, :, 0], y[0, 1, 0, :]


def _ratio(picked: Tensor) -> tuple[int, int] | None:
    """Small whole numbers (up, keep) with ``picked[i] == i * keep // up``, if there are any."""
    place = torch.arange(len(picked))
    for up in range(1, _MOST + 1):
        for keep in range(1, _MOST + 1):
            if bool((place * keep // up == picked).all()):
                return up, keep
    return None
