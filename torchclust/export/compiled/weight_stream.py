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
from torchclust.export.compiled.slice_header import (
    LARGEST,
    NO_VALUE,
    SYMBOLS,
    Slice,
    check_palette,
    read_header,
    run_layout,
    value_table,
)
from torchclust.export.graph import Array

_AHEAD = 8  # weights may be this far ahead of zero runs, then they wait
_ONES = bytes(number.bit_count() for number in range(1 << SYMBOLS))


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
class _Chunks:
    """By chunk: its two unary fields and how many symbols end in it; where its remainders begin.

    The same of zero runs, which have one unary field.
    """

    weights: list[int]
    weight_rests: list[int]
    runs: list[int]
    run_rests: list[int]


@dataclass(frozen=True, eq=False)
class _Part:
    """A slice: its weights, folded, the zero runs after each, and before the first if it ``leads``.

    ``leads`` where the palette is new: a slice that goes on with the last one's has no such run.
    """

    folded: Array
    runs: Array
    leads: bool
    palette: int
    header_bits: int
    zero_bits: int


def decode_weights(data: bytes, limit: int) -> WeightStream:
    """Decode one stream.

    Args:
        data: the whole stream, with the end mark.
        limit: more values than this are an error, raised before memory is taken for them.

    Raises:
        CompiledFileError: the stream is damaged.
    """
    padded, parts, at = data + bytes(8), list[_Part](), 0
    palette, used = None, np.zeros(LARGEST, np.int64)
    while (header := read_header(padded, at, 8 * len(data), palette)) is not None:
        if header.new_palette:
            check_palette(palette, used)
            used[:] = 0
        part, at = _part(padded, header, 8 * len(data), at)
        used += np.bincount(part.folded, minlength=LARGEST)
        if len(part.folded) + int(part.runs.sum()) > limit:
            raise CompiledFileError("a weight stream is damaged: it holds more values than it may")
        limit -= len(part.folded) + int(part.runs.sum())
        parts.append(part)
        palette = header.palette
    check_palette(palette, used)
    _check_tail(data, at)
    headers, zero_bits = sum(p.header_bits for p in parts), sum(p.zero_bits for p in parts)
    return WeightStream(
        values=np.concatenate([np.empty(0, np.int16), *map(_with_zeros, parts)]),
        palette=max((part.palette for part in parts), default=0),
        run_zeros=sum(int(part.runs.sum()) for part in parts),
        header_bits=headers,
        zero_bits=zero_bits,
        index_bits=at - headers - zero_bits,
        tail_bits=8 * len(data) - at,
    )


def _part(data: bytes, header: Slice, end: int, start: int) -> tuple[_Part, int]:
    """A slice from its header on, and the bit after it."""
    chunks, after = _chunks(data, header, end)
    count, divisor, room = run_layout(header)
    return _Part(
        folded=_folded(data, header, chunks),
        runs=_zero_runs(data, header, chunks),
        leads=header.new_palette,
        palette=len(header.palette.values),
        header_bits=header.end - start,
        zero_bits=len(chunks.run_rests) * room + count * divisor,
    ), after


def _chunks(data: bytes, header: Slice, end: int) -> tuple[_Chunks, int]:
    """Find a slice's chunks, and the bit after them."""
    found = _Chunks([], [], [], [])
    weights, runs = found.weights, found.runs
    at, count, divisor, truncated = header.end, header.count, header.divisor, header.truncated
    coded, room = not header.uncompressed, 8 if header.uncompressed and divisor > 5 else SYMBOLS
    run_count, run_divisor, run_room = run_layout(header)
    weights_done = runs_done = 0
    new_weights = new_runs = -1  # how many the chunk before has; -1: it is of the other kind only
    while True:
        behind, first = weights_done - runs_done, 0
        waiting_weights, waiting_runs, new_weights, new_runs = new_weights, new_runs, -1, -1
        takes_weights = weights_done < count and (behind < _AHEAD or not run_count)
        window = int.from_bytes(data[at >> 3 : (at >> 3) + 8], "little") >> (at & 7)
        if takes_weights and coded:
            first, window, at = window & 0xFFF, window >> SYMBOLS, at + SYMBOLS
        if runs_done < run_count and behind >= 0:
            unary, window, at = window & ((1 << run_room) - 1), window >> run_room, at + run_room
            new_runs = min(run_room - _ONES[unary], run_count - runs_done)
            runs_done += new_runs
            runs += unary, new_runs
        if takes_weights:
            second, at = window & ((1 << _ONES[first]) - 1), at + _ONES[first]
            complete = room if truncated else room - _ONES[second]
            new_weights = min(complete, count - weights_done)
            weights_done += new_weights
            weights += first, second, new_weights
        if waiting_weights >= 0:
            found.weight_rests.append(at)
            at += waiting_weights * divisor
        if waiting_runs >= 0:
            found.run_rests.append(at)
            at += waiting_runs * run_divisor
        if at > end:
            raise CompiledFileError("a weight stream is damaged: it ends in the middle of a slice")
        if new_weights < 0 and new_runs < 0:
            return found, at


def _folded(data: bytes, header: Slice, chunks: _Chunks) -> Array:
    """A slice's weights but for its zero runs, the sign folded into the lowest bit."""
    first, second, ends = np.array(chunks.weights).reshape(-1, 3).T
    indices = _remainders(data, chunks.weight_rests, ends, header.divisor)
    if not header.uncompressed:
        bits = first[:, None] >> np.arange(SYMBOLS) & 1
        codes = bits + (bits & second[:, None] >> (np.cumsum(bits, 1) - bits))
        quotients = _sums(codes, (codes < 2) | header.truncated, header.count)
        indices += quotients << header.divisor
    folded: Array = value_table(header.palette)[np.minimum(indices, LARGEST)]
    if folded.min() == NO_VALUE:
        raise CompiledFileError("a weight stream is damaged: an index for which there is no value")
    return folded


def _zero_runs(data: bytes, header: Slice, chunks: _Chunks) -> Array:
    """Lengths of the zero runs, after each weight and, with a new palette, before the first."""
    count, divisor, room = run_layout(header)
    if not count:
        return np.zeros(header.count + header.new_palette, np.int64)
    unary, ends = np.array(chunks.runs).reshape(-1, 2).T
    bits = unary[:, None] >> np.arange(room) & 1
    quotients = _sums(bits, bits == 0, count)
    lengths: Array = _remainders(data, chunks.run_rests, ends, divisor) + (quotients << divisor)
    return lengths


def _sums(codes: Array, ends: Array, count: int) -> Array:
    """Sums of codes from end to end; what follows the last of `count` ends must be zero."""
    totals = np.cumsum(codes)
    at_ends = totals[ends.ravel()][:count]
    if at_ends[-1] != totals[-1]:
        raise CompiledFileError("a weight stream is damaged: symbols behind a slice's last")
    sums: Array = np.diff(at_ends, prepend=0)
    return sums


def _remainders(data: bytes, rests: list[int], counts: Array, bits: int) -> Array:
    """The numbers of at most nine bits that lie from each bit in `rests` on, `counts` of them."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.repeat(np.array(rests), counts) + within * bits
    content, byte = np.frombuffer(data, np.uint8), at >> 3
    window = content[byte].astype(np.int64) | content[byte + 1].astype(np.int64) << 8
    numbers: Array = window >> (at & 7) & ((1 << bits) - 1)
    return numbers


def _with_zeros(part: _Part) -> Array:
    """A slice's values, its runs of zeros among them."""
    magnitude = (part.folded >> 1).astype(np.int16)
    before = np.cumsum(part.runs) if part.leads else np.cumsum(part.runs) - part.runs
    values = np.zeros(len(magnitude) + int(part.runs.sum()), np.int16)
    at = np.arange(len(magnitude)) + before[: len(magnitude)]
    values[at] = np.where(part.folded & 1, -magnitude, magnitude)
    return values


def _check_tail(data: bytes, at: int) -> None:
    """From the end mark on, the last 16 bytes are filled with ones."""
    tail = 8 * len(data) - at
    ones = (1 << tail) - 1
    if len(data) % 16 or tail >= 16 * 8 + 3 or int.from_bytes(data, "little") >> at != ones:
        raise CompiledFileError("a weight stream is damaged behind its end mark")
