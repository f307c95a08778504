"""A weight as a lookup table that tflite-micro decodes while it runs: its operator DECODE.

In the file the weight becomes its indices, of 1 to 7 bits each, most significant bit first. The
operator's second input is 16 bytes that say how to read them, then the table. The kernel counts as
many channels as the weight has scales and steps from one channel's table to the next by the stride
in these bytes: where channels share their codes, as an int8 codebook makes them, one table with a
stride of 0 serves all.

The decoded weight lies in the arena, from just before the operator that reads it until after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchclust.export import backends, container
from torchclust.export.graph import Array
from torchclust.export.resolver import DECODE

MOST_BITS = 7
OVERHEAD = 240  # bytes of one DECODE in the file: the operator, two tensors, a buffer
_DECODE_TYPE, _HEADER_VERSION, _TABLE_VERSION = 0, 1, 1
_WHOLE_TENSOR = 15  # in the place of the channels' axis


@dataclass(frozen=True)
class Encoded:
    """A weight's indices, packed, and the bytes that say how to decode them."""

    bits: int
    indices: bytes
    table: bytes

    @property
    def n_bytes(self) -> int:
        """Of both."""
        return len(self.indices) + len(self.table)


def encode(weight: Array, channel_axis: int, n_scales: int) -> Encoded | None:
    """The smallest encoding of an int8 weight, or None where it has too many codes for any."""
    moved = np.moveaxis(weight, channel_axis, 0)
    ways = [_with_tables(moved.reshape(1, -1), weight.shape, channel_axis, shared=True)]
    if n_scales == len(moved) > 1:
        rows = moved.reshape(len(moved), -1)
        ways.append(_with_tables(rows, moved.shape, channel_axis, shared=False))
    found = [way for way in ways if way is not None]
    return min(found, key=lambda way: way.n_bytes, default=None)


def _with_tables(
    rows: Array, shape: tuple[int, ...], channel_axis: int, *, shared: bool
) -> Encoded | None:
    """Encode with one table per row: a channel's, or (`shared`) the whole tensor's."""
    tables = [np.unique(row) for row in rows]
    longest = max(map(len, tables))
    bits = max(1, (longest - 1).bit_length())
    if bits > MOST_BITS:
        return None
    found = [np.searchsorted(t, row) for t, row in zip(tables, rows, strict=True)]
    indices = np.stack(found).astype(np.uint8)
    if shared:  # the row holds the channels first, the file has them where the operator wants them
        first = (shape[channel_axis], *np.delete(shape, channel_axis))
        indices = indices.reshape(first)
    else:
        indices = indices.reshape(shape)
    indices = np.moveaxis(indices, 0, channel_axis)
    stride = 0 if shared else longest
    padded = [np.pad(t, (0, longest - len(t))) for t in tables]
    axis = _WHOLE_TENSOR if shared else channel_axis
    return Encoded(bits, _packed(indices, bits), _header(bits, axis, stride) + _bytes(padded))


def _bytes(tables: list[Array]) -> bytes:
    return np.concatenate(tables).astype(np.int8).tobytes()


def _header(bits: int, axis: int, stride: int) -> bytes:
    common = bytes([_DECODE_TYPE, _HEADER_VERSION, 0, 0])
    return common + bytes([_TABLE_VERSION, axis << 4 | bits, stride]).ljust(12, b"\0")


def _packed(indices: Array, bits: int) -> bytes:
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return np.packbits((indices.reshape(-1, 1) >> shifts) & 1).tobytes()


def with_tables(content: bytes, encoded: Mapping[int, Encoded]) -> bytes:
    """The file with these tensors (of its first subgraph) as lookup tables, one DECODE per use."""
    if not encoded:
        return content
    model, schema = container.unpack(content), backends.schema()
    graph, custom = model.subgraphs[0], schema.BuiltinOperator.CUSTOM
    decode = len(model.operatorCodes)
    model.operatorCodes.append(_operator_code(schema, custom))
    operators = []
    ancillary = {i: _add(model, schema, graph, way.table) for i, way in encoded.items()}
    plain = {i: copy.copy(graph.tensors[i]) for i in encoded}
    for operator in graph.operators:
        operator.inputs = [int(index) for index in operator.inputs]
        for operand, index in enumerate(operator.inputs):
            if index in encoded:
                made = copy.copy(plain[index])
                made.buffer, made.name = 0, b""
                graph.tensors.append(made)
                operators.append(
                    _operator(schema, decode, [index, ancillary[index]], len(graph.tensors) - 1)
                )
                operator.inputs[operand] = len(graph.tensors) - 1
        operators.append(operator)
    graph.operators = operators
    for index, way in encoded.items():
        tensor = graph.tensors[index]
        model.buffers[tensor.buffer].data = np.frombuffer(way.indices, np.uint8)
        tensor.type, tensor.shape = schema.TensorType.UINT8, [len(way.indices)]
        tensor.quantization, tensor.shapeSignature = None, None
    _drop_names(model)
    return container.pack(model, len(content))


def _drop_names(model: Any) -> None:
    """Take away the names of all but inputs and outputs: nothing on the chip reads them."""
    for graph in model.subgraphs:
        kept = {*graph.inputs, *graph.outputs}
        for index, tensor in enumerate(graph.tensors):
            if index not in kept:
                tensor.name = b""


def _add(model: Any, schema: Any, graph: Any, data: bytes) -> int:
    """Add a constant; return its tensor's index."""
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.frombuffer(data, np.uint8)
    model.buffers.append(buffer)
    tensor.buffer, tensor.shape = len(model.buffers) - 1, [len(data)]
    tensor.type, tensor.name = schema.TensorType.UINT8, b""
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _operator_code(schema: Any, custom: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = custom
    code.customCode, code.version = DECODE.encode(), 1
    return code


def _operator(schema: Any, code: int, inputs: list[int], output: int) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = code, inputs, [output]
    return operator
