"""Compressed weights: the values that Vela's own decoder finds, and one error for any damage."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.compiled.fast_stream import decode_fast
from torchclust.export.compiled.scale_stream import decode_scales
from torchclust.export.compiled.weight_stream import decode_weights

mlw_codec = pytest.importorskip("ethosu.mlw_codec")
Array = npt.NDArray[Any]
STREAMS, SECTIONS = 10_000, 6


def weights(rng: np.random.Generator, size: int) -> Array:
    """Numbers that bring out each part of the format, by turns."""
    kind = rng.integers(SECTIONS)
    if kind == 0:  # no palette, uncompressed
        values = rng.integers(-127, 128, size)
    elif kind == 1:  # the palette and values past it
        values = np.round(rng.normal(0, rng.uniform(0.3, 60), size))
    elif kind == 2:  # few values
        values = rng.choice(rng.integers(-255, 256, rng.integers(1, 40)), size)
    elif kind == 3:  # zero runs
        values = rng.choice([0] * 7 + [5, -7], size)
    elif kind == 4:
        values = np.round(rng.normal(0, 20, size)) * (rng.random(size) < rng.uniform(0, 0.3))
    else:  # palettes that change
        few = rng.choice(rng.integers(-100, 100, rng.integers(1, 9)), size)
        values = np.concatenate([few, np.zeros(size // 3), rng.integers(-128, 128, size // 2)])
    return values.clip(-255, 255).astype(np.int16)


def encoded(values: Array) -> bytes:
    return bytes(mlw_codec.encode(values.tolist()))


def test_random_streams_decode_as_vela_decodes_them() -> None:
    rng = np.random.default_rng(0)
    for number in range(STREAMS):
        values = weights(rng, int(rng.integers(1, 2000 if number % 200 == 0 else 60)))
        data = encoded(values)
        stream = decode_weights(data, len(values))
        theirs = mlw_codec.decode(bytearray(data))
        assert stream.values.tolist() == theirs == values.tolist(), number
        bits = stream.header_bits + stream.zero_bits + stream.index_bits + stream.tail_bits
        assert bits == 8 * len(data)


def test_long_streams_of_many_slices() -> None:
    values = np.random.default_rng(1).integers(-7, 8, 100_000).astype(np.int16)
    stream = decode_weights(encoded(values), len(values))
    assert np.array_equal(stream.values, values)
    assert (stream.palette, stream.run_zeros) == (15, 0)
    assert stream.index_bits == pytest.approx(np.log2(15) * len(values), rel=0.05)


def test_zero_runs_and_palettes_are_counted() -> None:
    values = np.zeros(4096, np.int16)
    values[::64] = 3
    stream = decode_weights(encoded(values), len(values))
    assert (stream.run_zeros, stream.palette) == (4096 - 64, 2)
    assert stream.zero_bits > stream.index_bits > 0


@pytest.mark.parametrize("seed", range(4))
def test_damaged_streams_end_in_one_error(seed: int) -> None:
    """Or in other values, never in anything else, nor in more values than were asked for."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        values = weights(rng, int(rng.integers(1, 100)))
        data = bytearray(encoded(values))
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        cut = bytes(data[: rng.integers(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)
        garbage = rng.bytes(int(rng.integers(0, 64)))
        for damaged in (cut, garbage):
            try:
                assert len(decode_weights(damaged, len(values)).values) <= len(values)
            except CompiledFileError:
                continue


_TRUNCATED = 21  # the bit of a slice's header that only matters to quotients of 2 and more


@pytest.mark.parametrize("seed", range(4))
def test_every_flipped_bit_is_found_but_a_flag_that_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([0, *rng.integers(-127, 128, 2 * seed + 1)], 120).astype(np.int16)
    data = encoded(values)
    unseen = []
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        try:
            found = decode_weights(bytes(damaged), len(values)).values
        except CompiledFileError:
            continue
        if np.array_equal(found, values):
            unseen.append(bit)
    assert unseen in ([], [_TRUNCATED])


def header(**fields: int) -> bytes:
    """A slice of one weight with a palette of two, in 16 bytes; fields replace its own."""
    sizes = {"zeros": 3, "count": 15, "divisor": 3, "truncated": 1, "new": 1, "offset": 5}
    sizes |= {"palette": 5, "bits": 3, "first": 2, "second": 2}
    values = {"zeros": 6, "count": 0, "divisor": 0, "truncated": 0, "new": 1, "offset": 2}
    values |= {"palette": 1, "bits": 0, "first": 2, "second": 0} | fields
    number = at = 0
    for name, size in sizes.items():
        number |= values[name] << at
        at += size
    at += 12  # unary: all zero, so an index of 0
    number |= ((1 << (128 - at)) - 1) << at
    return number.to_bytes(16, "little")


def test_a_stream_written_by_hand() -> None:
    assert decode_weights(header(), 1).values.tolist() == [1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no slice begins at bit 0"),
        (header(zeros=4), "no slice begins at bit 0"),
        (header(new=0), "no slice begins at bit 0"),
        (header(count=900), "it ends in the middle of a slice"),
        (header(second=3), "a palette that its values do not need"),
        (header(second=2), "a palette that its values do not need"),
        (header(offset=3), "a palette that its values do not need"),
        (header()[:-1] + b"\x7f", "damaged behind its end mark"),
        (header() + b"\xff" * 16, "damaged behind its end mark"),
    ],
)
def test_what_is_wrong_with_a_stream(data: bytes, message: str) -> None:
    with pytest.raises(CompiledFileError, match=message):
        decode_weights(data, 1)


def test_more_values_than_may_be() -> None:
    with pytest.raises(CompiledFileError, match="it holds more values than it may"):
        decode_weights(encoded(np.zeros(100, np.int16)), 99)


def test_symbols_behind_the_last_and_indices_without_a_value() -> None:
    data = bytearray(encoded(np.array([3], np.int16)))
    found = set()
    for bit in range(23, 8 * len(data)):
        damaged = bytearray(data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        try:
            decode_weights(bytes(damaged), 1)
        except CompiledFileError as error:
            found.add(str(error).removeprefix("a weight stream is damaged: "))
    assert "symbols behind a slice's last" in found
    assert "an index for which there is no value" in found


def fast(values: Array, *, raw: bool = False) -> bytes:
    """The fast format, written bit by bit."""
    order = list(dict.fromkeys(values.tolist()))
    raw = raw or len(order) > 16
    bits = 8 if raw else 2 if len(order) <= 4 else 4
    table = [2 * abs(value) + (value < 0) for value in order[:16]]
    table += [0] * (16 - len(table))
    digits = [int(raw), int(not raw and bits == 2)] + [0] * 110
    for entry in table:
        digits += [entry >> i & 1 for i in range(9)]
    for value in values.tolist():
        code = value & 0xFF if raw else order.index(value)
        digits += [code >> i & 1 for i in range(bits)]
    digits += [0] * (-len(digits) % 256)
    return np.packbits(digits, bitorder="little").tobytes()


@pytest.mark.parametrize(("codes", "palette"), [(3, 3), (4, 4), (15, 15), (16, 16), (31, 0)])
def test_the_fast_format(codes: int, palette: int) -> None:
    rng = np.random.default_rng(codes)
    values = np.append(np.arange(codes) * 5 - 60, rng.choice(np.arange(codes) * 5 - 60, 500))
    data = fast(values)
    stream = decode_fast(data, len(values))
    assert np.array_equal(stream.values, values)
    assert stream.palette == palette
    bits = 8 if not palette else 2 if palette <= 4 else 4
    assert stream.header_bits + stream.tail_bits + bits * len(values) == 8 * len(data)


@pytest.mark.parametrize("codes", [3, 15, 31])
def test_every_flipped_bit_of_the_fast_format_is_found(codes: int) -> None:
    values = np.append(np.arange(codes), np.arange(codes)[::-1])
    data = fast(values)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        try:
            found = decode_fast(bytes(damaged), len(values)).values
        except CompiledFileError:
            continue
        assert not np.array_equal(found, values), bit


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (bytes(31), 1, "it ends in its header"),
        (fast(np.arange(3)), 900, "900 values fill it not"),
        (fast(np.arange(3)) + bytes(32), 3, "3 values fill it not"),
        (b"\3" + fast(np.arange(3))[1:], 3, "its table is not of its values"),
    ],
)
def test_what_is_wrong_with_a_fast_stream(data: bytes, count: int, message: str) -> None:
    with pytest.raises(CompiledFileError, match=message):
        decode_fast(data, count)


def scales(*channels: tuple[int, int, int], bias_bytes: int, multiplier_bytes: int) -> bytes:
    rows = (
        bias.to_bytes(bias_bytes, "little", signed=True)
        + multiplier.to_bytes(multiplier_bytes, "little")
        + shift.to_bytes(10 - bias_bytes - multiplier_bytes, "little")
        for bias, multiplier, shift in channels
    )
    return b"".join(rows) + bytes(16 - 10 * len(channels) % 16)


@pytest.mark.parametrize("form", [(5, 4), (4, 4), (6, 2)])
def test_scales(form: tuple[int, int]) -> None:
    channels = [(-5, 1 << 14, 40), (2**31 - 1, 12345, 63), (-(2**31), 1, 0)]
    data = scales(*channels, bias_bytes=form[0], multiplier_bytes=form[1])
    found = decode_scales(data, 3, *form)
    kinds = (found.biases, found.multipliers, found.shifts)
    assert [tuple(row) for row in np.array(kinds).T.tolist()] == channels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(9), "1 channels fill it not"),
        (bytes(15) + b"\1", "1 channels fill it not"),
        (scales((0, 1, 64), bias_bytes=5, multiplier_bytes=4), "a shift of more than six bits"),
    ],
)
def test_what_is_wrong_with_a_scale_stream(data: bytes, message: str) -> None:
    with pytest.raises(CompiledFileError, match=message):
        decode_scales(data, 1, 5, 4)
