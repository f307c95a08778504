"""A .tflite file as immutable Python values: tensors, operators, inputs and outputs."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from torchclust.export import backends

Array: TypeAlias = npt.NDArray[Any]

# Where the weight stands among an operator's inputs. EMBEDDING_LOOKUP and GATHER read a table.
_WEIGHT_OPERAND = {
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "TRANSPOSE_CONV": 1,
    "FULLY_CONNECTED": 1,
    "CONV_3D": 1,
    "CONV_3D_TRANSPOSE": 1,
    "EMBEDDING_LOOKUP": 1,
    "GATHER": 0,
    "BATCH_MATMUL": 1,
}
_BIAS_OPERAND = {"TRANSPOSE_CONV": 3}
_INPUT_OPERAND = {"TRANSPOSE_CONV": 2}
# The axis of output channels, where it is not the first.
_CHANNEL_AXIS = {"DEPTHWISE_CONV_2D": 3, "CONV_3D": 4}
_BOUNDED = ("RELU6", "RELU_N1_TO_1", "RELU_0_TO_1")
_DTYPES = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
# What comes of following an offset out of the file, or into the middle of something else.
_DAMAGE = (struct.error, LookupError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor: ``dtype`` as numpy names it, ``data`` a view of the file for constants."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: int
    data: Array | None
    scales: Array
    zero_points: Array

    def same(self, other: Tensor) -> bool:
        """Whether the other, maybe of another file, is a constant of the same values and scales."""
        return (
            self.data is not None
            and other.data is not None
            and self.dtype == other.dtype
            and np.array_equal(self.data, other.data)
            and np.array_equal(self.scales, other.scales)
        )


@dataclass(frozen=True)
class Operator:
    """One operator; inputs and outputs index `Graph.tensors`, -1 an input left out.

    ``bounded``: it ends in ReLU6 or another function with an upper end.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bounded: bool = False


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant that an operator multiplies by, or looks up in.

    ``matrix`` is the data as (output channels, the rest), whatever the operator's own layout:
    convolutions become (O, spatial..., I), flattened.
    """

    tensor: Tensor
    operator: Operator
    channel_axis: int

    @property
    def matrix(self) -> Array:
        """The weight as (output channels, everything else), a view where the layout allows it."""
        assert self.tensor.data is not None
        moved = np.moveaxis(self.tensor.data, self.channel_axis, 0)
        return moved.reshape(moved.shape[0], -1)

    def by_channel(self, values: Array) -> Array:
        """One value per output channel, shaped to broadcast against the tensor."""
        shape = [1] * len(self.tensor.shape)
        shape[self.channel_axis] = -1
        return values.reshape(shape)

    def write(self, matrix: Array) -> None:
        """Overwrite the tensor in the file's bytes; they must be a bytearray."""
        assert self.tensor.data is not None
        moved = np.moveaxis(self.tensor.data, self.channel_axis, 0)
        moved[...] = matrix.reshape(moved.shape)


@dataclass(frozen=True, eq=False)
class Graph:
    """Every subgraph of a file in one list of tensors and one of operators."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def computed(self) -> list[Tensor]:
        """What a run is given and makes, in order: a file also keeps tensors that nothing makes."""
        made = (i for operator in self.operators for i in operator.outputs)
        indices = dict.fromkeys((*(t.index for t in self.inputs), *made))
        return [self.tensors[i] for i in indices]

    def weights(self) -> Iterator[Weight]:
        """Each weight tensor once, in file order, with the first operator that uses it."""
        seen = set()
        for operator in self.operators:
            operand = _WEIGHT_OPERAND.get(operator.name)
            if operand is None or operand >= len(operator.inputs):
                continue
            tensor = self.tensors[operator.inputs[operand]]
            if tensor.data is not None and tensor.index not in seen and len(tensor.shape) > 1:
                seen.add(tensor.index)
                yield Weight(tensor, operator, _CHANNEL_AXIS.get(operator.name, 0))

    def users(self, tensor: Tensor) -> list[Operator]:
        """The operators that read a tensor."""
        return [operator for operator in self.operators if tensor.index in operator.inputs]

    def bias(self, operator: Operator) -> Array | None:
        """The operator's constant bias, or None."""
        operand = _BIAS_OPERAND.get(operator.name, 2)
        if operand >= len(operator.inputs) or operator.inputs[operand] < 0:
            return None
        return self.tensors[operator.inputs[operand]].data

    def activation(self, operator: Operator) -> Tensor:
        """The input that the operator multiplies its weight by."""
        return self.tensors[operator.inputs[_INPUT_OPERAND.get(operator.name, 0)]]

    def groups(self, operator: Operator, weight: Tensor) -> int:
        """In how many groups a convolution reads its channels; any other operator in one."""
        if operator.name != "CONV_2D":
            return 1
        return self.activation(operator).shape[3] // weight.shape[3]


def read_graph(content: bytes | bytearray) -> Graph:
    """Parse a .tflite file's bytes.

    Args:
        content: the whole file. With a ``bytearray``, `Tensor.data` are writable views of it.

    Raises:
        ValueError: not a TFLite flatbuffer, or a damaged one.
    """
    if len(content) < 8 or bytes(content[4:8]) != b"TFL3":
        raise ValueError("not a TFLite file: its identifier is not 'TFL3'")
    try:
        return _parsed(content)
    except _DAMAGE as error:
        raise ValueError(
            f"a damaged TFLite file, or one that is newer than the schema known here: its "
            f"{len(content):,} bytes are cut off or inconsistent ({error})"
        ) from error


def _parsed(content: bytes | bytearray) -> Graph:
    tflite = backends.schema()
    model = tflite.Model.GetRootAs(content, 0)
    tensors: list[Tensor] = []
    operators: list[Operator] = []
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        first = len(tensors)
        tensors += (
            _tensor(model, content, subgraph.Tensors(i), first + i)
            for i in range(subgraph.TensorsLength())
        )
        operators += (
            _operator(model, subgraph.Operators(i), first)
            for i in range(subgraph.OperatorsLength())
        )
        if number == 0:
            ends = (_ints(subgraph, "Inputs"), _ints(subgraph, "Outputs"))
    named = (i for operator in operators for i in (*operator.inputs, *operator.outputs))
    if not all(-1 <= i < len(tensors) for i in named):
        raise IndexError("an operator names a tensor that does not exist")
    return Graph(
        tuple(tensors),
        tuple(operators),
        tuple(tensors[i] for i in ends[0]),
        tuple(tensors[i] for i in ends[1]),
    )


def _tensor(model: Any, content: bytes | bytearray, tensor: Any, index: int) -> Tensor:
    dtype = _names("TensorType")[tensor.Type()]
    shape = _ints(tensor, "Shape")
    quantization = tensor.Quantization()
    return Tensor(
        index=index,
        name=(tensor.Name() or b"").decode(),
        shape=shape,
        dtype=dtype.lower(),
        buffer=tensor.Buffer(),
        data=_data(model.Buffers(tensor.Buffer()), content, shape, _DTYPES.get(dtype)),
        scales=_vector(quantization, "Scale", np.float32),
        zero_points=_vector(quantization, "ZeroPoint", np.int64),
    )


def _data(buffer: Any, content: bytes | bytearray, shape: tuple[int, ...], dtype: Any) -> Any:
    """A view of the buffer in the file, inside the flatbuffer or (over 2 GiB) appended to it."""
    if dtype is None:
        return None
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if buffer.DataLength() == size and size:
        raw = buffer.DataAsNumpy()
        return raw.view(dtype).reshape(shape)
    if buffer.Size() == size and buffer.Offset() > 1:
        return np.frombuffer(content, dtype, count, buffer.Offset()).reshape(shape)
    return None


def _operator(model: Any, operator: Any, first: int) -> Operator:
    code = model.OperatorCodes(operator.OpcodeIndex())
    name = _names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
    if name == "CUSTOM":
        name = (code.CustomCode() or b"CUSTOM").decode()
    return Operator(
        name,
        tuple(i + first if i >= 0 else -1 for i in _ints(operator, "Inputs")),
        tuple(i + first for i in _ints(operator, "Outputs")),
        name in _BOUNDED or _fused(operator) in _BOUNDED,
    )


def _fused(operator: Any) -> str:
    """The activation function inside an operator, ``""`` where it has no place for one."""
    table, kind = operator.BuiltinOptions(), operator.BuiltinOptionsType()
    if table is None or not kind:
        return ""
    options = getattr(backends.schema(), _names("BuiltinOptions")[kind])()
    if not hasattr(options, "FusedActivationFunction"):
        return ""
    options.Init(table.Bytes, table.Pos)
    return _names("ActivationFunctionType")[options.FusedActivationFunction()]


def _ints(table: Any, field: str) -> tuple[int, ...]:
    return tuple(int(v) for v in _vector(table, field, np.int64))


def _vector(table: Any, field: str, dtype: Any) -> Array:
    if table is None or getattr(table, f"{field}Length")() == 0:
        return np.empty(0, dtype)
    return np.asarray(getattr(table, f"{field}AsNumpy")(), dtype)


@functools.cache
def _names(enum: str) -> dict[int, str]:
    values = vars(getattr(backends.schema(), enum)).items()
    return {value: name for name, value in values if isinstance(value, int)}
