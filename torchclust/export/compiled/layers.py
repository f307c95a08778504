"""The original file's side: each layer's codes, its channels' scales, and what becomes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.scale_stream import ScaleStream
from torchclust.export.graph import Array, Graph, Operator, Tensor, Weight

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
ZERO = -1  # the position of a zero that is no weight


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight tensor.

    Attributes:
        weight: as the file has it.
        codes: its values less their zero points, flat, int16, and behind them a 0, at `ZERO`.
        positions: those of its values in ``codes``, as (O, H, W, I); None where no
            convolution of integers uses them.
        scales: what may stand beside the weights, by the operators that use them; none where
            it is not known.
        starts: the first output channel of each group; of a depthwise convolution, the output
            channels of the first input channel.
    """

    weight: Weight
    codes: Array
    positions: Array | None
    scales: tuple[ScaleStream, ...]
    starts: range = range(1)

    @property
    def name(self) -> str:
        """The tensor's name, and the operator's."""
        return f"{self.weight.tensor.name!r} ({self.weight.operator.name})"

    def views(self, height: int, width: int) -> Iterator[Array]:
        """Every form in which the compiler may compute the layer with a kernel of that size.

        Each is positions in ``codes`` by (O, H, W, I); it may hold a part of them only.
        """
        if self.positions is None:
            return iter(())
        turned = self.weight.operator.name == "TRANSPOSE_CONV"
        return (_turned if turned else _spread)(self.positions, height, width)


def read_layers(graph: Graph) -> tuple[Layer, ...]:
    """The layers of an int8 file, in its order; a table that is only looked up has no positions."""
    return tuple(_layer(graph, weight) for weight in graph.weights())


def _layer(graph: Graph, weight: Weight) -> Layer:
    tensor = weight.tensor
    assert tensor.data is not None
    if tensor.dtype not in ("int8", "uint8") or not len(tensor.scales):
        return Layer(weight, np.empty(0, np.int16), None, ())
    codes = tensor.data.astype(np.int16) - weight.by_channel(tensor.zero_points.astype(np.int16))
    users = [operator for operator in graph.users(tensor) if operator.name in _CONVOLUTIONS]
    return Layer(
        weight,
        np.append(codes.ravel(), np.int16(0)),
        _convolution(np.arange(codes.size).reshape(codes.shape), users),
        tuple(_scales(graph, tensor, operator) for operator in users),
        _starts(graph, tensor, weight.operator),
    )


def _starts(graph: Graph, tensor: Tensor, operator: Operator) -> range:
    """Where the groups of a grouped convolution begin; the whole of any other is one."""
    if operator.name == "DEPTHWISE_CONV_2D":
        return range(tensor.shape[3] // graph.activation(operator).shape[3])
    if operator.name != "CONV_2D":
        return range(1)
    return range(0, tensor.shape[0], max(1, tensor.shape[0] // graph.groups(operator, tensor)))


def _convolution(positions: Array, users: list[Operator]) -> Array | None:
    """As (O, H, W, I), where a kind of convolution uses them."""
    if not users:
        return None
    if users[0].name == "DEPTHWISE_CONV_2D":
        return positions.transpose(3, 1, 2, 0)
    return positions[:, None, None, :] if users[0].name == "FULLY_CONNECTED" else positions


def _turned(positions: Array, height: int, width: int) -> Iterator[Array]:
    """A transposed convolution computes turned round, at once or by phase of its stride."""
    for down in range(1, positions.shape[1] + 1):
        for across in range(1, positions.shape[2] + 1):
            for top, left in itertools.product(range(down), range(across)):
                view = positions[:, top::down, left::across][:, ::-1, ::-1]
                if view.shape[1:3] == (height, width):
                    yield view


def _spread(positions: Array, height: int, width: int) -> Iterator[Array]:
    """The accelerator dilates by 2 at most; for more, zeros stand between the kernel's rows.

    It strides by 3 at most; for more, each place of the kernel is a convolution of its own.
    """
    rows, columns = positions.shape[1:3]
    if (height, width) == (rows, columns):
        yield positions
        return
    if (height, width) == (1, 1):
        for y, x in itertools.product(range(rows), range(columns)):
            yield positions[:, y : y + 1, x : x + 1]
        return
    down, across = (max(1, (a - 1) // max(1, b - 1)) for a, b in ((height, rows), (width, columns)))
    if (height, width) == ((rows - 1) * down + 1, (columns - 1) * across + 1):
        view = np.full((len(positions), height, width, positions.shape[3]), ZERO)
        view[:, ::down, ::across] = positions
        yield view


def _scales(graph: Graph, weight: Tensor, operator: Operator) -> ScaleStream:
    source, target = graph.activation(operator), graph.tensors[operator.outputs[0]]
    channels = weight.shape[3 if operator.name == "DEPTHWISE_CONV_2D" else 0]
    bias = graph.bias(operator)
    pairs = [
        _multiplier(factor)
        for factor in _factors(source.scales, weight.scales, target.scales, operator.name)
    ]
    multipliers, shifts = (np.resize(np.array(part), channels) for part in zip(*pairs, strict=True))
    biases = np.zeros(channels, np.int64) if bias is None else bias.astype(np.int64)
    return ScaleStream(biases, multipliers, shifts)


def _factors(source: Array, weight: Array, target: Array, operator: str) -> list[float]:
    """In double precision, but for fully connected layers of one scale, as in TFLite's kernels."""
    if operator == "FULLY_CONNECTED" and len(weight) == 1:
        return [float(source[0] * weight[0]) / float(target[0])]
    return [float(source[0]) * float(scale) / float(target[0]) for scale in weight]


def _multiplier(factor: float) -> tuple[int, int]:
    """A factor as a 31-bit integer and a shift to the right of at most 63."""
    significand, exponent = math.frexp(factor)
    multiplier, shift = math.floor(significand * (1 << 31) + 0.5), 31 - exponent
    if shift > 63:
        excess = shift - 63
        return (multiplier >> excess, 63) if multiplier > 2**excess else (0, 0)
    if shift < 0 and multiplier < 2.0 ** (shift + 32):
        return multiplier << -shift, 0
    return multiplier, shift
