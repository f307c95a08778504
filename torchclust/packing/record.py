"""A packed file's records: for each tensor a header, and data that the header explains.

`write_header` and `read_header` are each other's reverse, byte by byte; ``docs/packed-format.md``
is their specification. Reading trusts nothing: every length is compared with what is there before
anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from torchclust.packing.books import join, split
from torchclust.packing.coding import Codebooks, Codes, Coding, Layout, Sparse, decode_rows
from torchclust.packing.dtypes import DTYPES, Bits, Dtype
from torchclust.packing.entropy import MAX_SYMBOLS, read_drops, write_drops
from torchclust.packing.sections import PackedFileError, Section, SectionReader

KINDS = ("raw", "codebook", "codes", "sparse")
_SPLIT = len(KINDS)  # the number of a codebook whose highest bytes are deflated


@dataclass(frozen=True)
class Header:
    """What a record says of its tensor.

    Attributes:
        names: under which the tensor stands in the state dict; several where it is tied.
        dtype: its element type.
        layout: its shape and channel dimension.
        coding: how it is coded; None for raw.
        entropy_bits: of its symbols, per element; for reports only, as `zeros` is.
        zeros: elements that are zero.
    """

    names: tuple[str, ...]
    dtype: Dtype
    layout: Layout
    coding: Coding | None = None
    entropy_bits: float = 0.0
    zeros: int = 0

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        kinds = {Codebooks: "codebook", Codes: "codes", Sparse: "sparse"}
        return "raw" if self.coding is None else kinds[type(self.coding)]

    @property
    def n_symbols(self) -> int | None:
        """Entries of a codebook; None for raw."""
        return None if self.coding is None else len(self.coding.drops)

    @property
    def saved_bytes(self) -> int:
        """What a codebook takes less in the file than its elements have bytes."""
        if not isinstance(self.coding, Codebooks) or self.dtype.unit == 1:
            return 0
        top, rest = split(self.coding.books)
        return max(0, self.coding.books.nbytes - 4 - len(top) - len(rest))

    @property
    def side_bytes(self) -> int:
        """Codebooks, codes and scales; of a sparse tensor its literals."""
        match self.coding:
            case Codebooks(books=books):
                return books.nbytes
            case Codes(codes=codes, scales=scales):
                return codes.nbytes + scales.nbytes
            case Sparse(n_literals=n):
                return n * self.dtype.unit
            case None:
                return 0


@dataclass(frozen=True)
class Record:
    """One tensor's place in a file: its header, read, and its data, not yet."""

    header: Header
    data: Section
    size: int

    def blocks(self, file: BinaryIO) -> Iterator[tuple[slice, slice, Bits]]:
        """Decode the data block by block, all in order; the checksum is compared before the first.

        A raw tensor comes as one row, its checksum compared after the last block. Only what was
        read to the end may be used.

        Raises:
            PackedFileError: naming the tensor.
        """
        header, what = self.header, f"the data of {self.header.names[0]!r}"
        stored = header.dtype.bits.newbyteorder("<")
        if header.coding is None:
            at = 0
            for chunk in self.data.chunks(file, what):
                bits = np.frombuffer(chunk, stored).astype(header.dtype.bits)
                yield slice(0, 1), slice(at, at + len(bits)), _checked(bits, header, what)[None]
                at += len(bits)
            return
        data = self.data.read(file, what)
        n_stored = header.coding.n_literals if isinstance(header.coding, Sparse) else 0
        split = n_stored * header.dtype.unit
        if split > len(data) or (len(data) - split) % 4:
            raise PackedFileError(f"{what} has {len(data)} bytes, which its header does not allow")
        literals = np.frombuffer(data[:split], stored).astype(header.dtype.bits)
        words = np.frombuffer(data[split:], "<u4").astype(np.uint32)
        try:
            for rows, columns, bits in decode_rows(header.coding, words, literals, header.layout):
                yield rows, columns, _checked(bits, header, what)
        except ValueError as error:
            raise PackedFileError(f"{what}: {error}") from None


def read_records(file: BinaryIO) -> list[Record]:
    """Read all headers of a file and where their data is, without reading that.

    Raises:
        PackedFileError: whatever is wrong with the file, but for its data.
    """
    reader = SectionReader(file)
    records: list[Record] = []
    names: set[str] = set()
    for number in range(1, reader.n_records + 1):
        what = f"the header of record {number} of {reader.n_records}"
        section = reader.next(what)
        header = read_header(section.read(file, what), what)
        data = reader.next(f"the data of {header.names[0]!r}")
        if header.coding is None and data.length != header.layout.n_elements * header.dtype.size:
            raise PackedFileError(f"{what} declares another length than its data have")
        if names & set(header.names):
            raise PackedFileError(f"it holds {sorted(names & set(header.names))[0]!r} twice")
        names |= set(header.names)
        records.append(Record(header, data, section.size + data.size))
    reader.finish()
    return records


def write_header(header: Header) -> bytes:
    """A header's bytes."""
    layout, coding = header.layout, header.coding
    kind = _SPLIT if header.saved_bytes else KINDS.index(header.kind)
    dtype = DTYPES.index(header.dtype)
    names = [name.encode() for name in header.names]
    parts = [
        struct.pack("<BBBBH", kind, dtype, len(layout.shape), layout.axis, len(names)),
        struct.pack(f"<{len(layout.shape)}I", *layout.shape),
        *(struct.pack("<H", len(name)) + name for name in names),
    ]
    if coding is not None:
        parts.append(struct.pack("<dQH", header.entropy_bits, header.zeros, len(coding.drops) - 1))
    stored = header.dtype.bits.newbyteorder("<")
    match coding:
        case Codebooks():
            parts.append(struct.pack("<I", coding.rows_per_book))
            if kind == _SPLIT:
                top, rest = split(coding.books)
                parts += [struct.pack("<I", len(top)), top, rest]
            else:
                parts.append(coding.books.astype(stored).tobytes())
        case Codes():
            parts += [coding.codes.tobytes(), coding.scales.astype(stored).tobytes()]
        case Sparse():
            parts += [struct.pack("<Q", coding.n_literals), coding.meanings.tobytes()]
        case None:
            return b"".join(parts)
    return b"".join([*parts, write_drops(coding.drops)])


def read_header(encoded: bytes, what: str) -> Header:
    """The reverse of `write_header`.

    Raises:
        PackedFileError: ``what`` (the header's place) is malformed, and how.
    """
    try:
        return _read_header(_Cursor(encoded))
    except (ValueError, struct.error) as error:
        raise PackedFileError(f"{what} is malformed: {error}") from None


def _read_header(cursor: _Cursor) -> Header:
    kind, number, n_dims, axis, n_names = cursor.unpack("<BBBBH")
    shape = cursor.unpack(f"<{n_dims}I")
    names = tuple(cursor.take(*cursor.unpack("<H")).decode() for _ in range(n_names))
    _require(kind <= _SPLIT, f"kind {kind}")
    _require(number < len(DTYPES), f"element type {number}")
    _require(axis < max(1, n_dims), f"channel dimension {axis} of {n_dims}")
    _require(0 < len(names) == len(set(names)), "names")
    layout, dtype = Layout(shape, axis), DTYPES[number]
    if kind == KINDS.index("raw"):
        _require(axis == 0, f"channel dimension {axis} of raw data")
        _require(cursor.left == 0, f"{cursor.left} bytes too many")
        return Header(names, dtype, layout)
    entropy_bits, zeros, last_symbol = cursor.unpack("<dQH")
    _require(layout.n_elements > 0 and dtype.units == 1, "a coded tensor of no or complex elements")
    _require(0 <= entropy_bits <= 8 * dtype.size and zeros <= layout.n_elements, "statistics")
    coding = _read_coding(cursor, kind, dtype, layout, last_symbol + 1)
    return Header(names, dtype, layout, coding, entropy_bits, zeros)


def _read_coding(cursor: _Cursor, kind: int, dtype: Dtype, layout: Layout, k: int) -> Coding:
    if kind in (KINDS.index("codebook"), _SPLIT):
        (rows_per_book,) = cursor.unpack("<I")
        _require(rows_per_book > 0, "codebooks for 0 rows each")
        n_books = -(-layout.n_rows // rows_per_book)
        read = cursor.split_array if kind == _SPLIT else cursor.array
        books = read(n_books * k, dtype.bits).reshape(n_books, k)
        return Codebooks(read_drops(cursor.rest(), k), books, rows_per_book)
    if kind == KINDS.index("codes"):
        codes = cursor.array(k, np.dtype(np.int8))
        scales = cursor.array(layout.n_rows, dtype.bits)
        _require(dtype.is_scalable and len(set(codes.tolist())) == k, "codes")
        _require(-128 not in codes, "code -128")
        return Codes(read_drops(cursor.rest(), k), codes, scales, dtype)
    (n_literals,) = cursor.unpack("<Q")
    meanings = cursor.array(k, np.dtype(np.int8))
    _require({*meanings.tolist()} <= {-1, 0, 1} and len(set(meanings.tolist())) == k, "meanings")
    _require(n_literals <= layout.n_elements and dtype.is_scalable, "literals")
    return Sparse(read_drops(cursor.rest(), k), meanings, n_literals, dtype)


class _Cursor:
    """Reads on in bytes, and never beyond them."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded, self._at = encoded, 0

    @property
    def left(self) -> int:
        return len(self._encoded) - self._at

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise ValueError(f"{length} bytes expected, {self.left} left")
        self._at += length
        return self._encoded[self._at - length : self._at]

    def rest(self) -> bytes:
        return self.take(self.left)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def array(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        taken = self.take(length * dtype.itemsize)
        return np.frombuffer(taken, dtype.newbyteorder("<")).astype(dtype)

    def split_array(self, length: int, dtype: np.dtype[Any]) -> Bits:
        _require(dtype.itemsize > 1, "split codebook of single bytes")
        top = self.take(*self.unpack("<I"))
        return join(top, self.take(length * (dtype.itemsize - 1)), dtype)


def _checked(bits: Bits, header: Header, what: str) -> Bits:
    if header.dtype.name == "bool" and bits.size and bits.max() > 1:
        raise PackedFileError(f"{what} is bool and holds {bits.max()}")
    return bits


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"invalid {what}")


assert MAX_SYMBOLS == 1 << 16  # the symbols' number less one is stored in 16 bits
