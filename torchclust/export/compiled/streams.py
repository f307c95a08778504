"""An operation's weight streams, decoded, and the positions of its tensor that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.commands import Operation, Span
from torchclust.export.compiled.errors import CompiledFileError
from torchclust.export.compiled.fast_stream import FastStream, decode_fast
from torchclust.export.compiled.hardware import Hardware
from torchclust.export.compiled.layers import ZERO
from torchclust.export.compiled.order import weight_order
from torchclust.export.compiled.weight_stream import WeightStream, decode_weights
from torchclust.export.graph import Array

_LARGEST = 1 << 28  # weights of an operation; registers that say more are damaged


@dataclass(frozen=True, eq=False)
class Decoded:
    """What an operation reads.

    Attributes:
        operation: the operation.
        streams: one or one per core.
        values: all of them in a row.
        order: for each value its position in the tensor (O, H, W, I), `ZERO` for padding.
    """

    operation: Operation
    streams: tuple[WeightStream | FastStream, ...]
    values: Array
    order: Array

    @property
    def weights(self) -> int:
        """How many of the values are weights."""
        return int((self.order != ZERO).sum())


def decode(operation: Operation, constants: bytes, device: Hardware) -> Decoded:
    """Decode all weights of an operation.

    Raises:
        CompiledFileError: a stream is damaged, or is not as long as what is read.
    """
    if math.prod(operation.layout.shape) > _LARGEST:
        raise CompiledFileError("the command stream is damaged: an operation of too many weights")
    orders = weight_order(operation.layout, device, operation.fast)
    if len(operation.weights) != len(orders):
        raise CompiledFileError(
            f"an operation has {len(operation.weights)} weight streams instead of {len(orders)}"
        )
    streams = tuple(
        _stream(cut(constants, span), len(order), operation.fast)
        for span, order in zip(operation.weights, orders, strict=True)
    )
    values = np.concatenate([stream.values for stream in streams])
    return Decoded(operation, streams, values, np.concatenate(orders))


def _stream(data: bytes, count: int, fast: bool) -> WeightStream | FastStream:
    stream = decode_fast(data, count) if fast else decode_weights(data, count)
    if len(stream.values) != count:
        raise CompiledFileError(
            f"a weight stream holds {len(stream.values):,} values instead of {count:,}"
        )
    return stream


def cut(constants: bytes, span: Span) -> bytes:
    """The bytes of a span.

    Raises:
        CompiledFileError: it goes on behind the constants' end.
    """
    if span.start + span.length > len(constants):
        raise CompiledFileError("the command stream is damaged: it reads behind the constants' end")
    return constants[span.start : span.start + span.length]
