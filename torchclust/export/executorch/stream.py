"""What Vela made of a part: its blocks of bytes, and the weights that the accelerator decodes.

Scales are not compared: the backend's own arithmetic makes TOSA's multipliers, and the outputs are
compared on TOSA's reference model instead.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from torchclust.export.backends import ExportError
from torchclust.export.codes import Array
from torchclust.export.compiled.commands import read_payload
from torchclust.export.compiled.errors import CompiledFileError, NotVerifiedError
from torchclust.export.compiled.layers import Layer
from torchclust.export.compiled.matching import match
from torchclust.export.executorch.tosa import TosaWeight
from torchclust.export.graph import Operator, Tensor, Weight

# A block's name, its length, and what the runtime needs; data begins and ends on 16 bytes.
_HEADER = struct.Struct("<16sI12x")
# TOSA's operators under the names that the comparison has for the hardware's three kinds.
_KINDS = {
    "CONV2D": "CONV_2D",
    "DEPTHWISE_CONV2D": "DEPTHWISE_CONV_2D",
    "TRANSPOSE_CONV2D": "TRANSPOSE_CONV",
}
_NONE: Array = np.empty(0, np.float32)


def unverified(compiled: bytes, weights: Sequence[TosaWeight]) -> tuple[str, ...]:
    """Find a part's weights, value by value, in the streams that the accelerator decodes.

    Args:
        compiled: Vela's output, as it lies in the program.
        weights: those of the TOSA file that Vela was given.

    Returns:
        The names of weights that Vela rearranged in a way that is not followed.

    Raises:
        ExportError: a stream is damaged, or holds other weights.
    """
    blocks = dict(_blocks(compiled))
    layers = [_layer(weight) for weight in weights]
    covered = [np.zeros(weight.matrix.size, bool) for weight in weights]
    try:
        device, operations = read_payload(blocks["cmd_data"])
        for found in match(operations, blocks["weight_data"], device, layers):
            covered[found.layer][found.positions] = True
    except NotVerifiedError:
        pass  # what no operation before it covered is reported
    except CompiledFileError as error:
        raise ExportError(
            f"Vela's output does not hold the weights that it was given: {error}"
        ) from error
    return tuple(w.name for w, seen in zip(weights, covered, strict=True) if not seen.all())


def _blocks(compiled: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(compiled):
        name, length = _HEADER.unpack_from(compiled, at)
        at += _HEADER.size
        yield name.rstrip(b"\0").decode(), compiled[at : at + length]
        at += -(-length // 16) * 16


def _layer(weight: TosaWeight) -> Layer:
    """In the comparison's terms; without positions where no two-dimensional kernel reads it."""
    kind, codes = _KINDS.get(weight.operator), weight.matrix
    tensor = Tensor(-1, weight.name, weight.shape, "int8", -1, codes, _NONE, _NONE)
    return Layer(
        Weight(tensor, Operator(kind or weight.operator, (), ()), 0),
        np.append(codes.astype(np.int16).ravel(), np.int16(0)),
        None if kind is None else _positions(weight),
        (),
    )


def _positions(weight: TosaWeight) -> Array:
    """Those of the matrix, as (O, H, W, I)."""
    depthwise = weight.operator == "DEPTHWISE_CONV2D"
    height, width = weight.shape[:2] if depthwise else weight.shape[1:3]
    positions = np.arange(weight.matrix.size)
    return positions.reshape(len(weight.matrix), height, width, -1)
