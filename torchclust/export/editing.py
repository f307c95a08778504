"""One subgraph of an unpacked float file, open for editing."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from torchclust.export import backends

Array = npt.NDArray[Any]


class Editing:
    """A subgraph's tensors, and the operators that it will have, in order of execution.

    Tensors and constants are only ever added; those that nobody reads any more do no harm, since
    the quantizer leaves them out.
    """

    def __init__(self, model: Any, subgraph: Any) -> None:
        self.model, self.subgraph, self.schema = model, subgraph, backends.schema()
        self.operators: list[Any] = []

    def add(self, kind: str, inputs: list[int], output: int, options: Any = None) -> None:
        """Append an operator, such as ``"PAD"``, with its table of options."""
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._opcode(kind)
        operator.inputs, operator.outputs = inputs, [output]
        if options is not None:
            table = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            operator.builtinOptions = options
        self.operators.append(operator)

    def add_reshape(self, source: int, target: int) -> None:
        """Append the operator that gives a tensor's values the shape of another one."""
        shape, options = self.shape(target), self.schema.ReshapeOptionsT()
        options.newShape = shape
        constant = self.constant(np.array(shape, np.int32), f"{self.name(target)};shape")
        self.add("RESHAPE", [source, constant], target, options)

    def become_convolution(self, operator: Any) -> None:
        """Make a depthwise convolution's operator an ordinary one's, with the same options."""
        given, options = operator.builtinOptions, self.schema.Conv2DOptionsT()
        for field in ("padding", "strideH", "strideW", "fusedActivationFunction"):
            setattr(options, field, getattr(given, field))
        options.dilationHFactor = given.dilationHFactor
        options.dilationWFactor = given.dilationWFactor
        operator.opcodeIndex = self._opcode("CONV_2D")
        operator.builtinOptionsType = self.schema.BuiltinOptions.Conv2DOptions
        operator.builtinOptions = options

    def kind(self, operator: Any) -> str:
        """An operator's name, such as ``"CONV_2D"``."""
        known = self.model.operatorCodes[operator.opcodeIndex]
        return _kinds()[max(known.builtinCode, known.deprecatedBuiltinCode)]

    def tensor(self, index: int) -> Any:
        """The mutable tensor of an index."""
        return self.subgraph.tensors[index]

    def shape(self, index: int) -> list[int]:
        """A tensor's shape."""
        shape = self.tensor(index).shape
        return [] if shape is None else [int(n) for n in shape]

    def name(self, index: int) -> str:
        """A tensor's name, which begins with the module that made it."""
        return bytes(self.tensor(index).name or b"").decode()

    def like(self, index: int, shape: list[int]) -> int:
        """A new tensor of this type; its name begins with the same module's."""
        tensor = self.schema.TensorT()
        tensor.type = self.tensor(index).type
        tensor.shape, tensor.buffer = shape, 0
        tensor.name = f"{self.name(index)};as_{len(self.subgraph.tensors)}".encode()
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def constant(self, values: Array, name: str) -> int:
        """A new constant tensor."""
        buffer, tensor = self.schema.BufferT(), self.schema.TensorT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        tensor.type = getattr(self.schema.TensorType, values.dtype.name.upper())
        tensor.shape = list(values.shape)
        tensor.name = f"{name}_{len(self.subgraph.tensors)}".encode()
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def values(self, index: int) -> Array | None:
        """A constant's values, None of a tensor that is computed; int32 and float32 only."""
        tensor = self.tensor(index)
        data = self.model.buffers[tensor.buffer].data
        dtypes = {
            self.schema.TensorType.INT32: np.int32,
            self.schema.TensorType.FLOAT32: np.float32,
        }
        if data is None or len(data) == 0 or tensor.type not in dtypes:
            return None
        return np.frombuffer(data.tobytes(), dtypes[tensor.type]).reshape(self.shape(index))

    def _opcode(self, kind: str) -> int:
        code = getattr(self.schema.BuiltinOperator, kind)
        for index, known in enumerate(self.model.operatorCodes):
            if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
                return index
        added = self.schema.OperatorCodeT()
        added.builtinCode = added.deprecatedBuiltinCode = code
        added.version = 1
        self.model.operatorCodes.append(added)
        return len(self.model.operatorCodes) - 1


@functools.cache
def _kinds() -> dict[int, str]:
    names = vars(backends.schema().BuiltinOperator).items()
    return {value: name for name, value in names if isinstance(value, int)}
