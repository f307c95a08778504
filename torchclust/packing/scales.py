"""Recover integer codes and channel scales from the values of a stripped weight.

``weight[o] = scale[o] * code`` in floating point has many distinct values and few codes. The codes
are found again from ratios: the scale that turns a channel's largest value into a code must turn
all its other values into codes, to the bit. The channel with the most values fixes the codebook,
the others then follow it; a channel that cannot may bring a few codes of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from torchclust.packing.coding import nearest_codes, products
from torchclust.packing.dtypes import Bits, Dtype, to_bits, to_tensor
from torchclust.packing.entropy import Integers

_LARGEST = 127
_NUDGES = (0, 1, -1, 2, -2)  # units in the last place between largest / code and the scale
_FIRST = 4  # values of a row that are tried before all of them
_SAMPLE = 32  # rows that choose a codebook for all
_MOST_WORK = 10**8  # products to try for one tensor: seconds


def recover_scales(
    row: Integers, value: Bits, dtype: Dtype, n_rows: int
) -> tuple[Bits, Integers] | None:
    """Scales and codes such that ``products(scale[row], code) == value`` to the bit.

    Args:
        row: ``(n,)`` rising, which row a value belongs to; every row has one at least.
        value: ``(n,)`` bits, the distinct values of each row.
        dtype: float32, float64, float16 or bfloat16.
        n_rows: how many rows there are.

    Returns:
        Scales ``(n_rows,)``, positive, and codes ``(n,)`` in [-127, 127]; None if there are none.
    """
    sign_bit = dtype.bits.type(1 << 8 * dtype.unit - 1)
    magnitude, negative = value & ~sign_bit, (value & sign_bit) != 0
    if (negative & (magnitude == 0)).any() or not _is_finite(magnitude, dtype):
        return None
    is_code = magnitude > 0
    rows = _Rows.of(row[is_code], magnitude[is_code], dtype)
    if not len(rows.row) or rows.sizes.max() > _LARGEST:
        return None
    found = _best(rows, n_rows)
    if found is None:
        return None
    scales, codes = found
    code = np.zeros(len(value), np.int64)
    code[is_code] = codes[rows.entry_of]
    return scales, np.where(negative, -code, code)


def is_safe_scale(scales: Bits, dtype: Dtype) -> npt.NDArray[np.bool_]:
    """Whether products with a scale are the same on a thread that flushes denormals to zero."""
    values = to_tensor(scales, dtype)
    wide = values if dtype.name == "float64" else values.float()
    safe: npt.NDArray[np.bool_] = (
        torch.isfinite(wide) & (wide >= torch.finfo(wide.dtype).tiny)
    ).numpy()
    return safe


@dataclass(frozen=True)
class _Rows:
    """Distinct magnitudes above zero, by row and falling within it.

    Attributes:
        row: of each magnitude; rows without any are absent.
        bits: the magnitudes'.
        start: where each row present begins.
        entry_of: for each value given, its magnitude's position.
    """

    row: Integers
    bits: Bits
    start: Integers
    entry_of: Integers
    dtype: Dtype

    @classmethod
    def of(cls, row: Integers, magnitude: Bits, dtype: Dtype) -> _Rows:
        top = np.iinfo(dtype.bits).max
        order = np.lexsort((top - magnitude, row))  # bits of positive floats sort as the floats
        row, magnitude = row[order], magnitude[order]
        is_new = np.ones(len(row), bool)
        is_new[1:] = (row[1:] != row[:-1]) | (magnitude[1:] != magnitude[:-1])
        entry_of = np.empty(len(row), np.int64)
        entry_of[order] = np.cumsum(is_new) - 1
        row, magnitude = row[is_new], magnitude[is_new]
        return cls(row, magnitude, _starts(row), entry_of, dtype)

    def only(self, keep: npt.NDArray[np.bool_]) -> _Rows:
        """The rows for which ``keep``, one entry for each row present, is true."""
        chosen = np.repeat(keep, self.sizes)
        row = self.row[chosen]
        return _Rows(row, self.bits[chosen], _starts(row), np.zeros(0, np.int64), self.dtype)

    @property
    def sizes(self) -> Integers:
        """Magnitudes of each row present."""
        return np.diff(self.start, append=len(self.row))

    def fit(
        self, code: int | Integers, nudge: int | Integers
    ) -> tuple[Bits, Integers, npt.NDArray[np.bool_]]:
        """Suppose that ``code`` is each row's largest: its scale, its codes, and what is exact.

        Args:
            code: one, or one for each row present; as ``nudge``, which corrects the scale by so
                many units in the last place.

        Returns:
            Scales by row present; codes by entry; by entry, whether the product is its value.
        """
        largest = to_tensor(self.bits[self.start], self.dtype)
        near = to_bits((largest.double() / torch.as_tensor(code)).to(self.dtype.torch))
        scales = (near.astype(np.int64) + nudge).astype(self.dtype.bits)
        scales[~is_safe_scale(scales, self.dtype)] = to_bits(torch.ones(1, dtype=largest.dtype))[0]
        by_entry = np.repeat(scales, self.sizes)
        codes = nearest_codes(self.bits, by_entry, self.dtype)
        return scales, codes, products(by_entry, codes, self.dtype) == self.bits


def _best(rows: _Rows, n_rows: int) -> tuple[Bits, Integers] | None:
    """Scales by row and codes by magnitude, from the codebook that suits the fullest rows best."""
    fullest = np.zeros(len(rows.start), bool)
    fullest[np.argsort(-rows.sizes, kind="stable")[:_SAMPLE]] = True
    sample = rows.only(fullest)
    guesses = [codebook for codebook, _, _ in _options(sample, int(np.argmax(sample.sizes)))]
    trials = [_Found(sample, codebook) for codebook in guesses]
    for trial in trials:
        if trial.explain() and not trial.is_open.any():
            break
    if not trials:
        return None
    found = _Found(rows, min(trials, key=lambda trial: trial.is_open.sum()).codebook)
    if not found.explain_all():
        return None
    scales = np.full(n_rows, to_bits(torch.ones(1, dtype=rows.dtype.torch))[0], rows.dtype.bits)
    scales[rows.row[rows.start]] = found.scales
    return scales, found.codes


def _options(rows: _Rows, which: int) -> list[tuple[frozenset[int], np.unsignedinteger, Integers]]:
    """What a row may be, small codes first: its set of codes, its scale, and its codes."""
    start, n = rows.start[which], rows.sizes[which]
    code = np.arange(1, _LARGEST + 1).repeat(len(_NUDGES))
    nudge = np.tile(np.array(_NUDGES), _LARGEST)
    for some in sorted({min(n, _FIRST), n}):  # the first few values refuse nearly all that fail
        bits = rows.bits[start : start + some]
        trial = np.arange(len(code)).repeat(some)
        trials = _Rows(trial, np.tile(bits, len(code)), _starts(trial), trial, rows.dtype)
        scales, codes, exact = trials.fit(code, nudge)
        codes, whole = codes.reshape(-1, some), exact.reshape(-1, some).all(1)
        code, nudge, scales, codes = code[whole], nudge[whole], scales[whole], codes[whole]
        if not len(code):
            return []
    found = {
        frozenset(row.tolist()): (scale, row) for scale, row in zip(scales, codes, strict=True)
    }
    return [(codebook, *rest) for codebook, rest in found.items()]


class _Found:
    """Scales and codes as far as they are found, with the codes in use."""

    def __init__(self, rows: _Rows, codebook: frozenset[int]) -> None:
        self.rows, self.codebook = rows, codebook
        self.scales = np.zeros(len(rows.start), rows.dtype.bits)
        self.codes = np.zeros(len(rows.row), np.int64)
        self.is_open = np.ones(len(rows.start), bool)
        self._work = 0

    def explain_all(self) -> bool:
        """Explain every row, adding as few codes as can be; False if a row resists, or it drags."""
        while self.explain():
            open_rows = np.flatnonzero(self.is_open)
            if not len(open_rows):
                return True
            for which in open_rows[np.argsort(-self.rows.sizes[open_rows])][:_SAMPLE]:
                options = _options(self.rows, which)
                if not options:
                    return False
                codebook = min((o[0] for o in options), key=lambda o: len(o - self.codebook))
                self.codebook |= codebook
        return False

    def explain(self) -> bool:
        """Explain every open row that the codebook can; False if it takes too long."""
        allowed = np.array(sorted(self.codebook, reverse=True))
        for code in allowed:
            for nudge in _NUDGES:
                if not self.is_open.any():
                    return True
                part = self.rows.only(self.is_open)
                self._work += len(part.row)
                if self._work > _MOST_WORK:
                    return False
                scales, codes, exact = part.fit(code, nudge)
                exact &= np.isin(codes, allowed)
                self._close(np.logical_and.reduceat(exact, part.start), scales, codes)
        return True

    def _close(self, good: npt.NDArray[np.bool_], scales: Bits, codes: Integers) -> None:
        sizes = self.rows.sizes
        entries = np.repeat(self.is_open, sizes)
        chosen = np.flatnonzero(entries)[np.repeat(good, sizes[self.is_open])]
        self.codes[chosen] = codes[np.repeat(good, sizes[self.is_open])]
        closed = np.flatnonzero(self.is_open)[good]
        self.scales[closed] = scales[good]
        self.is_open[closed] = False


def _starts(row: Integers) -> Integers:
    is_new = np.ones(len(row), bool)
    is_new[1:] = row[1:] != row[:-1]
    return np.flatnonzero(is_new)


def _is_finite(magnitude: Bits, dtype: Dtype) -> bool:
    return bool(torch.isfinite(to_tensor(magnitude, dtype)).all())
