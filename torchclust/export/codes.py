"""Which int8 code each clustered weight has, from the weights' values alone. Pure numpy.

A clustered tensor is written in one of two ways, and both can be told from the numbers, so a model
that was stripped, saved and loaded again exports as well as one that is still clustered:

- float codebook: at most 256 values, shared by the tensor (or by a channel, or a group of them);
- int8 codebook: every output channel is a scale times small integers.

The codes are what the file will hold up to a channel's sign. `match` then finds the tensor that the
converter made of a parameter: row by row it is a multiple of it (a folded BatchNorm, x 1/6, ...).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from torchclust.export.weight_layouts import weight_layouts

Array: TypeAlias = npt.NDArray[Any]

LARGEST = 127
_PEAKS = np.arange(LARGEST, LARGEST / 2, -0.25)  # grids tried: where the largest magnitude falls
_MOST_VALUES = 256
# float32 products carry a relative error of 2**-24, so code ratios are off by at most 2e-5.
_INTEGER_TOLERANCE = 1e-4
# Folded by the converter in float32: a few roundings.
_MATCH_TOLERANCE = 1e-4
_BLOCK = 1 << 20  # elements
_DENORMAL = 1e-37  # below it a folded row keeps too few bits to be compared


@dataclass(frozen=True, eq=False)
class Trained:
    """One clustered parameter as it must come out of the exporter.

    ``codes``: int8, the parameter's shape. ``groups``: int64, which codebook each output channel
    uses, of shape (output channels,); all 0 where one codebook serves the tensor. ``n_clusters``:
    most codes per codebook. ``symmetric``: the codebook equals its mirror image (int8 codebooks).
    ``channel_axis``: the parameter's axis of output channels. ``recovered``: known from the values
    only.
    """

    name: str
    weight: Array
    codes: Array
    groups: Array
    n_clusters: int
    symmetric: bool
    channel_axis: int = 0
    recovered: bool = False


@dataclass(frozen=True, eq=False)
class Matched:
    """A parameter found in the file.

    ``codes``: int8 (rows, columns) in the file's layout, as they will stand in it: mirrored where
    the folded factor is negative. ``scales``: float64 (rows,), the least-squares scale of each row,
    0 where BatchNorm wiped the row out. ``groups``: which codebook each row uses. ``negative``: how
    many rows are mirrored.
    """

    trained: Trained
    codes: Array
    scales: Array
    groups: Array
    negative: int


def quantize_codebook(values: Array, groups: Array, channel_axis: int = 0) -> Array:
    """Codes of float-codebook weights: each codebook is rounded once, on the grid that suits it.

    Equal weights keep equal codes, and so they have equal rounding errors, which add up over a row
    of weights instead of cancelling out: a shift of the layer's mean that no activation undoes.
    Of the grids that give the largest magnitude a code of 64 to 127 that one is taken on which
    rows, scaled by least squares as in the file, are closest in ``||e||**2 + sum(e)**2``, relative
    to ``||row||**2``: the error's expected square at the output for inputs whose squared mean is
    about their variance, as behind a ReLU.

    Args:
        values: float, any shape.
        groups: which codebook each output channel uses, (output channels,).
        channel_axis: the axis of output channels.

    Returns:
        int8 of the shape of ``values``.
    """
    rows = np.moveaxis(np.asarray(values, np.float64), channel_axis, 0)
    flat = rows.reshape(len(rows), -1)
    codes = np.zeros(flat.shape, np.int8)
    for group in np.unique(groups):
        members = groups == group
        distinct, position = np.unique(flat[members], return_inverse=True)
        position = position.reshape(members.sum(), -1)
        codes[members] = _rounded(distinct, _counts(position, len(distinct)))[position]
    return np.moveaxis(codes.reshape(rows.shape), 0, channel_axis)


def recover(name: str, weight: Array, channel_axis: int = 0) -> Trained | None:
    """Read a stripped parameter's codes off its values; None if it was not clustered.

    Where both readings hold (a small int8 layer has few float values too), the one with fewer
    codes is taken. A chance hit on an unclustered tensor is harmless: its codes then represent
    it better than rounding would.
    """
    if weight.ndim < 2 or not np.isfinite(weight).all():
        return None
    channels_first = np.moveaxis(np.asarray(weight), channel_axis, 0)
    rows = channels_first.reshape(len(channels_first), -1)
    groups = np.zeros(len(rows), np.int64)
    values = _few_values(rows)
    if rows.shape[1] == 1 and values is None:
        return None  # one value is a multiple of itself, which tells nothing
    integers = recover_int8(rows)
    count = rows.size if integers is None else _symmetric_size(integers)
    symmetric = count <= min(values or rows.size, max(3, rows.size // 2))
    if symmetric and integers is not None:
        codes = np.moveaxis(integers.reshape(channels_first.shape), 0, channel_axis)
    elif values is not None:
        count, codes = values, quantize_codebook(weight, groups, channel_axis)
    else:
        few = (_few_values(row) for row in rows)
        by_channel = [n for n in itertools.takewhile(lambda n: n is not None, few) if n]
        if len(by_channel) < len(rows):
            return None
        count, groups = max(by_channel), np.arange(len(rows))
        codes = quantize_codebook(weight, groups, channel_axis)
    if count < 2 or not codes.any():
        return None
    return Trained(name, weight, codes, groups, count, symmetric, channel_axis, recovered=True)


def recover_int8(rows: Array) -> Array | None:
    """Integers in [-127, 127] that each row is a multiple of, or None; (channels, n) like ``rows``.

    A row gives its integers only up to a common factor; of all choices the one is wanted whose
    union over the rows is smallest. Rows with most distinct codes leave least choice and go first.
    """
    bases = []
    for row in rows:
        base = _integers(row)
        if base is None:
            return None
        bases.append(base)
    masks = [_mask(base) for base in bases]
    order = sorted(set(masks) - {0}, key=lambda m: (m.bit_count(), m.bit_length()), reverse=True)
    if not order:
        return np.zeros(rows.shape, np.int8)
    choices = (_refined(order, _choose(order, start)) for start in _multiples(order[0]))
    factor = min(choices, key=lambda factors: _union(factors.items()).bit_count())
    wide = [base * factor.get(mask, 1) for base, mask in zip(bases, masks, strict=True)]
    return np.stack(wide).astype(np.int8)


def match(matrix: Array, trained: Trained) -> Matched | None:
    """Try to see ``matrix``, a weight of the file as (channels, n), as a multiple of a parameter.

    Every row must be one number times the parameter's row, in one of the layouts that converters
    use. Returns None where it is not.
    """
    for layout in weight_layouts(trained.weight.shape, matrix.shape, trained.channel_axis):
        # One row rejects nearly everything, before the whole is laid out anew.
        if _row_factors(matrix[:1], layout.first_row(trained.weight)) is None:
            continue
        factors = _row_factors(matrix, layout.of(trained.weight, matrix.shape))
        if factors is None:
            continue
        codes = layout.of(trained.codes, matrix.shape)
        per_row = layout.order[0] == trained.channel_axis
        groups = trained.groups[layout.rows] if per_row else np.zeros(len(matrix), np.int64)
        mirrored = np.where(factors[:, None] < 0, -codes, codes)
        norm = _along_rows(mirrored, mirrored)
        scales = _along_rows(matrix, mirrored) / np.where(norm, norm, 1)
        return Matched(trained, mirrored, scales, groups, int((factors < 0).sum()))
    return None


def most_codes(codes: Array, groups: Array) -> int:
    """The largest number of distinct codes that one codebook of (rows, n) codes has."""
    return max(len(np.unique(codes[groups == g])) for g in np.unique(groups))


def _rounded(distinct: Array, counts: Array) -> Array:
    """The codes of a codebook's values, (k,), of which row r has ``counts[r, j]``."""
    grids = distinct / max(np.abs(distinct).max(initial=0.0), _DENORMAL) * _PEAKS[:, None]
    codes = np.rint(grids)
    along, squares = counts @ (distinct * codes).T, counts @ np.square(codes).T
    scales = along / np.where(squares > 0, squares, 1)
    power = (counts @ np.square(distinct))[:, None]
    shift = (counts @ distinct)[:, None] - scales * (counts @ codes.T)
    error = power - scales * along + np.square(shift)
    relative = error / np.where(power > 0, power, 1)
    chosen: Array = codes[relative.sum(axis=0).argmin()].astype(np.int8)
    return chosen


def _counts(position: Array, k: int) -> Array:
    """How often each of k values stands in each row, float64 (rows, k)."""
    first = np.arange(len(position))[:, None] * k
    counts = np.bincount((first + position).ravel(), minlength=len(position) * k)
    return counts.reshape(-1, k).astype(np.float64)


def _few_values(rows: Array) -> int | None:
    """How many distinct values, if at most 256 and clearly fewer than elements."""
    sample = np.unique(rows.reshape(-1)[: 4 * _MOST_VALUES])
    if len(sample) > _MOST_VALUES:
        return None
    count = len(np.unique(rows))
    return count if count <= _MOST_VALUES and count <= max(1, rows.size // 2) else None


def _integers(row: Array) -> Array | None:
    """The smallest integers in [-127, 127] proportional to the row, or None."""
    distinct, inverse = np.unique(row, return_inverse=True)
    if len(distinct) > 2 * LARGEST + 1:
        return None
    distinct = distinct.astype(np.float64)
    peak = np.abs(distinct).max(initial=0.0)
    if peak == 0:
        return np.zeros(len(row), np.int64)
    scaled = np.arange(1, LARGEST + 1)[:, None] * (distinct / peak)
    good = np.abs(scaled - np.rint(scaled)).max(axis=1) < _INTEGER_TOLERANCE
    if not good.any():
        return None
    integers: Array = np.rint(scaled[good.argmax()]).astype(np.int64)[inverse]
    return integers


def _mask(base: Array) -> int:
    """The set of non-zero magnitudes as bits, bit m for magnitude m."""
    return sum(1 << int(m) for m in np.unique(np.abs(base)) if m)


def _multiples(mask: int) -> list[int]:
    return list(range(1, LARGEST // (mask.bit_length() - 1) + 1))


@functools.lru_cache(1 << 14)
def _scaled(mask: int, factor: int) -> int:
    if factor == 1:
        return mask
    bits = (m for m in range(1, LARGEST + 1) if mask >> m & 1)
    return sum(1 << m * factor for m in bits)


def _best(mask: int, union: int) -> int:
    """The factor with which the mask adds least to the union."""
    return min(_multiples(mask), key=lambda factor: (_scaled(mask, factor) & ~union).bit_count())


def _union(factors: Iterable[tuple[int, int]]) -> int:
    return functools.reduce(operator.or_, (_scaled(mask, factor) for mask, factor in factors), 0)


def _choose(order: Sequence[int], start: int) -> dict[int, int]:
    """Factors for every mask, greedily, given the first one's."""
    factors = {order[0]: start}
    union = _scaled(order[0], start)
    for mask in order[1:]:
        factors[mask] = _best(mask, union)
        union |= _scaled(mask, factors[mask])
    return factors


def _refined(order: Sequence[int], factors: dict[int, int]) -> dict[int, int]:
    """One pass that chooses each factor anew, all the others given."""
    after = list(
        itertools.accumulate(
            (_scaled(mask, factors[mask]) for mask in reversed(order)), operator.or_, initial=0
        )
    )[-2::-1]
    before, refined = 0, {}
    for mask, rest in zip(order, after, strict=True):
        refined[mask] = _best(mask, before | rest)
        before |= _scaled(mask, refined[mask])
    return refined


def _symmetric_size(codes: Array) -> int:
    magnitudes = np.unique(np.abs(codes.astype(np.int64)))
    return 2 * int((magnitudes > 0).sum()) + 1


def _row_factors(matrix: Array, weight: Array) -> Array | None:
    """The number that each row of ``weight`` was multiplied by, or None if it was not that."""
    factors = np.empty(len(matrix))
    for rows in _blocks(matrix):
        left, right = np.asarray(matrix[rows], np.float64), np.asarray(weight[rows], np.float64)
        norm = np.einsum("ij,ij->i", right, right)
        factors[rows] = np.einsum("ij,ij->i", left, right) / np.where(norm > 0, norm, 1)
        tolerance = _MATCH_TOLERANCE * np.abs(left).max(axis=1, initial=0.0) + _DENORMAL
        if (np.abs(left - factors[rows, None] * right).max(axis=1) > tolerance).any():
            return None
    return factors


def rounded_codes(values: Array, scales: Array) -> Array:
    """The int8 codes nearest to values in units of scales that broadcast, without -128."""
    steps: Array = values / scales
    np.rint(steps, out=steps)
    codes: Array = np.clip(steps, -LARGEST, LARGEST, out=steps).astype(np.int8)
    return codes


def _along_rows(left: Array, right: Array) -> Array:
    """The rows' scalar products in float64."""
    parts = [
        np.einsum("ij,ij->i", left[rows].astype(np.float64), right[rows].astype(np.float64))
        for rows in _blocks(left)
    ]
    return np.concatenate(parts)


def _blocks(matrix: Array) -> Iterator[slice]:
    """Rows in blocks, so that what is computed of a large matrix takes little memory."""
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))
