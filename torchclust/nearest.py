"""Which centroid is nearest: one rule for fitting, training and packing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BLOCK = 1 << 17  # values at a time: they and the result stay in the second-level cache
_SMALL = 1 << 13  # below this many values the table of `_by_leading_bits` costs more than it saves
_COMPARED = 24  # boundaries: up to here comparing with each of them beats any kind of search
_HIGH_HALF = 1 if sys.byteorder == "little" else 0


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid for every value; a value midway goes to the lower one.

    Args:
        values: floating, any shape and device, no NaN.
        centroids: `(k,)` ascending, floating, on the same device.

    Returns:
        Indices in the shape of `values`: uint8 for up to 256 centroids, else int32.
    """
    dtype = torch.promote_types(values.dtype, centroids.dtype)
    return count_below(values, midpoints(centroids.to(_searchable(dtype))))


def midpoints(centroids: Tensor) -> Tensor:
    """`(k - 1,)` boundaries between ascending centroids, rounded down to their own dtype.

    Rounding down keeps the rule exact: a value of this dtype is at most the true midpoint if and
    only if it is at most the rounded one. (float64 has nothing wider to round from; there the
    boundary still never reaches the upper centroid.)
    """
    low, high = centroids[:-1], centroids[1:]
    if centroids.dtype == torch.float32 and centroids.device.type != "mps":
        exact = (low.double() + high.double()) / 2
        middle = exact.float()
        middle = torch.where(middle.double() > exact, _next_below(middle), middle)
    else:
        middle = low / 2 + high / 2
    return torch.where((middle < high) & (middle > low), middle, low)


def count_below(values: Tensor, boundaries: Tensor) -> Tensor:
    """For every value, how many of the ascending boundaries lie strictly below it.

    On the CPU this runs in blocks through numpy, whose comparisons and table look-ups are several
    times faster than a binary search a value; elsewhere, and under a compiler, it is
    `torch.bucketize`.

    Args:
        values: floating, any shape and device, no NaN; 16-bit floats are compared as float32.
        boundaries: `(b,)` ascending, on the same device.

    Returns:
        Counts in the shape of `values`: uint8 for up to 255 boundaries, else int32.
    """
    dtype = _searchable(torch.promote_types(values.dtype, boundaries.dtype))
    values, boundaries = values.detach().to(dtype), boundaries.detach().to(dtype)
    few = len(boundaries) < 256
    if few and values.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            plain, limits = values.numpy(), boundaries.numpy()
        except (RuntimeError, TypeError):  # a tensor under a functorch transform has no array
            pass
        else:
            return torch.from_numpy(_count_below(plain, limits))
    found = torch.bucketize(values.contiguous(), boundaries.contiguous(), out_int32=True)
    return found.to(torch.uint8) if few else found


def count_below_in_units(rows: Tensor, units: Tensor, boundaries: Tensor) -> Tensor:
    """`count_below` of every row divided by its own unit.

    On the CPU a few rows at a time: the quotients of a large weight would be fresh memory, whose
    pages cost more than the division and the comparisons together.

    Args:
        rows: floating, `(n, ...)`.
        units: `(n,)` positive, of the dtype to divide in.
        boundaries: `(b,)` ascending.
    """
    units = units.view(-1, *[1] * (rows.dim() - 1))
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or rows.numel() <= _BLOCK:
        return count_below(rows.to(units.dtype) / units, boundaries)
    step = max(1, _BLOCK * len(rows) // rows.numel())
    counts = torch.empty(rows.shape, dtype=torch.uint8)
    quotients = torch.empty((step, *rows.shape[1:]), dtype=units.dtype)
    for part in (slice(start, start + step) for start in range(0, len(rows), step)):
        divided = quotients[: len(rows[part])]
        torch.div(rows[part].to(units.dtype), units[part], out=divided)
        counts[part] = count_below(divided, boundaries)
    return counts


def _searchable(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _next_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


def _count_below(values: npt.NDArray[Any], limits: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    flat = np.ascontiguousarray(values).reshape(-1)
    counts = np.empty(len(flat), dtype=np.uint8)
    limits = limits + np.zeros((), limits.dtype)  # turns -0.0 into 0.0
    if len(limits) > _COMPARED and len(flat) >= _SMALL and flat.dtype == np.float32:
        _by_leading_bits(flat, limits, counts)
    elif len(limits) > _COMPARED:
        counts[:] = np.searchsorted(limits, flat)
    else:
        _by_comparing(flat, limits, counts)
    return counts.reshape(values.shape)


def _by_comparing(
    flat: npt.NDArray[Any], limits: npt.NDArray[Any], counts: npt.NDArray[np.uint8]
) -> None:
    if len(limits) == 0:
        counts.fill(0)
        return
    above = np.empty(min(_BLOCK, len(flat)), dtype=np.bool_)
    for start in range(0, len(flat), _BLOCK):
        block, count = flat[start : start + _BLOCK], counts[start : start + _BLOCK]
        hits = above[: len(block)]
        np.greater(block, limits[0], out=count.view(np.bool_))
        for limit in limits[1:]:
            np.greater(block, limit, out=hits)
            np.add(count, hits.view(np.uint8), out=count)


def _by_leading_bits(
    flat: npt.NDArray[np.float32], limits: npt.NDArray[np.float32], counts: npt.NDArray[np.uint8]
) -> None:
    """Look the first 16 bits up (sign, exponent, 7 bits of fraction), then compare what is left."""
    leading = limits.view(np.uint16)[_HIGH_HALF::2].astype(np.int64)
    rank = np.where(leading < 0x8000, 0x8000 + leading, 0xFFFF - leading)  # ascending in value
    in_cell = np.bincount(rank, minlength=0x10000)
    before = (np.cumsum(in_cell) - in_cell).astype(np.uint8)
    table = np.concatenate([before[0x8000:], before[0x7FFF::-1]])
    padded = np.append(limits, np.float32(np.inf))
    for start in range(0, len(flat), _BLOCK):
        block, count = flat[start : start + _BLOCK], counts[start : start + _BLOCK]
        np.take(table, block.view(np.uint16)[_HIGH_HALF::2], out=count)
        for _ in range(int(in_cell.max())):
            count += np.greater(block, np.take(padded, count)).view(np.uint8)
