"""Copies of a tensor along its axes, as broadcasting where it does, else as concatenations.

The converter moves a map's channels behind its pixels and forgets to move the counts of copies
along; and an Ethos-U has no operator that copies, but joins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import Substitute, arguments, operator, shape, source
from torchclust.export.rewrites.traced import Traced

_Slice: TypeAlias = tuple[int, int]

_EXPANSIONS = ("expand", "expand_as", "broadcast_to")
_ELEMENTWISE = ("add", "sub", "mul", "div", "maximum", "minimum")


def expand(traced: Traced, node: fx.Node) -> Substitute | None:
    """Nothing, where each reader would broadcast anyhow; else copies."""
    before, after = shape(source(node)), shape(node)
    counts = _counts(before, after)
    if math.prod(counts) < 2:
        return None
    if all(_broadcasts(user, node) for user in node.users):
        return lambda x, *_, **__: x.reshape((1,) * (len(after) - len(before)) + before)
    return lambda x, *_, **__: _copied(x, counts)


def repeat(traced: Traced, node: fx.Node) -> Substitute | None:
    """Copies of the whole, axis by axis."""
    given = arguments(node)
    counts = [int(n) for n in given["repeats" if "repeats" in given else "dims"]]
    counts = [1] * (len(shape(node)) - len(counts)) + counts
    return None if math.prod(counts) < 2 else lambda x, *_, **__: _copied(x, counts)


def repeat_interleave(traced: Traced, node: fx.Node) -> Substitute | None:
    """Copies of each slice beside it."""
    given, before, after = arguments(node), shape(source(node)), shape(node)
    count, axis = given["repeats"], given["dim"]
    if not isinstance(count, int) or count < 2:
        return None
    whole = (math.prod(before),) if axis is None else before
    axis = 0 if axis is None else axis % len(before)
    apart = (*whole[: axis + 1], 1, *whole[axis + 1 :])
    counts = [count if i == axis + 1 else 1 for i in range(len(apart))]
    return lambda x, *_, **__: _copied(x.reshape(apart), counts).reshape(after)


def pad(traced: Traced, node: fx.Node) -> Substitute | None:
    """Circular paddings, and those of sequences that are not zeros, put together from slices."""
    given = arguments(node)
    widths, mode = [int(n) for n in given["pad"]], given["mode"]
    mine = mode == "circular" or (mode != "constant" and len(shape(node)) == 3)
    if not mine or min(widths) < 0:
        return None

    def around(x: Tensor, *_: object, **__: object) -> Tensor:
        for number, (begin, end) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
            axis = x.ndim - 1 - number
            before, after = _beyond(mode, x.shape[axis], begin, end)
            parts = [*(x.narrow(axis, *p) for p in before), x, *(x.narrow(axis, *p) for p in after)]
            x = torch.cat(parts, axis) if len(parts) > 1 else x
        return x

    return around


def _beyond(mode: str, size: int, begin: int, end: int) -> tuple[list[_Slice], list[_Slice]]:
    """Where what lies before and behind an axis is in it: first elements and lengths."""
    if mode == "circular":
        return [(size - begin, begin)][:begin], [(0, end)][:end]
    if mode == "replicate":
        return [(0, 1)] * begin, [(size - 1, 1)] * end
    return [(n, 1) for n in range(begin, 0, -1)], [(size - 1 - n, 1) for n in range(1, end + 1)]


def _counts(before: Sequence[int], after: Sequence[int]) -> list[int]:
    padded = [1] * (len(after) - len(before)) + list(before)
    return [b // a for a, b in zip(padded, after, strict=True)]


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator of two tensors gives the same without the copies."""
    if operator(user).rstrip("_") not in _ELEMENTWISE or len(user.args) < 2:
        return False
    others = [n for n in user.args[:2] if n is not node]
    if len(others) != 1 or operator(others[0]) in _EXPANSIONS:
        return False
    return shape(others[0]) == shape(node)


def _copied(x: Tensor, counts: Sequence[int]) -> Tensor:
    """So many copies along each axis, a few at a time: twelve twelves rather than 144."""
    x = x.reshape((1,) * (len(counts) - x.ndim) + tuple(x.shape))
    for axis, count in enumerate(counts):
        for factor in _factors(count):
            x = torch.cat([x] * factor, axis)
    return x


def _factors(count: int) -> list[int]:
    """Factors whose product is the count, none large where it has small ones."""
    found, prime = [], 2
    while count > 1:
        while count % prime == 0:
            found.append(prime)
            count //= prime
        prime = prime + 1 if prime * prime <= count else max(count, prime + 1)
    return found
