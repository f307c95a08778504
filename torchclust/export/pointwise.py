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

from torchclust.export.accelerators import MOST_STRIDE
from torchclust.export.container import pack, unpack
from torchclust.export.editing import Editing


def convolutions_for_linears(content: bytes) -> bytes:
    """The float file with a CONV_2D for every FULLY_CONNECTED of constant weights.

    A weight (O, I) becomes (O, 1, 1, I), the same numbers in the same order; reshapes that meet at
    its ends become one.
    """
    model = unpack(content)
    for subgraph in model.subgraphs:
        _undo_depthwise(Editing(model, subgraph))
        _Rewriting(model, subgraph).run()
    return pack(model, len(content))


def _undo_depthwise(editing: Editing) -> None:
    """A CONV_2D for a DEPTHWISE_CONV_2D of one channel at a stride that only a CONV_2D may have.

    The converter makes a depthwise convolution of every one of a single input channel. The
    accelerator takes those with strides up to 3; the sums are the same.
    """
    for operator in editing.subgraph.operators:
        options = operator.builtinOptions
        if editing.kind(operator) != "DEPTHWISE_CONV_2D":
            continue
        weights = editing.values(int(operator.inputs[1]))
        one = editing.shape(int(operator.inputs[0]))[3] == 1
        if weights is None or not one or max(options.strideH, options.strideW) <= MOST_STRIDE:
            continue
        moved = np.ascontiguousarray(weights.transpose(3, 1, 2, 0))
        name = editing.name(int(operator.inputs[1]))
        operator.inputs = [operator.inputs[0], editing.constant(moved, name), *operator.inputs[2:]]
        editing.become_convolution(operator)


class _Rewriting(Editing):
    """One subgraph's rewriting; `operators` grows in the order of execution."""

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
        linears = [o for o in self.subgraph.operators if self.kind(o) == "FULLY_CONNECTED"]
        readers = Counter(i for o in self.subgraph.operators for i in o.inputs)
        weights = Counter(o.inputs[1] for o in linears)
        return {
            id(o)
            for o in linears
            if weights[o.inputs[1]] == readers[o.inputs[1]] and self.values(o.inputs[1]) is not None
        }

    def _replace(self, linear: Any) -> None:
        source, weight, *bias = (int(i) for i in linear.inputs)
        (target,) = (int(i) for i in linear.outputs)
        outputs, *_, inputs = (int(n) for n in self.tensor(weight).shape)
        self.tensor(weight).shape = [outputs, 1, 1, inputs]
        pixels = math.prod(self.tensor(source).shape) // inputs
        before = self._as_map(self._before_reshapes(source), [1, 1, pixels, inputs])
        after = self.like(target, [1, 1, pixels, outputs])
        options = self.schema.Conv2DOptionsT()
        options.padding = self.schema.Padding.VALID
        options.strideH = options.strideW = 1
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = linear.builtinOptions.fusedActivationFunction
        if not bias or bias[0] < 0:  # a convolution's kernel demands one
            bias = [self.constant(np.zeros(outputs, np.float32), f"{self.name(weight)};bias")]
        self.add("CONV_2D", [before, weight, *bias], after, options)
        self.add_reshape(after, target)

    def _as_map(self, source: int, shape: list[int]) -> int:
        """The tensor reshaped; itself where it has this shape."""
        if [int(n) for n in self.tensor(source).shape] == shape:
            return source
        target = self.like(source, shape)
        self.add_reshape(source, target)
        return target

    def _before_reshapes(self, tensor: int) -> int:
        """The tensor whose elements these are, in the same order."""
        makers = {int(o.outputs[0]): o for o in self.operators if self.kind(o) == "RESHAPE"}
        while tensor in makers:
            tensor = int(makers[tensor].inputs[0])
        return tensor

    def _remove_unread_reshapes(self) -> None:
        kept: list[Any] = []
        read = {int(i) for i in self.subgraph.outputs}
        for operator in reversed(self.operators):
            if self.kind(operator) != "RESHAPE" or int(operator.outputs[0]) in read:
                kept.append(operator)
                read.update(int(i) for i in operator.inputs)
        self.operators = kept[::-1]
