"""Headers as files of version 1 have them, one in front of each tensor: only ever read."""

from __future__ import annotations

import struct

import numpy as np

from torchclust.packing.coding import Codebooks, Codes, Coding, Layout, Sparse
from torchclust.packing.contexts import Contexts
from torchclust.packing.cursor import Cursor
from torchclust.packing.dtypes import Bits, Dtype
from torchclust.packing.entropy import read_drops
from torchclust.packing.header import KINDS, Header, check_coded, checked, described, require
from torchclust.packing.planes import inflated, join
from torchclust.packing.sections import PackedFileError

_SPLIT = len(KINDS)  # the number of a codebook whose highest bytes are deflated


def read_header(encoded: bytes, what: str) -> Header:
    """Read one.

    Raises:
        PackedFileError: ``what`` (the header's place) is malformed, and how.
    """
    try:
        return _read_header(Cursor(encoded))
    except (ValueError, struct.error) as error:
        raise PackedFileError(f"{what} is malformed: {error}") from None


def _read_header(cursor: Cursor) -> Header:
    kind, number, n_dims, axis, n_names = cursor.unpack("<BBBBH")
    shape = cursor.unpack(f"<{n_dims}I")
    names = tuple(cursor.take(*cursor.unpack("<H")).decode() for _ in range(n_names))
    layout, dtype = described(kind, _SPLIT, number, shape, axis, names)
    if kind == KINDS.index("raw"):
        require(axis == 0, f"channel dimension {axis} of raw data")
        require(cursor.left == 0, f"{cursor.left} bytes too many")
        return Header(names, dtype, layout)
    entropy_bits, zeros, last_symbol = cursor.unpack("<dQH")
    k = last_symbol + 1
    check_coded(layout, dtype, entropy_bits, zeros)
    coding = checked(_read_coding(cursor, kind, dtype, layout, k), layout, dtype)
    drops, length = read_drops(cursor.ahead(), k)
    require(length == cursor.left, f"frequency table: it is not one of {k} symbols")
    contexts = Contexts.of_version_1(drops)
    return Header(names, dtype, layout, coding, contexts, entropy_bits, zeros)


def _read_coding(cursor: Cursor, kind: int, dtype: Dtype, layout: Layout, k: int) -> Coding:
    if kind in (KINDS.index("codebook"), _SPLIT):
        (rows_per_book,) = cursor.unpack("<I")
        require(rows_per_book > 0, "codebooks for 0 rows each")
        n_books = -(-layout.n_rows // rows_per_book)
        n = n_books * k
        books = _split(cursor, n, dtype) if kind == _SPLIT else cursor.array(n, dtype.bits)
        return Codebooks(books.reshape(n_books, k), rows_per_book)
    if kind == KINDS.index("codes"):
        codes = cursor.array(k, np.dtype(np.int8))
        return Codes(codes, cursor.array(layout.n_rows, dtype.bits), dtype)
    (n_literals,) = cursor.unpack("<Q")
    return Sparse(cursor.array(k, np.dtype(np.int8)), n_literals, dtype)


def _split(cursor: Cursor, n: int, dtype: Dtype) -> Bits:
    require(dtype.unit > 1, "split codebook of single bytes")
    squeezed = cursor.take(*cursor.unpack("<I"))
    rest = cursor.take(n * (dtype.unit - 1))
    top = inflated(squeezed, n)
    require(len(top) == n, f"codebook: it inflates to {len(top)} elements, not {n}")
    return join(top, rest, dtype.bits)
