"""The order in which the hardware reads weights, as positions in the tensor (O, H, W, I).

Both families walk the tensor in nested loops: blocks of output channels; in them blocks of input
channels; in them pieces of the kernel of at most 8x8; in them micro-blocks, one kernel position
after the other; in them a few output channels and a few input channels. Where a loop runs over the
tensor's edge it reads a zero: the compiler pads, and padding is coded like weights. They differ in
the steps, and the U85 turns round at the end of a row instead of jumping back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.commands import Layout
from torchclust.export.compiled.hardware import Hardware
from torchclust.export.compiled.layers import ZERO
from torchclust.export.graph import Array

_KERNEL_PIECE = 8
_LANES = 4  # output channels that a U85 core takes in a row


@dataclass(frozen=True)
class _Loops:
    """The steps of the nested loops, outermost first.

    Attributes:
        channels: which of the tensor's output channels this stream has, in order.
        block, micro: output channels of a block and of a micro-block.
        lanes: those of a micro-block that this stream has.
        input_block: input channels of a block; input blocks turn round if ``turning``.
        outer, inner: steps over input channels in a block, outside and inside of the kernel.
        inputs: input channels of one step.
        clipped: steps of ``outer`` past the last input channel are left out, not padded.
        pieces: kernel positions by piece of the kernel; (-1, -1) for padding.
    """

    channels: Array
    block: int
    micro: int
    lanes: Array
    input_block: int
    turning: bool
    outer: Array
    inner: Array
    inputs: int
    clipped: bool
    pieces: tuple[Array, ...]


def weight_order(layout: Layout, device: Hardware, fast: bool) -> tuple[Array, ...]:
    """For each stream the positions that it codes, `ZERO` where it codes a zero of its own."""
    build = _u85 if device.family == "ethos-u85" else _u55
    streams = [_walk(layout.shape, build(layout, device, core)) for core in range(device.cores)]
    if not fast or device.cores == 1:
        return tuple(stream for stream in streams if len(stream))
    # The fast format is one stream: the cores' shares of a micro-block, one core after the other.
    loops = _u85(layout, device, 0)
    share = len(loops.lanes) * len(loops.inner) * loops.inputs * _rounding(layout)
    return (np.stack([stream.reshape(-1, share) for stream in streams], 1).ravel(),)


def _walk(shape: tuple[int, int, int, int], loops: _Loops) -> Array:
    _, height, width, depth = shape
    count = len(loops.channels)
    if not count:  # a core that gets none of a few channels
        return np.empty(0, np.int64)
    blocks = np.arange(0, count, loops.block)
    micros = np.arange(0, loops.block, loops.micro)
    input_blocks = np.arange(0, depth, loops.input_block)
    starts = np.tile(input_blocks, (len(blocks), 1))
    if loops.turning:
        starts[1::2] = starts[1::2, ::-1]
    # Axes: block, input block, outer, micro-block, kernel position, inner, lane, input.
    output = (
        blocks[:, None, None, None, None, None, None, None]
        + micros[:, None, None, None, None]
        + loops.lanes[:, None]
    )
    step = (
        starts[:, :, None, None, None, None, None, None]
        + loops.outer[:, None, None, None, None, None]
    )
    source = step + loops.inner[:, None, None] + np.arange(loops.inputs)
    inside = (output < count) & (source < depth)
    channel = loops.channels[np.minimum(output, count - 1)]
    read = blocks[:, None, None, None] + micros < count
    if loops.clipped:
        read = read & (step[..., 0, 0, 0, 0] < depth)
    parts, reads = [], []
    for piece in loops.pieces:
        y, x = piece.T[:, :, None, None, None]
        at = ((channel * height + y) * width + x) * depth + source
        at = np.where(inside & (y >= 0), at, ZERO)
        parts.append(at.reshape(len(blocks), len(input_blocks), -1))
        reads.append(
            np.broadcast_to(read[..., None, None, None, None], at.shape).reshape(parts[-1].shape)
        )
    return np.concatenate(parts, 2)[np.concatenate(reads, 2)]


def _u55(layout: Layout, device: Hardware, core: int) -> _Loops:
    """Channels go to the cores in turn."""
    wide = layout.input_bits == 16
    block = 16 if layout.part_kernel or wide else 32
    steps, none = np.arange(0, block, 8), np.zeros(1, np.int64)
    micro = 4 if device.macs == 32 else 8
    rounding = 1
    if layout.depthwise or layout.part_kernel:
        rounding = 2 if wide and layout.part_kernel else 4
    return _Loops(
        channels=np.arange(core, layout.shape[0], device.cores),
        block=(layout.block_depth + device.cores - 1 - core) // device.cores,
        micro=micro,
        lanes=np.arange(micro),
        input_block=block,
        turning=False,
        outer=steps if layout.part_kernel else none,
        inner=none if layout.part_kernel or layout.depthwise else steps,
        inputs=1 if layout.depthwise else 8,
        clipped=layout.part_kernel,
        pieces=tuple(
            _padded(_rows(top, left, height, width), rounding)
            for top, height in _pieces(layout.shape[1], layout.dilation[0])
            for left, width in _pieces(layout.shape[2], layout.dilation[1])
        ),
    )


def _u85(layout: Layout, device: Hardware, core: int) -> _Loops:
    """Channels of a micro-block go to the cores in fours."""
    micro = device.macs // 8 // layout.micro_pixels
    block = _u85_input_block(layout, device, micro)
    inputs = 1 if layout.depthwise else 16 if layout.sparse else 8
    together = 1 if layout.depthwise else block
    if layout.part_kernel and layout.input_bits == 16 and not layout.sparse:
        together = 8
    extra = 0
    if layout.depthwise and (layout.input_bits == 16 or device.macs > 256):
        extra = 2 if device.macs <= 512 else 6
    stride = layout.stride if layout.part_kernel or layout.depthwise else (1, 1)
    first = np.arange(core * _LANES, micro, _LANES * device.cores)
    return _Loops(
        channels=np.arange(layout.shape[0]),
        block=layout.block_depth,
        micro=micro,
        lanes=(first[:, None] + np.arange(_LANES)).ravel(),
        input_block=block,
        turning=True,
        outer=np.arange(0, 1 if layout.depthwise else block, together),
        inner=np.arange(0, together, inputs),
        inputs=inputs,
        clipped=True,
        pieces=tuple(
            _padded(_strided(top, left, height, width, stride), _rounding(layout), extra)
            for left, width in _pieces(layout.shape[2], layout.dilation[1])
            for top, height in _pieces(layout.shape[1], layout.dilation[0])
        ),
    )


def _u85_input_block(layout: Layout, device: Hardware, micro: int) -> int:
    if layout.part_kernel:
        return 16
    if layout.input_bits == 32 or (device.macs <= 256 and micro == 16 and not layout.sparse):
        return 32
    return 128 if layout.sparse and layout.input_bits == 8 else 64


def _rounding(layout: Layout) -> int:
    """A U85 computes kernel positions five or ten at a time, but for the depth-first order."""
    if layout.depthwise:
        return 10
    if not layout.part_kernel:
        return 1
    return 10 if layout.sparse or layout.input_bits == 16 else 5


def _pieces(size: int, dilation: int) -> Iterator[tuple[int, int]]:
    """Start and size of the parts of a kernel's side."""
    step = _KERNEL_PIECE // dilation
    return ((start, min(step, size - start)) for start in range(0, size, step))


def _rows(top: int, left: int, height: int, width: int) -> Array:
    return np.array([(top + y, left + x) for y in range(height) for x in range(width)])


def _strided(top: int, left: int, height: int, width: int, stride: tuple[int, int]) -> Array:
    """Positions of the same phase of the stride together, every second row backwards."""
    return np.array(
        [
            (top + y, left + x)
            for down in range(stride[0])
            for across in range(stride[1])
            for row, y in enumerate(range(down, height, stride[0]))
            for x in range(across, width, stride[1])[:: -1 if row % 2 else 1]
        ]
    )


def _padded(positions: Array, rounding: int, extra: int = 0) -> Array:
    """Filled up to groups of `rounding` positions, with `extra` more padding behind each."""
    groups = -(-len(positions) // rounding)
    filled = np.full((groups * rounding, 2), ZERO)
    filled[: len(positions)] = positions
    behind = np.full((groups, extra, 2), ZERO)
    return np.concatenate([filled.reshape(groups, rounding, 2), behind], 1).reshape(-1, 2)
