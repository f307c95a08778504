"""Choose how a tensor is coded: count its values, then take the cheapest coding that is exact.

Only values are looked at, so a clustered model and the same model stripped (or clustered by another
tool) pack alike. What a clustering knows beyond its values, the `Hint`, spares a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchclust.packing.coding import (
    Codebooks,
    Codes,
    Coding,
    Layout,
    Sparse,
    nearest_codes,
    products,
)
from torchclust.packing.dtypes import Bits, Dtype
from torchclust.packing.entropy import MAX_SYMBOLS, Integers, entropy
from torchclust.packing.scales import is_safe_scale, recover_scales

_MAX_ENTRIES = 1 << 18  # values by row that a tally may hold whatever the tensor's size


@dataclass(frozen=True)
class Hint:
    """What is known of a clustered tensor beside its values.

    Attributes:
        rows_per_book: channels that share a codebook; None if unknown.
        codes: ``(k,)`` int8 of an int8 codebook, with its ``scales``, ``(rows,)`` bits.
    """

    rows_per_book: int | None = None
    codes: npt.NDArray[np.int8] | None = None
    scales: Bits | None = None


@dataclass(frozen=True)
class Choice:
    """A coding, and what its symbols amount to.

    Attributes:
        coding: None for raw.
        counts: of the symbols, falling; empty for raw.
        bits: estimated bits in the file.
        zeros: elements that are zero, of either sign; 0 for raw, where nobody counted.
    """

    coding: Coding | None
    counts: Integers
    bits: float
    zeros: int


@dataclass(frozen=True)
class Tally:
    """How often each value occurs in each book, sorted by book and then by bits."""

    book: Integers
    value: Bits
    count: Integers

    def coarser(self, factor: int) -> Tally:
        """The tally with ``factor`` neighbouring books made one."""
        return _merged(self.book // factor, self.value, self.count)


def choose(
    bits: Bits, dtype: Dtype, layout: Layout, hint: Hint, raw_bytes: int | None = None
) -> Choice:
    """The cheapest exact coding of a tensor.

    Args:
        bits: the tensor's, one dimension in C order.
        dtype: its element type.
        layout: its shape and which dimension is the channels'.
        hint: what is known of it.
        raw_bytes: what it takes as it is; None for the bytes of its elements.
    """
    raw_bytes = bits.nbytes if raw_bytes is None else raw_bytes
    raw = Choice(None, np.zeros(0, np.int64), 8.0 * raw_bytes, 0)
    if not bits.size or dtype.units > 1:
        return raw
    step = hint.rows_per_book or 1
    by_book, whole, of_code = _count(bits, dtype, layout, hint, step)
    found = [raw]
    if whole is not None:
        found.append(_codebooks(whole, dtype, layout, max(1, layout.n_rows)))
        found += _recovered(whole, dtype, 1, max(1, layout.n_rows))
    if of_code is not None and hint.codes is not None and hint.scales is not None:
        found.append(_codes(of_code, hint.codes, hint.scales, dtype))
    elif by_book is not None and layout.n_rows > 1:
        found += _searched(by_book, whole, dtype, layout, step)
    if dtype.is_scalable:
        found += _sparse(bits, dtype, layout)
    return min(found, key=lambda choice: choice.bits)


def _searched(
    by_book: Tally, whole: Tally | None, dtype: Dtype, layout: Layout, step: int
) -> Iterator[Choice]:
    """Codebooks for 1, 2, 4, ... channels each; integer codes if there are scales for them."""
    width = np.bincount(by_book.book).max()
    if whole is not None and len(whole.value) <= width:
        return  # one book serves all channels, and one channel needs it all
    if step == 1:
        yield from _recovered(by_book, dtype, layout.n_rows, 1)
    while True:
        yield _codebooks(by_book, dtype, layout, step)
        step *= 2
        if step >= layout.n_rows:
            return
        by_book = by_book.coarser(2)


def _recovered(tally: Tally, dtype: Dtype, n_scales: int, rows_per_scale: int) -> Iterator[Choice]:
    """Integer codes and scales, if the values are their products."""
    found = recover_scales(tally.book, tally.value, dtype, n_scales) if dtype.is_scalable else None
    if found is not None:
        scales, code = found
        counts = np.bincount(code + 128, weights=tally.count, minlength=256).astype(np.int64)
        codes = np.arange(-128, 128).astype(np.int8)
        yield _codes(counts, codes, scales, dtype, rows_per_scale)


def _codebooks(tally: Tally, dtype: Dtype, layout: Layout, rows_per_book: int) -> Choice:
    """Codebooks ordered by falling count, each on its own.

    Sorted so, the symbols of all books together have the least entropy that any order gives
    (sorted vectors add up to the most uneven sum), and 0 of a pruned weight is symbol 0 in each.
    """
    order = np.lexsort((tally.value, -tally.count, tally.book))
    book, value, count = tally.book[order], tally.value[order], tally.count[order]
    sizes = np.bincount(book)
    rank = np.arange(len(book)) - (np.cumsum(sizes) - sizes)[book]
    counts = np.bincount(rank, weights=count).astype(np.int64)
    if len(counts) > MAX_SYMBOLS:
        return Choice(None, counts[:0], np.inf, 0)
    books = np.repeat(value[rank == 0][:, None], len(counts), axis=1)
    books[book, rank] = value
    coding = Codebooks(books, rows_per_book)
    magnitude = value & dtype.bits.type((1 << 8 * dtype.unit - 1) - 1)
    zeros = int(count[(magnitude if dtype.is_scalable else value) == 0].sum())
    return Choice(coding, counts, _cost(counts, 8 * books.nbytes), zeros)


def _codes(
    counts: Integers,
    codes: npt.NDArray[np.int8],
    scales: Bits,
    dtype: Dtype,
    rows_per_scale: int = 1,
) -> Choice:
    """Integer codes by falling count; those that do not occur are left out."""
    used = counts > 0
    counts, codes = counts[used], codes[used]
    order = np.lexsort((codes, -counts))
    counts, codes = counts[order], codes[order]
    coding = Codes(codes, scales, dtype, rows_per_scale)
    side = 8 * (codes.nbytes + scales.nbytes)
    return Choice(coding, counts, _cost(counts, side), int(counts[codes == 0].sum()))


def _sparse(bits: Bits, dtype: Dtype, layout: Layout) -> Iterator[Choice]:
    """Zeros coded and the rest as it is; nothing if there are no zeros."""
    negative_zero = dtype.bits.type(1 << 8 * dtype.unit - 1)
    tallied = np.zeros(3, np.int64)  # negative zeros, zeros, literals
    for rows, columns in layout.blocks():
        block = layout.take(bits, rows, columns)
        n_zero, n_negative = np.count_nonzero(block == 0), np.count_nonzero(block == negative_zero)
        tallied += [n_negative, n_zero, block.size - n_zero - n_negative]
    if tallied[1] == 0:
        return
    order = np.argsort(-tallied, kind="stable")[: np.count_nonzero(tallied)]
    counts, meanings = tallied[order], (order - 1).astype(np.int8)
    coding = Sparse(meanings, int(tallied[2]), dtype)
    side = 8 * (8 + len(counts) + tallied[2] * dtype.unit)
    yield Choice(coding, counts, _cost(counts, side), int(tallied[0] + tallied[1]))


def _cost(counts: Integers, side_bits: int) -> float:
    """Bits of codebooks, frequency table and symbols."""
    return side_bits + 2.0 * len(counts) + float(counts.sum()) * entropy(counts)


def _count(
    bits: Bits, dtype: Dtype, layout: Layout, hint: Hint, step: int
) -> tuple[Tally | None, Tally | None, Integers | None]:
    """One pass: values by book of ``step`` rows, values of the whole, and uses of hinted codes.

    A tally is None where it grew out of use: dense tensors are given up after a block or two.
    """
    limit = max(_MAX_ENTRIES, layout.n_elements // 8)
    by_book: list[Tally] | None = []
    whole: Tally | None = _empty(dtype)
    uses = None if hint.codes is None else np.zeros(256, np.int64)
    for rows, columns in layout.blocks():
        found = _tally_rows(layout.take(bits, rows, columns), rows.start)
        if uses is not None:
            uses = _add_uses(uses, found, hint, dtype)
        if whole is not None:
            whole = _joined([whole, _merged(found.book * 0, found.value, found.count)])
            whole = whole if len(whole.value) <= MAX_SYMBOLS else None
        if by_book is not None:
            part = found.coarser(step)
            if by_book and by_book[-1].book[-1] == part.book[0]:  # a book that spans two blocks
                part = _joined([by_book.pop(), part])
            by_book.append(part)
            by_book = by_book if sum(len(t.book) for t in by_book) <= limit else None
        if by_book is None and whole is None and uses is None:
            break
    of_code = None if uses is None or hint.codes is None else uses[hint.codes.astype(int) + 128]
    return None if by_book is None else _concatenated(by_book), whole, of_code


def _tally_rows(block: Bits, first_row: int) -> Tally:
    """Values by row of a block, without a loop over its rows."""
    ordered = np.sort(block, axis=1)
    is_new = np.ones(ordered.shape, bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    where = np.flatnonzero(is_new)
    count = np.diff(where, append=ordered.size)
    return Tally(where // block.shape[1] + first_row, ordered.reshape(-1)[where], count)


def _add_uses(uses: Integers, found: Tally, hint: Hint, dtype: Dtype) -> Integers | None:
    """Count the hinted codes' uses; None if a value is not exactly its scale times a code."""
    assert hint.codes is not None
    assert hint.scales is not None
    scales = hint.scales[found.book]
    if not is_safe_scale(scales, dtype).all():
        return None
    code = nearest_codes(found.value, scales, dtype)
    exact = products(scales, code, dtype) == found.value
    if not (exact & np.isin(code, hint.codes)).all():
        return None
    return uses + np.bincount(code + 128, weights=found.count, minlength=256).astype(np.int64)


def _merged(book: Integers, value: Bits, count: Integers) -> Tally:
    order = np.lexsort((value, book))
    book, value, count = book[order], value[order], count[order]
    is_new = np.ones(len(book), bool)
    is_new[1:] = (book[1:] != book[:-1]) | (value[1:] != value[:-1])
    start = np.flatnonzero(is_new)
    return Tally(book[start], value[start], np.add.reduceat(count, start) if len(start) else count)


def _joined(parts: list[Tally]) -> Tally:
    whole = _concatenated(parts)
    return _merged(whole.book, whole.value, whole.count)


def _concatenated(parts: list[Tally]) -> Tally:
    return Tally(
        np.concatenate([part.book for part in parts]),
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.count for part in parts]),
    )


def _empty(dtype: Dtype) -> Tally:
    return Tally(np.zeros(0, np.int64), np.zeros(0, dtype.bits), np.zeros(0, np.int64))
