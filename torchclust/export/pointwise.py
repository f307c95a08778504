"""Fully connected layers as 1x1 convolutions, whose arithmetic is the same wherever it runs.

LiteRT's reference kernel rescales the sums of a FULLY_CONNECTED with one rounding, tflite-micro's
with two, so that once in some thousand outputs they differ by 1; both round a CONV_2D twice. To the
accelerator the two are one: Vela makes a FULLY_CONNECTED of every 1x1 convolution of one pixel.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from torchclust.export import backends
from torchclust.export.container import pack, unpack


def convolutions_for_linears(content: bytes) -> bytes:
    """The float file with a CONV_2D for every FULLY_CONNECTED of constant weights.

    A weight (O, I) becomes (O, 1, 1, I), the same numbers in the same order; reshapes that meet at
    its ends become one.
    """
    model = unpack(content)
    for subgraph in model.subgraphs:
        _Rewriting(model, subgraph).run()
    return pack(model, len(content))


class _Rewriting:
    """One subgraph's rewriting; `operators` grows in the order of execution."""

    def __init__(self, model: Any, subgraph: Any) -> None:
        self.model, self.subgraph, self.schema = model, subgraph, backends.schema()
        self.linear, self.conv, self.reshape = (
            getattr(self.schema.BuiltinOperator, name)
            for name in ("FULLY_CONNECTED", "CONV_2D", "RESHAPE")
        )
        self.operators: list[Any] = []

    def run(self) -> None:
        rewritten = self._rewritten()
        for operator in self.subgraph.operators:
            if id(operator) in rewritten:
                self._replace(operator)
            else:
                self.operators.append(operator)
        self._remove_unread_reshapes()
        self.subgraph.operators = self.operators

    def _rewritten(self) -> set[int]:
        """Operators whose weight is a constant matrix that only such operators multiply by."""
        linears = [o for o in self.subgraph.operators if self._code(o) == self.linear]
        readers = Counter(i for o in self.subgraph.operators for i in o.inputs)
        weights = Counter(o.inputs[1] for o in linears)
        return {
            id(o)
            for o in linears
            if weights[o.inputs[1]] == readers[o.inputs[1]] and self._is_constant(o.inputs[1])
        }

    def _replace(self, linear: Any) -> None:
        source, weight, *bias = (int(i) for i in linear.inputs)
        (target,) = (int(i) for i in linear.outputs)
        outputs, *_, inputs = (int(n) for n in self._tensor(weight).shape)
        self._tensor(weight).shape = [outputs, 1, 1, inputs]
        pixels = math.prod(self._tensor(source).shape) // inputs
        before = self._as_map(self._before_reshapes(source), [1, 1, pixels, inputs])
        after = self._like(target, [1, 1, pixels, outputs])
        options = self.schema.Conv2DOptionsT()
        options.padding = self.schema.Padding.VALID
        options.strideH = options.strideW = 1
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = linear.builtinOptions.fusedActivationFunction
        if not bias or bias[0] < 0:  # a convolution's kernel demands one
            bias = [self._constant(np.zeros(outputs, np.float32), f"{self._name(weight)};bias")]
        self._add(self.conv, [before, weight, *bias], after, "Conv2DOptions", options)
        self._add_reshape(after, target)

    def _as_map(self, source: int, shape: list[int]) -> int:
        """The tensor reshaped; itself where it has this shape."""
        if [int(n) for n in self._tensor(source).shape] == shape:
            return source
        target = self._like(source, shape)
        self._add_reshape(source, target)
        return target

    def _before_reshapes(self, tensor: int) -> int:
        """The tensor whose elements these are, in the same order."""
        makers = {int(o.outputs[0]): o for o in self.operators if self._code(o) == self.reshape}
        while tensor in makers:
            tensor = int(makers[tensor].inputs[0])
        return tensor

    def _remove_unread_reshapes(self) -> None:
        kept: list[Any] = []
        read = {int(i) for i in self.subgraph.outputs}
        for operator in reversed(self.operators):
            if self._code(operator) != self.reshape or int(operator.outputs[0]) in read:
                kept.append(operator)
                read.update(int(i) for i in operator.inputs)
        self.operators = kept[::-1]

    def _add_reshape(self, source: int, target: int) -> None:
        shape = np.asarray(self._tensor(target).shape, np.int32)
        options = self.schema.ReshapeOptionsT()
        options.newShape = shape.tolist()
        constant = self._constant(shape, f"{self._name(target)};shape")
        self._add(self.reshape, [source, constant], target, "ReshapeOptions", options)

    def _add(self, code: int, inputs: list[int], output: int, kind: str, options: Any) -> None:
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._opcode(code)
        operator.inputs, operator.outputs = inputs, [output]
        operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        self.operators.append(operator)

    def _opcode(self, code: int) -> int:
        for index, known in enumerate(self.model.operatorCodes):
            if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
                return index
        added = self.schema.OperatorCodeT()
        added.builtinCode = added.deprecatedBuiltinCode = code
        added.version = 1
        self.model.operatorCodes.append(added)
        return len(self.model.operatorCodes) - 1

    def _like(self, index: int, shape: list[int]) -> int:
        """A new tensor of this type; its name begins with the same module's."""
        tensor = self.schema.TensorT()
        tensor.type = self._tensor(index).type
        tensor.shape, tensor.buffer = shape, 0
        uses = len(self.subgraph.tensors)
        tensor.name = f"{self._name(index)};pixels_{uses}".encode()
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def _constant(self, values: Any, name: str) -> int:
        buffer, tensor = self.schema.BufferT(), self.schema.TensorT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        tensor.type = getattr(self.schema.TensorType, values.dtype.name.upper())
        tensor.shape = list(values.shape)
        tensor.name = f"{name}_{len(self.subgraph.tensors)}".encode()
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def _code(self, operator: Any) -> int:
        known = self.model.operatorCodes[operator.opcodeIndex]
        return int(max(known.builtinCode, known.deprecatedBuiltinCode))

    def _tensor(self, index: int) -> Any:
        return self.subgraph.tensors[index]

    def _name(self, index: int) -> str:
        return bytes(self._tensor(index).name or b"").decode()

    def _is_constant(self, index: int) -> bool:
        data = self.model.buffers[self._tensor(index).buffer].data
        return data is not None and len(data) > 0
