"""Removing the transpositions that the converter leaves between maps.

It holds maps in NHWC but computes some operators in NCHW, a padding in front of two readers for
one, with a TRANSPOSE on either side. Here each one sinks through what does not care for the order
of axes until it meets its inverse, or a mean that no Ethos-U takes in the other order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from torchclust.export.container import pack, unpack
from torchclust.export.editing import Array, Editing

# Operators of one map that give the same whatever the order of its axes.
_UNARY = (
    *("RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "LEAKY_RELU", "ELU", "GELU", "HARD_SWISH"),
    *("LOGISTIC", "TANH", "ABS", "NEG", "EXP", "LOG", "SQRT", "RSQRT", "SQUARE"),
)
_BINARY = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE")


def without_transposes(content: bytes) -> bytes:
    """The same float file with fewer TRANSPOSEs; itself where none can be spared."""
    model = unpack(content)
    fewer = False
    for subgraph in model.subgraphs:
        editing = _Sinking(model, subgraph)
        before = editing.count(subgraph.operators)
        operators = editing.sunk() if before else subgraph.operators
        if editing.count(operators) < before:
            subgraph.operators, fewer = operators, True
    return pack(model, len(content)) if fewer else content


class _Sinking(Editing):
    """One subgraph; `moved` says of a tensor that it is another one with its axes permuted."""

    def __init__(self, model: Any, subgraph: Any) -> None:
        super().__init__(model, subgraph)
        self.moved: dict[int, tuple[int, tuple[int, ...]]] = {}

    def count(self, operators: list[Any]) -> int:
        return sum(self.kind(operator) == "TRANSPOSE" for operator in operators)

    def sunk(self) -> list[Any]:
        """All operators, each TRANSPOSE only where its result is needed as it is."""
        for operator in self.subgraph.operators:
            if not self._sink(operator):
                operator.inputs = [self._materialized(int(i)) for i in operator.inputs]
                self.operators.append(operator)
        for output in self.subgraph.outputs:
            self._materialize_as(int(output))
        return self.operators

    def _sink(self, operator: Any) -> bool:
        """Whether the operator could be put before the transposition of its input."""
        kind, inputs = self.kind(operator), [int(i) for i in operator.inputs]
        if kind == "TRANSPOSE":
            return self._compose(inputs, int(operator.outputs[0]))
        found = [self.moved[i] for i in inputs if i in self.moved]
        if not found or len({order for _, order in found}) > 1:
            return False
        order = found[0][1]
        if kind == "MEAN" and inputs[0] in self.moved:
            return self._average(operator, inputs, order)
        if kind in _UNARY and len(inputs) == 1:
            new = [found[0][0]]
        elif kind in ("PAD", "PADV2") and inputs[0] in self.moved:
            widths = self.values(inputs[1])
            if widths is None:
                return False
            new = [found[0][0], self.constant(_permuted(widths, order), self.name(inputs[1]))]
            new += inputs[2:]
        elif kind in _BINARY:
            operands = [self._in_order(i, order) for i in inputs]
            if None in operands:
                return False
            new = [i for i in operands if i is not None]
        else:
            return False
        self._add_moved(operator, new, order)
        return True

    def _average(self, operator: Any, inputs: list[int], order: tuple[int, ...]) -> bool:
        """Average the axes as they were, where what is left of them stands in the same order."""
        axes = self.values(inputs[1])
        if axes is None:
            return False
        away = {int(axis) % len(order) for axis in axes.reshape(-1)}
        left = [axis for i, axis in enumerate(order) if i not in away]
        moved = self.constant(np.array(sorted(order[i] for i in away), np.int32), "axes")
        inputs = [self.moved[inputs[0]][0], moved]
        if operator.builtinOptions.keepDims:
            self._add_moved(operator, inputs, order)
        elif left == sorted(left):
            operator.inputs = inputs
            self.operators.append(operator)
        else:
            return False
        return True

    def _compose(self, inputs: list[int], output: int) -> bool:
        order = self.values(inputs[1])
        if order is None:
            return False
        source, first = self.moved.get(inputs[0], (inputs[0], tuple(range(len(order)))))
        self.moved[output] = (source, tuple(first[int(axis)] for axis in order))
        return True

    def _in_order(self, index: int, order: tuple[int, ...]) -> int | None:
        """An operand before its transposition: the tensor that was transposed, or a constant."""
        if index in self.moved:
            return self.moved[index][0]
        values = self.values(index)
        if values is None:
            return None
        if values.size == 1:
            return index
        wide = values.reshape([1] * (len(order) - values.ndim) + list(values.shape))
        return self.constant(wide.transpose(np.argsort(order)), self.name(index))

    def _add_moved(self, operator: Any, inputs: list[int], order: tuple[int, ...]) -> None:
        """Append the operator on inputs before the transposition; its result is transposed."""
        output = int(operator.outputs[0])
        shape = [0] * len(order)
        for axis, size in zip(order, self.shape(output), strict=True):
            shape[axis] = size
        new = self.like(output, shape)
        operator.inputs, operator.outputs = inputs, [new]
        self.operators.append(operator)
        self.moved[output] = (new, order)

    def _materialized(self, index: int) -> int:
        if index not in self.moved:
            return index
        source, order = self.moved[index]
        if order == tuple(range(len(order))):
            return source
        self._transpose(source, order, index)
        return index

    def _transpose(self, source: int, order: tuple[int, ...], target: int) -> None:
        """Append the transposition once; later readers find it done."""
        if any(target in operator.outputs for operator in self.operators):
            return
        axes = self.constant(np.asarray(order, np.int32), f"{self.name(target)};order")
        self.add("TRANSPOSE", [source, axes], target, self.schema.TransposeOptionsT())

    def _materialize_as(self, output: int) -> None:
        """Give a subgraph's output its value under its own index."""
        if output in self.moved:
            self._transpose(*self.moved[output], output)


def _permuted(widths: Array, order: tuple[int, ...]) -> Array:
    """Paddings per axis of the tensor that was transposed by ``order``."""
    moved = np.empty_like(widths)
    moved[list(order)] = widths
    return moved
