"""What stands beside the weights: per output channel a bias, a multiplier and a shift, ten bytes.

    accumulator -> (accumulator + bias) * multiplier / 2**shift + zero point

The Ethos-U55 and U65 have a bias of 40 bits and a multiplier of 32, and one stream for each core;
the U85 has 32 and 31 bits (48 and 15 where the inputs are int16), and rounds the number of channels
up to its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.graph import Array

CHANNEL_BYTES = 10


@dataclass(frozen=True)
class ScaleStream:
    """One integer of each kind per output channel, int64."""

    biases: Array
    multipliers: Array
    shifts: Array


def decode_scales(data: bytes, count: int, bias_bytes: int, multiplier_bytes: int) -> ScaleStream:
    """Decode the first `count` channels; all behind them must be zero.

    Raises:
        CompiledFileError: the stream is too short, or its unused bits are set.
    """
    content = np.frombuffer(data, np.uint8).astype(np.int64)
    used = count * CHANNEL_BYTES
    if len(content) < used or content[used:].any():
        raise CompiledFileError(f"a scale stream is damaged: {count} channels fill it not")
    rows = content[:used].reshape(count, CHANNEL_BYTES)
    biases = _number(rows[:, :bias_bytes])
    shift_at = bias_bytes + multiplier_bytes
    biases -= (biases >> (8 * bias_bytes - 1)) << (8 * bias_bytes)
    shifts = rows[:, shift_at]
    if rows[:, shift_at + 1 :].any() or (shifts >= 64).any():
        raise CompiledFileError("a scale stream is damaged: a shift of more than six bits")
    return ScaleStream(biases, _number(rows[:, bias_bytes:shift_at]), shifts)


def _number(digits: Array) -> Array:
    numbers: Array = digits @ (1 << 8 * np.arange(digits.shape[1]))
    return numbers
