"""The command stream of an Ethos-U: which convolutions it runs, and where their weights lie.

The driver's payload is a row of actions; one holds the accelerator's configuration, one the
commands. A command of one word sets a 16-bit register or starts an operation, one of two words sets
an address or a length. Registers keep their values until set again, so an operation is the state of
all registers when it starts. Weights may be copied to faster memory first, often into two buffers
in turn: then the copy before the operation tells where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.errors import CompiledFileError, NotVerifiedError
from torchclust.export.compiled.hardware import Hardware, hardware

_MAGIC = 0x31504F43  # "COP1"
_CONFIG, _COMMANDS = 1, 2
_CONVOLUTION, _DEPTHWISE, _COPY = 0x02, 0x03, 0x10
# Registers of one word, then addresses and lengths, of which the U55 and U65 have two scale
# streams, the U85 four weight streams.
_INPUT_DEPTH, _INPUT_PRECISION, _OUTPUT_DEPTH, _BLOCK_DEPTH = 0x104, 0x105, 0x113, 0x117
_KERNEL_WIDTH, _KERNEL_HEIGHT, _KERNEL, _ACCUMULATOR = 0x120, 0x121, 0x122, 0x124
_WEIGHT_REGION, _SCALE_REGION, _WEIGHT_FORMAT = 0x128, 0x129, 0x12E
_SOURCE_REGION, _TARGET_REGION = 0x130, 0x131
_WEIGHTS = ((0x20, 0x21), (0x90, 0x91), (0x92, 0x93), (0x94, 0x95))
_SCALES = ((0x22, 0x23), (0x92, 0x93))
_SOURCE, _TARGET, _LENGTH = 0x30, 0x31, 0x32
_MICRO_BLOCKS = (1, 2, 4, 4, 8, 16)  # pixels that a U85 computes at once, by their code
_CONSTANTS = 0  # the region that is in the file


@dataclass(frozen=True)
class Span:
    """Bytes of the file's constants."""

    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """In which order an operation reads its weights: all that registers say of it.

    Attributes:
        shape: output channels of this operation, kernel height and width, input channels (1 if
            depthwise).
        depthwise: every channel by itself.
        part_kernel: kernel positions before input channels.
        block_depth: output channels of a block.
        micro_pixels: on the U85, pixels computed at once: fewer channels where there are more.
        stride, dilation: vertical and horizontal.
        input_bits: of the activations.
        sparse: two of four weights are zero, and known to be.
    """

    shape: tuple[int, int, int, int]
    depthwise: bool
    part_kernel: bool
    block_depth: int
    micro_pixels: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    input_bits: int
    sparse: bool


@dataclass(frozen=True)
class Operation:
    """A convolution, or the share of its output channels that is computed at a time.

    Attributes:
        layout: the order of its weights.
        weights, scales: where its streams are, one for each core at most.
        fast: weights are in the U85's fast format.
        wide: the U85's accumulators have 48 bits, and its scales another form.
    """

    layout: Layout
    weights: tuple[Span, ...]
    scales: tuple[Span, ...]
    fast: bool
    wide: bool


def read_payload(payload: bytes) -> tuple[Hardware, tuple[Operation, ...]]:
    """The accelerator, and its convolutions in order of first appearance.

    Raises:
        CompiledFileError: the payload is cut off or damaged.
        NotVerifiedError: the accelerator, or what it does, is not known here.
    """
    if len(payload) % 4:
        raise CompiledFileError("the command stream is damaged: it is cut off")
    words = np.frombuffer(payload, "<u4").tolist()
    if not words or words[0] != _MAGIC:
        raise CompiledFileError("the command stream is damaged: it does not begin with 'COP1'")
    device, commands = _actions(words)
    return device, tuple(dict.fromkeys(_operations(commands, device)))


def _actions(words: list[int]) -> tuple[Hardware, list[int]]:
    device, at = None, 1
    while at < len(words):
        action, high, low = words[at] & 0xFF, words[at] >> 8 & 0xFF, words[at] >> 16
        if action == _COMMANDS:
            length = high << 16 | low
            if device is None or at + 1 + length > len(words):
                break
            return device, words[at + 1 : at + 1 + length]
        if action == _CONFIG and at + 1 < len(words):
            device = hardware(words[at + 1])
        at += 3 if action == _CONFIG else 1
    raise CompiledFileError("the command stream is damaged: it has no commands")


def _operations(commands: list[int], device: Hardware) -> Iterator[Operation]:
    short: dict[int, int] = {}
    long: dict[int, int] = {}
    copies: list[tuple[int, int, int, int]] = []  # target region, target, length, source
    at = 0
    while at < len(commands):
        word = commands[at]
        code, value = word & 0x3FF, word >> 16
        if word >> 14 & 3:
            if at + 1 == len(commands):
                raise CompiledFileError(
                    "the command stream is damaged: its last command is cut off"
                )
            long[code] = (value & 0xFF) << 32 | commands[at + 1]
            at += 2
            continue
        at += 1
        short[code] = value
        if code == _COPY and short.get(_SOURCE_REGION) == _CONSTANTS:
            target = short.get(_TARGET_REGION, 0), long.get(_TARGET, 0)
            copies.append((*target, long.get(_LENGTH, 0), long.get(_SOURCE, 0)))
        elif code == _DEPTHWISE or (code == _CONVOLUTION and not value & 1):
            yield _operation(code == _DEPTHWISE, short, long, copies, device)


def _operation(
    depthwise: bool,
    short: Mapping[int, int],
    long: Mapping[int, int],
    copies: list[tuple[int, int, int, int]],
    device: Hardware,
) -> Operation:
    u85 = device.family == "ethos-u85"
    kernel, form = short.get(_KERNEL, 0), short.get(_WEIGHT_FORMAT, 0) if u85 else 0
    dilation = 1 + (kernel >> 4 & 1), 1 + (kernel >> 3 & 1)
    micro = short.get(_ACCUMULATOR, 0) >> 8 & 7
    if u85 and micro >= len(_MICRO_BLOCKS):
        raise CompiledFileError("the command stream is damaged: an unknown micro-block")
    layout = Layout(
        shape=(
            short.get(_OUTPUT_DEPTH, 0) + 1,
            short.get(_KERNEL_HEIGHT, 0) // dilation[0] + 1,
            short.get(_KERNEL_WIDTH, 0) // dilation[1] + 1,
            1 if depthwise else short.get(_INPUT_DEPTH, 0) + 1,
        ),
        depthwise=depthwise,
        part_kernel=bool(kernel >> 2 & 1) and not depthwise,
        block_depth=short.get(_BLOCK_DEPTH, 0) + 1,
        micro_pixels=_MICRO_BLOCKS[micro] if u85 else 1,
        stride=(
            1 + (kernel >> 1 & 1) + 2 * (kernel >> 9 & 1),
            1 + (kernel & 1) + 2 * (kernel >> 6 & 1),
        ),
        dilation=dilation,
        input_bits=8 << (short.get(_INPUT_PRECISION, 0) >> 2 & 3),
        sparse=bool(form >> 4 & 1),
    )
    fast = bool(form & 1)
    streams = 1 if fast else device.cores

    def spans(registers: tuple[tuple[int, int], ...], region: int, count: int) -> tuple[Span, ...]:
        found = ((long.get(start, 0), long.get(length, 0)) for start, length in registers[:count])
        return tuple(_source(*span, short.get(region, 0), copies) for span in found if span[1])

    return Operation(
        layout,
        spans(_WEIGHTS, _WEIGHT_REGION, streams),
        spans(_SCALES, _SCALE_REGION, 1 if u85 else streams),
        fast,
        u85 and short.get(_ACCUMULATOR, 0) & 3 == 1,
    )


def _source(start: int, length: int, region: int, copies: list[tuple[int, int, int, int]]) -> Span:
    """Where bytes that an operation reads lie in the file's constants."""
    if region == _CONSTANTS:
        return Span(start, length)
    for target_region, target, size, source in reversed(copies):
        if target_region == region and target <= start and start + length <= target + size:
            return Span(start - target + source, length)
    raise NotVerifiedError(f"weights in memory region {region} come from no copy of constants")
