"""How one tensor's bits are coded in a packed file: raw, by codebooks, by int8 codes, or sparse.

A tensor is handled as unsigned integers of its elements' size (its *bits*), so every dtype, NaN
and negative zero comes back as it was. Coded tensors are seen as rows: of a matrix or more, one row
for each index of dimension `axis` (the output channels); of a vector, one row. Rows are worked on
in blocks of a quarter of a million elements, so a large tensor needs little memory beside its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.packing.contexts import Classes, Contexts
from torchclust.packing.dtypes import Bits, Dtype, to_bits, to_tensor
from torchclust.packing.entropy import Decoder, Integers, Symbols, encode, frequencies, model_of

BLOCK = 1 << 18


@dataclass(frozen=True)
class Layout:
    """A tensor's shape, seen as rows.

    Attributes:
        shape: of the tensor.
        axis: which dimension comes first: 0, or 1 for the weight of a ConvTranspose.
    """

    shape: tuple[int, ...]
    axis: int = 0

    @property
    def n_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def n_rows(self) -> int:
        """Output channels of a matrix or more, else 1."""
        return self.shape[self.axis] if len(self.shape) > 1 else 1

    @property
    def n_columns(self) -> int:
        """Elements a row."""
        return self.n_elements // self.n_rows if self.n_rows else 0

    def blocks(self, width: int = 1) -> list[tuple[slice, slice]]:
        """Rows and columns of the blocks, in order; ``width`` is what else a row needs."""
        rows, columns = self.n_rows, self.n_columns
        high = max(1, BLOCK // max(columns, width, 1))
        wide = max(1, min(columns, BLOCK))
        return [
            (slice(top, min(top + high, rows)), slice(left, min(left + wide, columns)))
            for top in range(0, rows, high)
            for left in range(0, columns, wide)
        ]

    def take(self, bits: Bits, rows: slice, columns: slice) -> Bits:
        """A block of a tensor's bits (one dimension, C order) as (rows, columns)."""
        if len(self.shape) < 2:
            return bits.reshape(1, -1)[rows, columns]
        chosen = np.moveaxis(bits.reshape(self.shape), self.axis, 0)[rows]
        return chosen.reshape(len(chosen), -1)[:, columns]

    def restore(self, rows: Bits, dtype: Dtype) -> Tensor:
        """The tensor whose rows these are; shares their memory."""
        first = self.shape[self.axis : self.axis + 1]
        others = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        flat = to_tensor(rows.reshape(-1), dtype)
        return flat.reshape(first + others).movedim(0, self.axis) if self.shape else flat[0]


@dataclass(frozen=True)
class Codebooks:
    """``value = books[row // rows_per_book, symbol]``.

    Attributes:
        books: ``(books, k)`` bits, each book by falling count of its own members.
        rows_per_book: at least the number of rows where the tensor has one book.
    """

    books: Bits
    rows_per_book: int

    @property
    def n_symbols(self) -> int:
        """Entries of a book."""
        return int(self.books.shape[1])

    def width(self) -> int:
        """Table entries that a row needs."""
        return 1

    def symbols(self, block: Bits, rows: slice) -> Symbols:
        """Which entry each value of a block is."""
        found = np.empty(block.shape, np.int32)
        step, row = self.rows_per_book, rows.start
        while row < rows.stop:
            end = min(row // step * step + step, rows.stop)
            part = slice(row - rows.start, end - rows.start)
            found[part] = _positions(self.books[row // step], block[part])
            row = end
        return found

    def values(self, symbols: Symbols, rows: slice) -> Bits:
        """The reverse of `symbols`."""
        book = np.arange(rows.start, rows.stop) // self.rows_per_book
        found: Bits = self.books[book[:, None], symbols]
        return found


@dataclass(frozen=True)
class Codes:
    """``value = scales[row // rows_per_scale] * codes[symbol]``, multiplied in the tensor's dtype.

    Attributes:
        codes: ``(k,)`` int8 by falling count.
        scales: ``(scales,)`` bits of ``dtype``.
        rows_per_scale: at least the number of rows where the tensor has one scale.
    """

    codes: npt.NDArray[np.int8]
    scales: Bits
    dtype: Dtype
    rows_per_scale: int = 1

    @property
    def n_symbols(self) -> int:
        """Codes."""
        return len(self.codes)

    def of_rows(self, rows: slice) -> Bits:
        """The scale of each row, ``(rows, 1)``."""
        found: Bits = self.scales[np.arange(rows.start, rows.stop) // self.rows_per_scale, None]
        return found

    def width(self) -> int:
        """Table entries that a row needs."""
        return len(self.codes)

    def symbols(self, block: Bits, rows: slice) -> Symbols:
        """Which code each value of a block has."""
        of_code = np.zeros(256, np.int32)
        of_code[self.codes.astype(np.int64) + 128] = np.arange(len(self.codes))
        codes = nearest_codes(block, self.of_rows(rows), self.dtype)
        return of_code[codes + 128]

    def values(self, symbols: Symbols, rows: slice) -> Bits:
        """The reverse of `symbols`."""
        table = products(self.of_rows(rows), self.codes[None], self.dtype)
        return table[np.arange(len(table))[:, None], symbols]


@dataclass(frozen=True)
class Sparse:
    """Zeros by symbol, everything else as it is.

    Attributes:
        meanings: ``(k,)`` int8 by falling count: 0 zero, -1 negative zero, 1 the next literal.
        n_literals: how many values are stored as they are.
    """

    meanings: npt.NDArray[np.int8]
    n_literals: int
    dtype: Dtype

    @property
    def n_symbols(self) -> int:
        """Meanings."""
        return len(self.meanings)

    def width(self) -> int:
        """Table entries that a row needs."""
        return 1

    def symbols(self, block: Bits, rows: slice) -> Symbols:
        """Which kind each value of a block is."""
        negative_zero = self.dtype.bits.type(1 << 8 * self.dtype.unit - 1)
        meant = np.where(block == 0, 1, np.where(block == negative_zero, 0, 2))
        of_meaning = np.zeros(3, np.int32)
        of_meaning[self.meanings.astype(np.int64) + 1] = np.arange(len(self.meanings))
        return of_meaning[meant]


Coding: TypeAlias = Codebooks | Codes | Sparse


def symbols_of(coding: Coding, bits: Bits, layout: Layout) -> npt.NDArray[np.unsignedinteger[Any]]:
    """A tensor's symbols, ``(rows, columns)``, in as few bytes each as they need."""
    width = np.min_scalar_type(max(0, coding.n_symbols - 1))
    found = np.empty((layout.n_rows, layout.n_columns), width)
    for rows, columns in layout.blocks(coding.width()):
        found[rows, columns] = coding.symbols(layout.take(bits, rows, columns), rows)
    return found


def encode_rows(
    coding: Coding,
    symbols: npt.NDArray[np.unsignedinteger[Any]],
    contexts: Contexts,
    classes: Classes,
    layout: Layout,
) -> npt.NDArray[np.uint32]:
    """The entropy-coded symbols of a tensor behind their classes, as 32-bit words."""

    def parts() -> Iterator[tuple[Symbols, Any]]:
        models = [model_of(table) for table in contexts.frequencies()]
        for rows, columns in reversed(layout.blocks(coding.width())):
            flat = symbols[rows, columns].reshape(-1)
            for number, places in reversed([*contexts.groups(classes, rows, columns)]):
                yield flat[places].astype(np.int32), models[number]
        for of, drops in (
            (classes.columns, contexts.column_drops),
            (classes.rows, contexts.row_drops),
        ):
            yield of.astype(np.int32), model_of(frequencies(drops))

    return encode(parts())


def literals(bits: Bits, dtype: Dtype, layout: Layout) -> Iterator[Bits]:
    """What a sparse tensor stores as it is, block by block in order."""
    negative_zero = dtype.bits.type(1 << 8 * dtype.unit - 1)
    for rows, columns in layout.blocks():
        block = layout.take(bits, rows, columns)
        yield block[(block != 0) & (block != negative_zero)]


def decode_rows(
    coding: Coding,
    contexts: Contexts,
    words: npt.NDArray[np.uint32],
    stored: Bits,
    layout: Layout,
) -> Iterator[tuple[slice, slice, Bits]]:
    """Decode a tensor block by block: rows, columns and bits of each.

    Args:
        coding: as its header says.
        contexts: as well.
        words: its coded symbols.
        stored: its literals; empty unless sparse.
        layout: the tensor's.

    Raises:
        ValueError: the message does not end with the last element, or literals are left or lack.
    """
    decoder, used = Decoder(words), 0
    classes = Classes(
        *(
            decoder.take(n, model_of(frequencies(drops))).astype(np.uint8)
            for n, drops in (
                (layout.n_rows, contexts.row_drops),
                (layout.n_columns, contexts.column_drops),
            )
        )
    )
    models = [model_of(table) for table in contexts.frequencies()]
    for rows, columns in layout.blocks(coding.width()):
        shape = rows.stop - rows.start, columns.stop - columns.start
        symbols = np.empty(math.prod(shape), np.int32)
        for number, places in contexts.groups(classes, rows, columns):
            symbols[places] = decoder.take(len(symbols[places]), models[number])
        symbols = symbols.reshape(shape)
        if not isinstance(coding, Sparse):
            yield rows, columns, coding.values(symbols, rows)
            continue
        meanings = coding.meanings[symbols]
        values = np.zeros(shape, coding.dtype.bits)
        values[meanings < 0] = 1 << 8 * coding.dtype.unit - 1
        is_literal = meanings > 0
        n_here = int(is_literal.sum())
        if used + n_here > len(stored):
            raise ValueError(f"it refers to more than its {len(stored)} literals")
        values[is_literal] = stored[used : used + n_here]
        used += n_here
        yield rows, columns, values
    if used != len(stored):
        raise ValueError(f"it refers to {used} of its {len(stored)} literals")
    decoder.finish()


def products(scales: Bits, codes: npt.NDArray[np.signedinteger[Any]], dtype: Dtype) -> Bits:
    """Bits of ``scale * code``, rounded once to the dtype (nearest, ties to even)."""
    values = to_tensor(scales, dtype) * torch.from_numpy(codes).to(dtype.torch)
    return to_bits(values).reshape(values.shape)


def nearest_codes(bits: Bits, scales: Bits, dtype: Dtype) -> Integers:
    """The integers in [-127, 127] nearest to ``value / scale``."""
    values, by = to_tensor(bits, dtype), to_tensor(scales, dtype)
    if dtype.name in ("float16", "bfloat16"):
        values, by = values.float(), by.float()
    codes = torch.nan_to_num(values / by).round_().clamp_(-127, 127)
    found: Integers = codes.long().numpy()
    return found


def _positions(book: Bits, block: Bits) -> Symbols:
    """Where each value stands in a book; every value does."""
    order = np.argsort(book, kind="stable")
    found = np.searchsorted(book[order], block)
    positions: Symbols = order.astype(np.int32)[found]
    return positions
