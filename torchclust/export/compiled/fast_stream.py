"""The fast weight format of the Ethos-U85, from bytes to integers.

A header of 256 bits, then every value in 2 or 4 bits, as an index into a table of at most 4 or 16
values in order of appearance, or in 8 bits as it is. The length is not in it; zeros fill the last
256 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.graph import Array

_HEADER, _RESERVED = 32, slice(2, 104)
_ENTRIES, _ENTRY_BITS = 16, 9


@dataclass(frozen=True)
class FastStream:
    """A stream's integers, its table's size (0: values as they are), and what is no index."""

    values: Array
    palette: int
    header_bits: int
    tail_bits: int
    run_zeros: int = 0


def decode_fast(data: bytes, count: int) -> FastStream:
    """Decode one stream of `count` values.

    Raises:
        CompiledFileError: the stream is damaged.
    """
    content = np.frombuffer(data, np.uint8)
    head = np.unpackbits(content[:_HEADER], bitorder="little")
    if len(data) < _HEADER:
        raise CompiledFileError("a fast weight stream is damaged: it ends in its header")
    raw, small = bool(head[0]), bool(head[1])
    bits = 8 if raw else 2 if small else 4
    used = -(-count * bits // 8)
    if len(data) != _HEADER + -(-used // _HEADER) * _HEADER:
        raise CompiledFileError(f"a fast weight stream is damaged: {count:,} values fill it not")
    digits = np.unpackbits(content[_HEADER:], bitorder="little")
    codes = _numbers(digits[: count * bits], bits)
    table = _numbers(head[-_ENTRIES * _ENTRY_BITS :], _ENTRY_BITS)
    shift = int(np.uint8(_numbers(head[104:112], 8)[0]).view(np.int8))
    values = (codes.astype(np.uint8).view(np.int8) - shift) if raw else _unfold(table)[codes]
    if (
        digits[count * bits :].any()
        or head[_RESERVED].any()
        or (raw and small)
        or (shift and not raw)
        or not np.array_equal(table, _table(values))
    ):
        raise CompiledFileError("a fast weight stream is damaged: its table is not of its values")
    distinct = len(np.unique(values))
    tail = len(digits) - count * bits
    return FastStream(values.astype(np.int16), 0 if raw else distinct, 8 * _HEADER, tail)


def _numbers(digits: Array, bits: int) -> Array:
    return digits.reshape(-1, bits).astype(np.int64) @ (1 << np.arange(bits))


def _unfold(folded: Array) -> Array:
    return np.where(folded & 1, -(folded >> 1), folded >> 1)


def _table(values: Array) -> Array:
    """The first sixteen distinct values, the sign folded into the lowest bit; zeros fill up."""
    distinct, first = np.unique(values, return_index=True)
    order = distinct[np.argsort(first)][:_ENTRIES].astype(np.int64)
    return np.pad(np.abs(order) * 2 + (order < 0), (0, _ENTRIES - len(order)))
