"""A large layer in parts, so that only a part of its weight has to be decoded at a time.

A decoded weight lies in the arena while its operator runs. Output channels do not depend on each
other: cut along them, one operator becomes several, and a CONCATENATION puts their outputs in order
again. The answers stay the same to the bit, but for a convolution in groups: which inputs an output
channel reads depends on how many there are, so one of those has to stay whole.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchclust.export import backends, container

DIVISIBLE = ("CONV_2D", "FULLY_CONNECTED")  # both have output channels first


def in_parts(content: bytes, counts: Mapping[int, int]) -> tuple[bytes, dict[int, int]]:
    """Cut the operators that read these weights into so many parts.

    Args:
        content: the file.
        counts: {weight tensor of the first subgraph, read by one operator and not in groups: number
            of parts, at most its output channels}.

    Returns:
        The file, and {weight tensor: the one that it is a part of}; the first part has its index.
    """
    if not counts:
        return content, {}
    model = container.unpack(content)
    graph, operators = model.subgraphs[0], []
    origins: dict[int, int] = {}
    for operator in graph.operators:
        weight = int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        if weight not in counts:
            operators.append(operator)
            continue
        parts = _cut(model, operator, counts[weight])
        origins |= {int(part.inputs[1]): weight for part in parts}
        operators += [*parts, _concatenation(model, parts, int(operator.outputs[0]))]
    graph.operators = operators
    return container.pack(model, len(content)), origins


def _cut(model: Any, operator: Any, count: int) -> list[Any]:
    tensors = model.subgraphs[0].tensors
    inputs, output = [int(i) for i in operator.inputs], tensors[operator.outputs[0]]
    rows = int(tensors[inputs[1]].shape[0])
    edges = np.linspace(0, rows, count + 1).astype(int).tolist()
    parts = []
    constants = [i for i in inputs[1:] if i >= 0]
    whole = {i: _Whole(model, i) for i in constants}
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        part = copy.copy(operator)
        sliced = {i: whole[i].part(number, start, end) for i in constants}
        part.inputs = [inputs[0], *(sliced.get(i, i) for i in inputs[1:])]
        made = copy.copy(output)
        made.shape, made.shapeSignature = [*output.shape[:-1], end - start], None
        made.name = b""
        tensors.append(made)
        part.outputs = [len(tensors) - 1]
        parts.append(part)
    return parts


class _Whole:
    """A constant with one row for each output channel, before it is cut."""

    def __init__(self, model: Any, index: int) -> None:
        self._model, self._index = model, index
        self._tensor = copy.copy(model.subgraphs[0].tensors[index])
        every = (t.buffer for graph in model.subgraphs for t in graph.tensors)
        self._is_shared = sum(buffer == self._tensor.buffer for buffer in every) > 1
        self._data = model.buffers[self._tensor.buffer].data

    def part(self, number: int, start: int, end: int) -> int:
        """Add these rows as a constant, the first part in the place of the whole."""
        schema, model, tensor = backends.schema(), self._model, copy.copy(self._tensor)
        tensors, rows = model.subgraphs[0].tensors, int(tensor.shape[0])
        tensor.shape, tensor.shapeSignature = [end - start, *tensor.shape[1:]], None
        tensor.quantization = _sliced(tensor.quantization, rows, start, end)
        size = len(self._data) // rows
        buffer = schema.BufferT()
        buffer.data = self._data[start * size : end * size]
        if number == 0 and not self._is_shared:
            model.buffers[tensor.buffer] = buffer
        else:
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        if number == 0:
            tensors[self._index] = tensor
            return self._index
        tensor.name = f"part {number}".encode()
        tensors.append(tensor)
        return len(tensors) - 1


def _sliced(quantization: Any, rows: int, start: int, end: int) -> Any:
    """The scales of these rows, where each has one."""
    if quantization is None or quantization.scale is None or len(quantization.scale) != rows:
        return quantization
    part = copy.copy(quantization)
    part.scale = quantization.scale[start:end]
    part.zeroPoint = quantization.zeroPoint[start:end]
    return part


def _concatenation(model: Any, parts: list[Any], output: int) -> Any:
    schema = backends.schema()
    kind, operator = schema.BuiltinOperator.CONCATENATION, schema.OperatorT()
    codes = [code.builtinCode for code in model.operatorCodes]
    if kind not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = 2  # the first with int8
        model.operatorCodes.append(code)
        codes.append(kind)
    operator.opcodeIndex = codes.index(kind)
    operator.inputs, operator.outputs = [part.outputs[0] for part in parts], [output]
    operator.builtinOptionsType = schema.BuiltinOptions.ConcatenationOptions
    operator.builtinOptions = schema.ConcatenationOptionsT()
    operator.builtinOptions.axis = len(model.subgraphs[0].tensors[output].shape) - 1
    return operator
