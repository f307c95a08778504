"""What stands at the head of a slice of compressed weights: how it is coded, maybe a palette."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.graph import Array

SYMBOLS = 12  # in a chunk
LARGEST = 512  # a value is a sign and eight bits, an index no longer than that
NO_VALUE = -1
_NO_ZERO_RUNS, _END = 6, 7  # in the field that else holds the zero runs' divisor
_UNCOMPRESSED = 7


@dataclass(frozen=True)
class Palette:
    """Folded values by index; an index past the last goes on counting from ``offset``."""

    values: tuple[int, ...]
    bits: int
    offset: int


@dataclass(frozen=True)
class Slice:
    """What a slice's header says; its first chunk begins at bit ``end``."""

    count: int
    zero_divisor: int | None
    divisor: int
    truncated: bool
    uncompressed: bool
    palette: Palette
    new_palette: bool
    end: int


def _field(data: bytes, at: int, bits: int) -> int:
    """An unsigned number of at most 57 bits, the least significant first."""
    window = int.from_bytes(data[at >> 3 : (at >> 3) + 8], "little")
    return window >> (at & 7) & ((1 << bits) - 1)


def read_header(data: bytes, at: int, end: int, palette: Palette | None) -> Slice | None:
    """The header at a bit, or None for the end mark."""
    zero_divisor, divisor = _field(data, at, 3), _field(data, at + 18, 3)
    if zero_divisor == _END and at + 3 <= end:
        return None
    new_palette, after = bool(_field(data, at + 22, 1)), at + 23
    if new_palette:
        palette, after = _palette(data, after)
    if after > end or zero_divisor in (4, 5) or divisor == 6 or palette is None:
        raise CompiledFileError(f"a weight stream is damaged: no slice begins at bit {at:,}")
    uncompressed = divisor == _UNCOMPRESSED
    if uncompressed:
        size = len(palette.values)
        divisor = (size - 1).bit_length() if size else palette.bits
    return Slice(
        count=_field(data, at + 3, 15) + 1,
        zero_divisor=None if zero_divisor == _NO_ZERO_RUNS else zero_divisor,
        divisor=divisor,
        truncated=bool(_field(data, at + 21, 1)),
        uncompressed=uncompressed,
        palette=palette,
        new_palette=new_palette,
        end=after,
    )


def _palette(data: bytes, at: int) -> tuple[Palette, int]:
    offset, last, bits = _field(data, at, 5), _field(data, at + 5, 5), _field(data, at + 10, 3) + 2
    at, size = at + 13, last + 1 if last else 0
    values = tuple(_field(data, at + i * bits, bits) for i in range(size))
    return Palette(values, bits, offset), at + size * bits


def run_layout(header: Slice) -> tuple[int, int, int]:
    """How many zero runs a slice codes, their divisor, and how many a chunk has room for."""
    if header.zero_divisor is None:
        return 0, 0, 0
    room = SYMBOLS if header.zero_divisor < 3 else 8
    return header.count + header.new_palette, header.zero_divisor, room


def value_table(palette: Palette) -> Array:
    """Folded values by index; what has a place in the palette is never coded past it."""
    direct = np.arange(palette.offset, LARGEST)
    direct[np.isin(direct, palette.values)] = NO_VALUE
    table = np.full(LARGEST + 1, NO_VALUE)
    known = np.append(np.array(palette.values, np.int64), direct)[:LARGEST]
    table[: len(known)] = known
    return table


def check_palette(palette: Palette | None, used: Array) -> None:
    """What no index reads must be as the encoder derives it from the values that it coded."""
    if palette is None:
        return
    values = np.flatnonzero(used)
    values[values == 1] = 0  # the encoder writes a zero that has no place in the palette as -0
    unread = set(palette.values) - set(values.tolist())
    distinct = len(set(palette.values)) == len(palette.values)
    widest = max(palette.values, default=int(values.max()))
    bits = max(2, widest.bit_length())
    if (
        unread - {0}
        or not distinct
        or palette.bits != bits
        or palette.offset != min(int(values.min()), 31)
    ):
        raise CompiledFileError("a weight stream is damaged: a palette that its values do not need")
