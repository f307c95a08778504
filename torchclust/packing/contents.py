"""The headers of a packed file, all of them in one section at its end.

Names, shapes and tables deflate well, the more so together; codebooks' and scales' lower bytes do
not, and stand apart. `write_contents` and `read_contents` are each other's reverse, byte by byte;
``docs/packed-format.md`` is their specification. Reading trusts nothing: every length is compared
with what is there before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torchclust.packing.coding import Codebooks, Codes, Coding, Layout, Sparse
from torchclust.packing.contexts import MOST_CLASSES, Contexts
from torchclust.packing.cursor import Cursor, number
from torchclust.packing.dtypes import DTYPES, Bits, Dtype
from torchclust.packing.entropy import MAX_SYMBOLS, Integers, read_drops, write_drops
from torchclust.packing.header import KINDS, Header, check_coded, checked, described, require
from torchclust.packing.planes import deflated, inflated, join, split

_SQUEEZED = len(KINDS)  # the number of a raw tensor that is stored plane by plane
_LARGEST_RATIO = 1040  # DEFLATE makes nothing smaller than by this


class Entry(NamedTuple):
    """A tensor in the table of contents.

    Attributes:
        header: of the tensor.
        length: of its data, in bytes.
        size: what it takes of the contents, in bytes.
    """

    header: Header
    length: int
    size: int


def write_contents(records: Sequence[tuple[Header, int]]) -> bytes:
    """The contents of headers and the lengths of their data."""
    written = [_write(header, length) for header, length in records]
    fields = deflated(b"".join(fields for fields, _ in written))
    return b"".join([number(len(fields)), fields, *(apart for _, apart in written)])


def read_contents(encoded: bytes, n_records: int) -> list[Entry]:
    """The reverse of `write_contents`.

    Raises:
        ValueError: they are malformed, and how.
    """
    apart = Cursor(encoded)
    squeezed = apart.take(apart.number())
    fields = Cursor(inflated(squeezed, _LARGEST_RATIO * len(squeezed)))
    overhead = apart.at
    read, ends, total = [], [0.0], max(1, fields.left)
    for _ in range(n_records):
        before = apart.at
        read.append((*_read(fields, apart), apart.at - before))
        ends.append(overhead * fields.at / total)
    require(not fields.left and not apart.left, f"{fields.left + apart.left} bytes too many")
    shares = np.diff(np.rint(ends)).astype(int).tolist()
    return [
        Entry(header, length, own + share)
        for (header, length, own), share in zip(read, shares, strict=True)
    ]


def _write(header: Header, length: int) -> tuple[bytes, bytes]:
    """One header's fields, and the bytes that stand apart."""
    layout, coding, contexts = header.layout, header.coding, header.contexts
    kind = _SQUEEZED if header.squeezed else KINDS.index(header.kind)
    dtype = DTYPES.index(header.dtype)
    names = [name.encode() for name in header.names]
    fields = [
        bytes([kind, dtype, len(layout.shape), layout.axis]),
        number(len(names)),
        *(number(len(name)) + name for name in names),
        *(number(size) for size in layout.shape),
        number(length),
    ]
    if coding is None or contexts is None:
        return b"".join(fields), b""
    entropy_bytes = round(header.entropy_bits * layout.n_elements / 8)
    fields += [number(header.zeros), number(entropy_bytes), number(coding.n_symbols - 1)]
    apart = b""
    match coding:
        case Codebooks():
            top, apart = split(coding.books)
            fields += [number(coding.rows_per_book), top]
        case Codes():
            top, apart = split(coding.scales)
            fields += [number(coding.rows_per_scale), coding.codes.tobytes(), top]
        case Sparse():
            fields += [number(coding.n_literals), coding.meanings.tobytes()]
    return b"".join([*fields, _write_contexts(contexts)]), apart


def _write_contexts(contexts: Contexts) -> bytes:
    if contexts.n_symbols == 1:
        return b""
    classes = contexts.row_drops, contexts.column_drops
    return b"".join(
        [
            bytes(len(drops) for drops in classes),
            contexts.shares.astype("<u2").tobytes(),
            write_drops(contexts.drops[1:]),
            *(write_drops(drops) for drops in classes),
        ]
    )


def _read(fields: Cursor, apart: Cursor) -> tuple[Header, int]:
    kind, kind_of_element, n_dims, axis = fields.take(4)
    names = tuple(fields.take(fields.number()).decode() for _ in range(fields.number()))
    shape = tuple(fields.number() for _ in range(n_dims))
    length = fields.number()
    layout, dtype = described(kind, _SQUEEZED, kind_of_element, shape, axis, names)
    if kind in (KINDS.index("raw"), _SQUEEZED):
        require(axis == 0, f"channel dimension {axis} of raw data")
        return Header(names, dtype, layout, squeezed=kind == _SQUEEZED), length
    zeros, entropy_bytes, k = fields.number(), fields.number(), fields.number() + 1
    require(k <= MAX_SYMBOLS, f"{k} symbols")
    entropy_bits = 8 * entropy_bytes / max(1, layout.n_elements)
    check_coded(layout, dtype, entropy_bits, zeros)
    coding = checked(_read_coding(fields, apart, KINDS[kind], layout, dtype, k), layout, dtype)
    contexts = _read_contexts(fields, layout, k)
    return Header(names, dtype, layout, coding, contexts, entropy_bits, zeros), length


def _read_coding(
    fields: Cursor, apart: Cursor, kind: str, layout: Layout, dtype: Dtype, k: int
) -> Coding:
    if kind == "sparse":
        n_literals = fields.number()
        return Sparse(fields.array(k, np.dtype(np.int8)), n_literals, dtype)
    rows_each = fields.number()
    require(rows_each > 0, f"{kind} for 0 rows each")
    n = -(-layout.n_rows // rows_each)
    if kind == "codes":
        codes = fields.array(k, np.dtype(np.int8))
        return Codes(codes, _elements(fields, apart, n, dtype), dtype, rows_each)
    return Codebooks(_elements(fields, apart, n * k, dtype).reshape(n, k), rows_each)


def _elements(fields: Cursor, apart: Cursor, n: int, dtype: Dtype) -> Bits:
    top = fields.take(n)
    return join(top, apart.take(n * (dtype.unit - 1)), dtype.bits)


def _read_contexts(fields: Cursor, layout: Layout, k: int) -> Contexts:
    one = np.zeros(1, np.int64)
    if k == 1:
        return Contexts(one, np.zeros((1, 1), np.int64), one, one)
    n_classes = fields.take(2)
    for n, lines in zip(n_classes, (layout.n_rows, layout.n_columns), strict=True):
        require(1 <= n <= min(lines, MOST_CLASSES), f"{n} classes of {lines} lines")
    shares = fields.array(n_classes[0] * n_classes[1], np.dtype("<u2")).astype(np.int64)
    drops, rows, columns = (_read_drops(fields, n) for n in (k - 1, *n_classes))
    return Contexts(np.concatenate([one, drops]), shares.reshape(*n_classes), rows, columns)


def _read_drops(fields: Cursor, n: int) -> Integers:
    drops, length = read_drops(fields.ahead(), n)
    fields.take(length)
    return drops
