"""How often symbols occur, by where they stand: rows and columns in a few classes each.

Pruning and a price of bits empty some channels and all but empty others, and so does an input that
tells nothing. A symbol's context is the class of its row and that of its column; in each context
symbol 0, the commonest, has a share of its own. The others keep their proportions, so a context
costs two bytes. The classes are coded before the symbols, in the same message.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchclust.packing.entropy import TOTAL, Integers, frequencies, quantize, weights

SHARES = 1 << 16
MOST_CLASSES = 8
_CLASS_BITS = 24.0  # of one class more: a share, at least, and its place in a table
_ONE = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Classes:
    """Which class each row and each column is in, ``uint8``, by falling size of the classes."""

    rows: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Contexts:
    """The frequencies that a tensor's symbols are coded with.

    Attributes:
        drops: ``(k,)`` how far each symbol's frequency lies below that of symbol 1; those of
            symbols 0 and 1 are 0. Of a ``whole`` one: below that of symbol 0.
        shares: ``(row classes, column classes)`` of symbol 0, in 65536ths; 0 where all are.
        row_drops: the same table of the rows' classes, from class 0 on.
        column_drops: of the columns'.
        whole: one table of all symbols, as files of version 1 have it.
    """

    drops: Integers
    shares: Integers
    row_drops: Integers
    column_drops: Integers
    whole: bool = False

    @classmethod
    def of_version_1(cls, drops: Integers) -> Contexts:
        """One context, whose frequencies fall from the first symbol on."""
        return cls(drops, np.zeros((1, 1), np.int64), _ONE, _ONE, whole=True)

    @property
    def n_symbols(self) -> int:
        """How many symbols there are."""
        return len(self.drops)

    def frequencies(self) -> list[Integers]:
        """Of each context's symbols, out of 2^24; of one symbol where no other occurs."""
        if self.whole:
            return [frequencies(self.drops)]
        return [self._frequencies(int(share)) for share in self.shares.reshape(-1)]

    def _frequencies(self, share: int) -> Integers:
        others = self.n_symbols - 1
        if others == 0 or share == 0:
            return np.full(1, TOTAL, np.int64)
        rest = min(max(TOTAL - share * (TOTAL // SHARES), others), TOTAL - 1)
        found = np.empty(others + 1, np.int64)
        relative = weights(self.drops[1:])
        found[1:] = 1 + relative * (rest - others) // relative.sum()
        found[0] = TOTAL - found[1:].sum()
        return found

    def groups(
        self, classes: Classes, rows: slice, columns: slice
    ) -> Iterator[tuple[int, npt.NDArray[np.intp] | slice]]:
        """A block's contexts in order, each with the places of its symbols, row by row."""
        if len(self.row_drops) == len(self.column_drops) == 1:
            yield 0, slice(None)
            return
        first = classes.rows[rows, None] * np.uint8(len(self.column_drops))
        flat = (first + classes.columns[None, columns]).reshape(-1)
        order = np.argsort(flat, kind="stable")
        ends = np.cumsum(np.bincount(flat))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                yield number, order[start:end]


def find_contexts(
    symbols: npt.NDArray[np.unsignedinteger], counts: Integers
) -> tuple[Contexts, Classes]:
    """The classes of rows and columns that make the message shortest, and its frequencies.

    Args:
        symbols: ``(rows, columns)``, all below ``k``.
        counts: ``(k,)`` of the symbols, falling.
    """
    other = symbols != 0
    n_rows, n_columns = other.shape
    finest = Classes(np.zeros(n_rows, np.uint8), np.zeros(n_columns, np.uint8))
    if n_rows > 1 and n_columns > 1 and len(counts) > 1:
        by_row, by_column = np.count_nonzero(other, axis=1), np.count_nonzero(other, axis=0)
        finest = Classes(_classified(by_row, n_columns), _classified(by_column, n_rows))
    tally = _tally(other, finest)
    options = [
        _merged(finest, tally, rows=rows, columns=columns)
        for columns in (True, False)
        for rows in (True, False)
    ]
    classes, (inside, size) = min(options, key=lambda option: _bits(*option))
    return _contexts(counts, classes, inside, size), classes


def _merged(
    finest: Classes, tally: tuple[Integers, Integers], *, rows: bool, columns: bool
) -> tuple[Classes, tuple[Integers, Integers]]:
    """The same classes with all rows in one, or all columns, or both; and their tally."""
    axes = tuple(axis for axis, merge in enumerate((rows, columns)) if merge)
    inside, size = (counted.sum(axes, keepdims=True) for counted in tally)
    classes = Classes(
        np.zeros_like(finest.rows) if rows else finest.rows,
        np.zeros_like(finest.columns) if columns else finest.columns,
    )
    return classes, (inside, size)


def _contexts(counts: Integers, classes: Classes, inside: Integers, size: Integers) -> Contexts:
    shares = np.rint(SHARES * (1 - inside / size)).astype(np.int64).clip(1, SHARES - 1)
    drops = np.concatenate([_ONE, quantize(counts[1:])]) if len(counts) > 1 else _ONE
    rows, columns = (quantize(np.bincount(of)) for of in (classes.rows, classes.columns))
    return Contexts(drops, np.where(inside == 0, 0, shares), rows, columns)


def _tally(other: npt.NDArray[np.bool_], classes: Classes) -> tuple[Integers, Integers]:
    """By class of row and column: how many symbols are not 0, and how many there are."""
    rows, columns = np.bincount(classes.rows), np.bincount(classes.columns)
    inside = np.zeros((len(rows), len(columns)), np.int64)
    for row in range(len(rows)):
        by_column = np.count_nonzero(other[classes.rows == row], axis=0)
        inside[row] = np.bincount(classes.columns, weights=by_column, minlength=len(columns))
    return inside, rows[:, None] * columns


def _bits(classes: Classes, tally: tuple[Integers, Integers]) -> float:
    """Of the classes, their tables, and which symbols are not 0."""
    sizes = [np.bincount(of) for of in (classes.rows, classes.columns)]
    own = sum(float(_binary(size, int(size.sum())).sum()) for size in sizes)
    return own + float(_split_bits(*tally).sum()) + 16.0 * tally[0].size


def _classified(other: Integers, length: int) -> npt.NDArray[np.uint8]:
    """Lines with so many symbols that are not 0, of `length` each, in classes.

    Sorted lines are cut in two wherever that saves most, as long as it saves anything.
    """
    order = np.argsort(other, kind="stable")
    rising = other[order]
    total = np.concatenate([[0], np.cumsum(rising)])
    cuts = [0, len(rising)]
    while len(cuts) <= MOST_CLASSES:
        options = [_cut(rising, total, length, a, b) for a, b in itertools.pairwise(cuts)]
        gain, place = max(options)
        if gain <= 0:
            break
        cuts = sorted([*cuts, place])
    sizes = np.diff(cuts)
    rank = np.empty(len(sizes), np.uint8)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    found = np.empty(len(rising), np.uint8)
    found[order] = np.repeat(rank, sizes)
    return found


def _cut(rising: Integers, total: Integers, length: int, start: int, end: int) -> tuple[float, int]:
    """Bits saved by the best cut of a part of the sorted lines, and its place."""
    place = np.arange(start + 1, end)
    place = place[rising[place] != rising[place - 1]]
    if not len(place):
        return 0.0, start

    def bits(first: Integers | int, last: Integers | int) -> npt.NDArray[np.float64]:
        return _split_bits(total[last] - total[first], (last - first) * length)

    n = len(rising)
    whole = bits(start, end) + _binary(end - start, n)
    parts = bits(start, place) + bits(place, end)
    parts = parts + _binary(place - start, n) + _binary(end - place, n)
    best = int(np.argmin(parts))
    return float(whole - parts[best]) - _CLASS_BITS, int(place[best])


def _split_bits(some: Integers | int, of: Integers | int) -> npt.NDArray[np.float64]:
    """To tell which of so many are the some."""
    return _binary(some, of) + _binary(np.subtract(of, some), of)


def _binary(count: Integers | int, of: Integers | int) -> npt.NDArray[np.float64]:
    """``count * log2(of / count)``, 0 for none."""
    some = np.maximum(count, 1)
    bits: npt.NDArray[np.float64] = np.where(np.equal(count, 0), 0.0, some * np.log2(of / some))
    return bits
