"""The Ethos-U's compressed weights ("mlw", the slow format of the U85), from bytes to integers.

A stream is a row of slices, each with a header, some with a palette, and then indices into it in
Golomb-Rice code: a unary quotient, and a remainder of a fixed number of bits. Where zeros are many,
the lengths of their runs are coded in between in the same way. Both come in chunks, the unary parts
of twelve symbols and after them the remainders of the chunk before, so that hardware can fetch
ahead. Finding where chunks begin is sequential by nature, and all that the loop in `_chunks` does;
what stands in them is read for all chunks of a slice at once.

The format is that of Vela's encoder, and its decoder is what the tests compare with. Bits that a
decoder passes over must be as the encoder leaves them, so that a flipped one is found although it
would do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.graph import Array

_NO_ZERO_RUNS, _END = 6, 7  # in the field that else holds the zero runs' divisor
_UNCOMPRESSED = 7
_LARGEST = 512  # a value is a sign and eight bits, an index no longer than that
_AHEAD = 8  # weights may be this far ahead of zero runs, then they wait
_SYMBOLS = 12
_ONES = bytes(number.bit_count() for number in range(1 << _SYMBOLS))


@dataclass(frozen=True)
class WeightStream:
    """A stream's integers, and where its bits went.

    Attributes:
        values: int16, as the hardware reads them, padding included.
        palette: entries of the largest palette; 0 where there is none.
        run_zeros: how many of the values are zeros in runs, outside of the palette.
        header_bits: slice headers and palettes.
        zero_bits: lengths of zero runs.
        index_bits: indices.
        tail_bits: the end mark and what fills the last 16 bytes.
    """

    values: Array
    palette: int
    run_zeros: int
    header_bits: int
    zero_bits: int
    index_bits: int
    tail_bits: int


@dataclass(frozen=True)
class _Palette:
    """Folded values by index; an index past the last goes on counting from ``offset``."""

    values: tuple[int, ...]
    bits: int
    offset: int


@dataclass(frozen=True)
class _Slice:
    """What a slice's header says; its first chunk begins at bit ``end``."""

    count: int
    zero_divisor: int | None
    divisor: int
    truncated: bool
    uncompressed: bool
    palette: _Palette
    new_palette: bool
    end: int


@dataclass(frozen=True)
class _Chunks:
    """By chunk: unary bits, how many symbols end in it, at which bit their remainders begin."""

    first: list[int]
    second: list[int]
    weights: list[int]
    weight_rests: list[int]
    unary: list[int]
    runs: list[int]
    run_rests: list[int]
    end: int


def decode_weights(data: bytes, limit: int) -> WeightStream:
    """Decode one stream.

    Args:
        data: the whole stream, with the end mark.
        limit: more values than this are an error, raised before memory is taken for them.

    Raises:
        CompiledFileError: the stream is damaged.
    """
    end, at, found, zeros, zero_bits, header_bits, largest = 8 * len(data), 0, 0, 0, 0, 0, 0
    padded, palette, parts = data + bytes(8), None, [np.empty(0, np.int16)]
    used = np.zeros(_LARGEST, np.int64)
    while (header := _header(padded, at, end, palette)) is not None:
        if header.new_palette:
            _check_palette(palette, used)
            used[:] = 0
        palette = header.palette
        chunks = _chunks(padded, header, end)
        folded, runs = _folded(padded, header, chunks), _zero_runs(padded, header, chunks)
        used += np.bincount(folded, minlength=_LARGEST)
        found += header.count + int(runs.sum())
        if found > limit:
            raise CompiledFileError(f"a weight stream holds more than the {limit:,} values it may")
        parts.append(_with_zeros(_unfold(folded), runs, header.new_palette))
        zeros += int(runs.sum())
        zero_bits += _run_bits(header, chunks)
        header_bits += header.end - at
        largest = max(largest, len(palette.values))
        at = chunks.end
    _check_palette(palette, used)
    _check_tail(data, at)
    index_bits = at - header_bits - zero_bits
    return WeightStream(
        np.concatenate(parts), largest, zeros, header_bits, zero_bits, index_bits, end - at
    )


def _field(data: bytes, at: int, bits: int) -> int:
    """An unsigned number of at most 57 bits, the least significant first."""
    window = int.from_bytes(data[at >> 3 : (at >> 3) + 8], "little")
    return window >> (at & 7) & ((1 << bits) - 1)


def _header(data: bytes, at: int, end: int, palette: _Palette | None) -> _Slice | None:
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
    return _Slice(
        count=_field(data, at + 3, 15) + 1,
        zero_divisor=None if zero_divisor == _NO_ZERO_RUNS else zero_divisor,
        divisor=divisor,
        truncated=bool(_field(data, at + 21, 1)),
        uncompressed=uncompressed,
        palette=palette,
        new_palette=new_palette,
        end=after,
    )


def _palette(data: bytes, at: int) -> tuple[_Palette, int]:
    offset, last, bits = _field(data, at, 5), _field(data, at + 5, 5), _field(data, at + 10, 3) + 2
    at, size = at + 13, last + 1 if last else 0
    values = tuple(_field(data, at + i * bits, bits) for i in range(size))
    return _Palette(values, bits, offset), at + size * bits


def _chunks(data: bytes, header: _Slice, end: int) -> _Chunks:
    """Find a slice's chunks."""
    first, second, weights, weight_rests = [], [], [], []  # type: tuple[list[int], ...]
    unary, runs, run_rests = [], [], []
    at, count, divisor, truncated = header.end, header.count, header.divisor, header.truncated
    coded, whole = not header.uncompressed, 8 if header.uncompressed and divisor > 5 else _SYMBOLS
    run_count, run_divisor, run_whole = _run_layout(header)
    weights_done = runs_done = 0
    new_weights = new_runs = -1  # -1: the chunk before had none of this kind
    while True:
        behind = weights_done - runs_done
        waiting_weights, waiting_runs, new_weights, new_runs = new_weights, new_runs, -1, -1
        takes_weights = weights_done < count and (behind < _AHEAD or not run_count)
        window = int.from_bytes(data[at >> 3 : (at >> 3) + 8], "little") >> (at & 7)
        if takes_weights and coded:
            first.append(window & 0xFFF)
            window, at = window >> _SYMBOLS, at + _SYMBOLS
        if runs_done < run_count and behind >= 0:
            unary.append(window & ((1 << run_whole) - 1))
            window, at = window >> run_whole, at + run_whole
            new_runs = min(run_whole - _ONES[unary[-1]], run_count - runs_done)
            runs_done += new_runs
            runs.append(new_runs)
        if takes_weights:
            new_weights = whole
            if coded:
                ones = _ONES[first[-1]]
                second.append(window & ((1 << ones) - 1))
                at += ones
                new_weights -= 0 if truncated else _ONES[second[-1]]
            new_weights = min(new_weights, count - weights_done)
            weights_done += new_weights
            weights.append(new_weights)
        if waiting_weights >= 0:
            weight_rests.append(at)
            at += waiting_weights * divisor
        if waiting_runs >= 0:
            run_rests.append(at)
            at += waiting_runs * run_divisor
        if at > end:
            raise CompiledFileError("a weight stream is damaged: it ends in the middle of a slice")
        if new_weights < 0 and new_runs < 0:
            return _Chunks(first, second, weights, weight_rests, unary, runs, run_rests, at)


def _run_layout(header: _Slice) -> tuple[int, int, int]:
    """How many zero runs a slice codes, their divisor, and how many a chunk has room for."""
    if header.zero_divisor is None:
        return 0, 0, 0
    room = _SYMBOLS if header.zero_divisor < 3 else 8
    return header.count + header.new_palette, header.zero_divisor, room


def _run_bits(header: _Slice, chunks: _Chunks) -> int:
    count, divisor, room = _run_layout(header)
    return len(chunks.unary) * room + count * divisor


def _folded(data: bytes, header: _Slice, chunks: _Chunks) -> Array:
    """A slice's weights but for its zero runs, the sign folded into the lowest bit."""
    quotients = np.zeros(header.count, np.int64)
    if not header.uncompressed:
        first, second = np.array(chunks.first), np.array(chunks.second)
        bits = first[:, None] >> np.arange(_SYMBOLS) & 1
        codes = bits + (bits & second[:, None] >> (np.cumsum(bits, 1) - bits))
        quotients = _sums(codes, (codes < 2) | header.truncated, header.count)
    indices = (quotients << header.divisor) + _remainders(
        data, chunks.weight_rests, chunks.weights, header.divisor
    )
    palette = header.palette
    size = len(palette.values)
    table = np.array([*palette.values, *range(palette.offset, palette.offset + _LARGEST)])
    if indices.max() >= min(len(table), _LARGEST) or (folded := table[indices]).max() >= _LARGEST:
        raise CompiledFileError(f"a weight stream is damaged: an index past its {size} values")
    return folded


def _zero_runs(data: bytes, header: _Slice, chunks: _Chunks) -> Array:
    """Lengths of the runs of zeros: before the first weight, if the palette is new, and after each."""
    count, divisor, room = _run_layout(header)
    if not count:
        return np.zeros(header.count + header.new_palette, np.int64)
    bits = np.array(chunks.unary)[:, None] >> np.arange(room) & 1
    quotients = _sums(bits, bits == 0, count)
    return (quotients << divisor) + _remainders(data, chunks.run_rests, chunks.runs, divisor)


def _sums(codes: Array, ends: Array, count: int) -> Array:
    """Sums of codes from end to end; what follows the last of `count` ends must be zero."""
    totals = np.cumsum(codes)
    at_ends = totals[ends.ravel()][:count]
    if at_ends[-1] != totals[-1]:
        raise CompiledFileError("a weight stream is damaged: symbols behind a slice's last")
    return np.diff(at_ends, prepend=0)


def _remainders(data: bytes, rests: list[int], counts: list[int], bits: int) -> Array:
    """The numbers of at most nine bits that lie from each bit in `rests` on, `counts` of them."""
    repeats = np.array(counts)
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    at = np.repeat(np.array(rests), repeats) + within * bits
    content = np.frombuffer(data, np.uint8).astype(np.int64)
    byte = at >> 3
    window = content[byte] | content[byte + 1] << 8
    return window >> (at & 7) & ((1 << bits) - 1)


def _unfold(folded: Array) -> Array:
    magnitude = (folded >> 1).astype(np.int16)
    return np.where(folded & 1, -magnitude, magnitude)


def _with_zeros(weights: Array, runs: Array, leads: bool) -> Array:
    """Weights with a run of zeros after each, and one before the first where `leads`."""
    values = np.zeros(len(weights) + int(runs.sum()), np.int16)
    before = np.cumsum(runs) if leads else np.cumsum(runs) - runs
    values[np.arange(len(weights)) + before[: len(weights)]] = weights
    return values


def _check_palette(palette: _Palette | None, used: Array) -> None:
    """What no index reads must be as the encoder derives it from the values that it coded."""
    if palette is None:
        return
    values = np.flatnonzero(used)
    values[values == 1] = 0  # the encoder writes a zero that has no place in the palette as -0
    unread = set(palette.values) - set(values.tolist())
    widest = max(palette.values, default=int(values.max()))
    bits = max(2, widest.bit_length())
    if unread - {0} or palette.bits != bits or palette.offset != min(int(values.min()), 31):
        raise CompiledFileError("a weight stream is damaged: a palette that its values do not need")


def _check_tail(data: bytes, at: int) -> None:
    """From the end mark on, the last 16 bytes are filled with ones."""
    tail = 8 * len(data) - at
    ones = (1 << tail) - 1
    if len(data) % 16 or tail >= 16 * 8 + 3 or int.from_bytes(data, "little") >> at != ones:
        raise CompiledFileError("a weight stream is damaged behind its end mark")
