"""Poolings whose edges the converter gets wrong, or leaves to the CPU.

It pads a MaxPool with minus infinity, which no int8 tensor holds, and computes an average that
leaves its padding out with operators that no accelerator has. Both are poolings without padding of
a map that was widened before; sequences are maps of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.activations.plan import averages_all
from torchclust.export.rewrites.nodes import (
    Substitute,
    arguments,
    is_nonnegative,
    numbers,
    operator,
    shape,
    source,
)
from torchclust.export.rewrites.traced import Traced

Edges = tuple[tuple[int, int], tuple[int, int]]


def max_pool(traced: Traced, node: fx.Node) -> Substitute | None:
    """Widen the map by its outermost pixels, which changes no maximum, then pool."""
    given, before, after = arguments(node), shape(source(node)), shape(node)
    if not _is_batch(node) or set(numbers(given["dilation"], 1)) != {1}:
        return None
    kernel, stride = _window(given, before)
    edges = _edges(node, kernel, stride, _pair(given["padding"], before, 0))
    theirs = len(before) == 4 and edges == _same(node, kernel, stride)
    if edges == ((0, 0), (0, 0)) or theirs:
        return None
    zeros_do = is_nonnegative(source(node))

    def pool(x: Tensor, *_: object, **__: object) -> Tensor:
        x = _as_map(x)
        wide = _zeros_around(x, edges) if zeros_do else widened(x, edges)
        return F.max_pool2d(wide, kernel, stride).reshape(after)

    return pool


def avg_pool(traced: Traced, node: fx.Node) -> Substitute | None:
    """Average over the widened map, then undo the count of the pixels that were added.

    Over the whole map it is a MEAN, see `averages_all`.
    """
    given, before, after = arguments(node), shape(source(node)), shape(node)
    if not _is_batch(node):
        return None
    kernel, stride = _window(given, before)
    padding, divisor = _pair(given["padding"], before, 0), given.get("divisor_override")
    edges = _edges(node, kernel, stride, padding)
    if len(before) == 4 and averages_all(before[2:], kernel, padding):
        times = math.prod(kernel) / (divisor or math.prod(kernel))
        return lambda x, *_, **__: _times(F.adaptive_avg_pool2d(x, 1), times)
    if edges == ((0, 0), (0, 0)) and not divisor:
        return None
    ones = torch.ones(1, 1, *before[2:])
    mine = F.avg_pool2d(_zeros_around(_as_map(ones), edges), kernel, stride)
    target = node.target
    assert callable(target)
    ratio = _as_map(target(ones, *node.args[1:], **node.kwargs)) / mine
    plain = len(before) == 4 and not divisor and not given["count_include_pad"]
    if plain and edges == _same(node, kernel, stride):
        return None  # the converter's own way, AVERAGE_POOL_2D
    factor = float(ratio[0, 0, 0, 0])
    uniform = bool((ratio == factor).all())
    weights = traced.constant(ratio)

    def pool(x: Tensor, *_: object, **__: object) -> Tensor:
        y = F.avg_pool2d(_zeros_around(_as_map(x), edges), kernel, stride)
        return (_times(y, factor) if uniform else y * weights()).reshape(after)

    return pool


def adaptive_avg_pool(traced: Traced, node: fx.Node) -> Substitute | None:
    """Ordinary poolings where sizes divide; else averages of stretches of rows, of columns."""
    before, after = shape(source(node)), shape(node)
    if len(before) != 4 or after[2:] == (1, 1):
        return None
    if before[2:] == after[2:]:
        return lambda x, *_, **__: x
    if before[2] % after[2] == 0 and before[3] % after[3] == 0:
        kernel = [before[2] // after[2], before[3] // after[3]]
        return lambda x, *_, **__: F.avg_pool2d(x, kernel)

    def pool(x: Tensor, *_: object, **__: object) -> Tensor:
        rows = [x[:, :, a:b].mean(2, keepdim=True) for a, b in _stretches(before[2], after[2])]
        y = torch.cat(rows, 2)
        columns = [
            y[:, :, :, a:b].mean(3, keepdim=True) for a, b in _stretches(before[3], after[3])
        ]
        return torch.cat(columns, 3)

    return pool


def adaptive_max_pool(traced: Traced, node: fx.Node) -> Substitute | None:
    """An ordinary pooling where sizes divide; else maxima of stretches of rows, of columns."""
    before, after = shape(source(node)), tuple(node.meta["val"][0].shape)
    if not _is_batch(node):
        return None
    rows, columns = zip(_sides(before), _sides(after), strict=True)
    if rows[0] % rows[1] == 0 and columns[0] % columns[1] == 0:
        kernel = [rows[0] // rows[1], columns[0] // columns[1]]
        return lambda x, *_, **__: (F.max_pool2d(_as_map(x), kernel).reshape(after), None)

    def pool(x: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        y = _as_map(x)
        high = [F.max_pool2d(y[:, :, a:b], (b - a, 1)) for a, b in _stretches(*rows)]
        y = torch.cat(high, 2)
        wide = [F.max_pool2d(y[:, :, :, a:b], (1, b - a)) for a, b in _stretches(*columns)]
        return torch.cat(wide, 3).reshape(after), None

    return pool


def widened(x: Tensor, edges: Edges) -> Tensor:
    """Repeat the outermost rows and columns."""
    for axis, (begin, end) in zip((2, 3), edges, strict=True):
        if begin or end:
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([first] * begin + [x] + [last] * end, axis)
    return x


def _is_batch(node: fx.Node) -> bool:
    """Whether maps or sequences are pooled, and not a single one without its batch dimension."""
    return len(shape(source(node))) == (3 if "1d" in operator(node) else 4)


def _sides(whole: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a map; a sequence has one row."""
    return (1 if len(whole) == 3 else whole[2]), whole[-1]


def _as_map(x: Tensor) -> Tensor:
    """A sequence as a map of one row."""
    return x.unsqueeze(2) if x.ndim == 3 else x


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _zeros_around(x: Tensor, edges: Edges) -> Tensor:
    (top, bottom), (left, right) = edges
    return F.pad(x, (left, right, top, bottom)) if any((top, bottom, left, right)) else x


def _edges(
    node: fx.Node, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Edges:
    """How many rows and columns the windows reach beyond the map: before it, after it."""
    before, after = _sides(shape(source(node))), _sides(shape(node))
    rows, columns = (
        (p, max(0, (m - 1) * s + k - n - p))
        for n, m, k, s, p in zip(before, after, kernel, stride, padding, strict=True)
    )
    return rows, columns


def _same(node: fx.Node, kernel: Sequence[int], stride: Sequence[int]) -> Edges:
    """What TFLite's SAME padding adds."""
    found = []
    for n, k, s in zip(shape(source(node))[2:], kernel, stride, strict=False):
        total = max(0, (math.ceil(n / s) - 1) * s + k - n)
        found.append((total // 2, total - total // 2))
    return (found[0], found[1])


def _window(
    given: dict[str, Any], whole: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    kernel = _pair(given["kernel_size"], whole, 1)
    return kernel, _pair(given["stride"], whole, 1) if given["stride"] else kernel


def _pair(value: Any, whole: tuple[int, ...], of_row: int) -> tuple[int, int]:
    """Torch's numbers for a map of this shape; across the one row of a sequence, another."""
    given = numbers(value, len(whole) - 2)
    return (of_row if len(whole) == 3 else given[0]), given[-1]


def _stretches(size: int, parts: int) -> list[tuple[int, int]]:
    """Torch's parts of an axis: they overlap where sizes do not divide."""
    return [(i * size // parts, -((-(i + 1) * size) // parts)) for i in range(parts)]
