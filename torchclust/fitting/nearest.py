"""Which centroid is nearest: one rule for fitting, training and packing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.fitting.threads import in_blocks, must_be_traceable

_BLOCK = 1 << 16  # values at a time: they and the result stay in the second-level cache
_SHARE = 1 << 20  # values that a thread takes at a time
_SMALL = 1 << 13  # below this many values the table of `_by_leading_bits` costs more than it saves
_COMPARED = 24  # boundaries: up to here comparing with each of them beats any kind of search
_HIGH_HALF = 1 if sys.byteorder == "little" else 0

Floats = npt.NDArray[Any]
Counts = npt.NDArray[np.uint8]


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


def assign_rows(rows: Tensor, centroids: Tensor) -> Tensor:
    """`assign` of every row with centroids of its own, `(n, k)`, at most 256; uint8."""
    dtype = torch.promote_types(rows.dtype, centroids.dtype)
    return count_below_in_rows(rows, midpoints(centroids.to(_searchable(dtype))))


def midpoints(centroids: Tensor) -> Tensor:
    """`(..., k - 1)` boundaries between ascending centroids, rounded down to their own dtype.

    Rounding down keeps the rule exact: a value of this dtype is at most the true midpoint if and
    only if it is at most the rounded one. (float64 has nothing wider to round from; there the
    boundary still never reaches the upper centroid.)
    """
    low, high = centroids[..., :-1], centroids[..., 1:]
    if centroids.dtype == torch.float32 and centroids.device.type != "mps":
        exact = (low.double() + high.double()) / 2
        middle = exact.float()
        middle = torch.where(middle.double() > exact, _next_below(middle), middle)
    else:
        middle = low / 2 + high / 2
    return torch.where((middle < high) & (middle > low), middle, low)


def priced_midpoints(centroids: Tensor, bits: Tensor, price: Tensor) -> Tensor:
    """Where the choice changes when ``(value - centroid)^2 + price * bits`` is to be least.

    Cells stay intervals: two centroids meet at their midpoint, moved towards the dearer one by
    ``price * (bits_j - bits_i) / (2 (c_j - c_i))`` (Chou, Lookabaugh and Gray 1989). A centroid
    that serves nobody gets an empty cell: the boundaries on either side of it coincide.

    Args:
        centroids: `(..., k)` ascending.
        bits: `(..., k)` what an index costs.
        price: `(...)` of a bit, in squared units of the centroids.

    Returns:
        `(..., k - 1)` ascending boundaries.

    >>> half = torch.tensor(0.5)
    >>> priced_midpoints(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0]), half)
    tensor([0.7500, 1.5000])
    """
    k = centroids.shape[-1]
    if k == 1:
        return centroids.new_empty(*torch.broadcast_shapes(price.shape, centroids.shape[:-1]), 0)
    least = 64 * torch.finfo(centroids.dtype).tiny
    low, high = centroids[..., :, None], centroids[..., None, :]
    slope = (bits[..., None, :] - bits[..., :, None]) / (high - low).clamp_min(least)
    meet = low / 2 + high / 2 + price[..., None, None] / 2 * slope
    # [i, j]: beyond it centroid j is better than each of the centroids up to i, if j is above i.
    reached = meet.cummax(-2).values
    above = torch.ones(k, k, dtype=torch.bool, device=centroids.device).triu(1)
    return reached.masked_fill(~above, torch.inf).amin(-1)[..., :-1]


def count_below(values: Tensor, boundaries: Tensor) -> Tensor:
    """For every value, how many of the ascending boundaries lie strictly below it.

    On the CPU this runs in blocks and threads through numpy, whose comparisons and table look-ups
    are several times faster than a binary search a value; elsewhere, and under a compiler, it is
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
    if few and values.device.type == "cpu" and not must_be_traceable(values, boundaries):
        flat = values.reshape(-1)
        counts = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
        count = _counter(boundaries.numpy(), values.numel())
        plain, written = flat.numpy(), counts.view(-1).numpy()
        in_blocks(lambda part: count(plain[part], written[part]), flat, len(flat), _SHARE)
        return counts
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
    if rows.device.type != "cpu" or must_be_traceable(rows, units) or rows.numel() <= _BLOCK:
        return count_below(rows.to(units.dtype) / units, boundaries)
    rows = rows.detach()
    counts = torch.empty(rows.shape, dtype=torch.uint8, device="cpu")
    count = _counter(boundaries.to(units.dtype).numpy(), rows.numel())

    def divide_and_count(part: slice) -> None:
        quotients = rows[part].to(units.dtype).numpy() / units[part].numpy()
        count(quotients.reshape(-1), counts[part].view(-1).numpy())

    in_blocks(divide_and_count, rows, _BLOCK)
    return counts


def count_below_in_rows(rows: Tensor, boundaries: Tensor) -> Tensor:
    """`count_below` of every row with boundaries of its own.

    Args:
        rows: floating, `(n, ...)`.
        boundaries: `(n, b)` ascending, b < 256.
    """
    dtype = _searchable(torch.promote_types(rows.dtype, boundaries.dtype))
    flat, limits = in_rows(rows.detach().to(dtype)), boundaries.detach().to(dtype)
    if flat.device.type != "cpu" or must_be_traceable(rows, limits) or limits.shape[1] > _COMPARED:
        found = torch.searchsorted(limits.contiguous(), flat.contiguous(), out_int32=True)
        return found.to(torch.uint8).view(rows.shape)
    counts = torch.empty(rows.shape, dtype=torch.uint8, device="cpu")

    def count(part: slice) -> None:
        block, into = flat[part].numpy(), in_rows(counts[part]).numpy()
        ends = limits[part].numpy()
        into[:] = 0
        for limit in range(ends.shape[1]):
            into += np.greater(block, ends[:, limit : limit + 1]).view(np.uint8)

    in_blocks(count, flat, _BLOCK)
    return counts


def in_rows(tensor: Tensor) -> Tensor:
    """Two dimensions: what belongs to each index of the first one is a row, one value of a bias."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def mirrored_limits(magnitudes: Tensor) -> Tensor:
    """`(n, 2 h)` boundaries of a symmetric codebook from those of its `(n, h)` magnitudes.

    None is 0 or crosses it: a weight that is 0 always takes the code 0.
    """
    above = magnitudes.clamp_min(torch.finfo(magnitudes.dtype).tiny)
    return torch.cat([-above.flip(-1), above], -1)


def _searchable(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _next_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


def _counter(limits: Floats, numel: int) -> Callable[[Floats, Counts], None]:
    """What writes the counts of flat values, in the way that is quickest for so many."""
    limits = limits + np.zeros((), limits.dtype)  # turns -0.0 into 0.0
    if len(limits) <= _COMPARED:
        return functools.partial(_by_comparing, limits)
    if numel >= _SMALL and limits.dtype == np.float32:
        return functools.partial(_by_leading_bits, _LeadingBits(limits))
    return functools.partial(_by_search, limits)


def _by_comparing(limits: Floats, flat: Floats, counts: Counts) -> None:
    """All boundaries in one call for a block: no shorter one is worth a thread's turn."""
    hits = np.empty((len(limits), min(_BLOCK, len(flat))), dtype=np.bool_)
    for start in range(0, len(flat), _BLOCK):
        block, count = flat[start : start + _BLOCK], counts[start : start + _BLOCK]
        above = hits[:, : len(block)]
        np.greater(block, limits[:, None], out=above)
        np.add.reduce(above.view(np.uint8), axis=0, dtype=np.uint8, out=count)


def _by_search(limits: Floats, flat: Floats, counts: Counts) -> None:
    counts[:] = np.searchsorted(limits, flat)


class _LeadingBits:
    """Boundaries by their first 16 bits: sign, exponent, 7 bits of fraction.

    Attributes:
        table: `(65536,)`: boundaries in all cells below, by these bits of a value.
        limits: the boundaries, and infinity.
        crowd: how many boundaries the fullest cell holds.
    """

    def __init__(self, limits: npt.NDArray[np.float32]) -> None:
        leading = limits.view(np.uint16)[_HIGH_HALF::2].astype(np.int64)
        rank = np.where(leading < 0x8000, 0x8000 + leading, 0xFFFF - leading)  # ascending in value
        in_cell = np.bincount(rank, minlength=0x10000)
        before = (np.cumsum(in_cell) - in_cell).astype(np.uint8)
        self.table = np.concatenate([before[0x8000:], before[0x7FFF::-1]])
        self.limits = np.append(limits, np.float32(np.inf))
        self.crowd = int(in_cell.max())


def _by_leading_bits(bits: _LeadingBits, flat: Floats, counts: Counts) -> None:
    """Look the first 16 bits up, then compare what is left."""
    for start in range(0, len(flat), _BLOCK):
        block, count = flat[start : start + _BLOCK], counts[start : start + _BLOCK]
        np.take(bits.table, block.view(np.uint16)[_HIGH_HALF::2], out=count)
        for _ in range(bits.crowd):
            count += np.greater(block, np.take(bits.limits, count)).view(np.uint8)
