"""Sums as multiples of means: LiteRT's int8 SUM saturates where zero points are not its own.

The model's own sums are rewritten before (`rewrites.maps`); these are the converter's, of dot
products and of what it decomposes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torchclust.export.container import pack, unpack
from torchclust.export.editing import Editing


def means_for_sums(content: bytes) -> bytes:
    """The same float file with a MEAN and a MUL for each SUM; itself where it has none."""
    model = unpack(content)
    found = False
    for subgraph in model.subgraphs:
        editing = _Averaging(model, subgraph)
        operators = editing.averaged()
        if editing.changed:
            subgraph.operators, found = operators, True
    return pack(model, len(content)) if found else content


class _Averaging(Editing):
    """One subgraph; `changed` says whether it had a sum."""

    changed = False

    def averaged(self) -> list[Any]:
        for operator in self.subgraph.operators:
            axes = self.values(int(operator.inputs[1])) if self.kind(operator) == "SUM" else None
            if axes is None or self._is_integer(operator):
                self.operators.append(operator)
            else:
                self._average(operator, [int(axis) for axis in axes.reshape(-1)])
                self.changed = True
        return self.operators

    def _is_integer(self, operator: Any) -> bool:
        return bool(self.tensor(int(operator.inputs[0])).type != self.schema.TensorType.FLOAT32)

    def _average(self, operator: Any, axes: list[int]) -> None:
        source, output = int(operator.inputs[0]), int(operator.outputs[0])
        whole, name = self.shape(source), self.name(output)
        axes = sorted(axis % len(whole) for axis in axes)
        count = math.prod(whole[axis] for axis in axes)
        if len(whole) == 4 and axes == [3]:  # no Ethos-U averages the channels of a map
            rows = self.like(source, [1, math.prod(whole[:3]), whole[3]])
            self.add_reshape(source, rows)
            source, axes = rows, [2]
        options = self.schema.ReducerOptionsT()
        options.keepDims = True
        kept = [1 if axis in axes else n for axis, n in enumerate(self.shape(source))]
        mean = self.like(output, kept)
        self.add("MEAN", [source, self.constant(np.array(axes, np.int32), name)], mean, options)
        factor = self.constant(np.array([count], np.float32), name)
        product = self.like(output, kept)
        self.add("MUL", [mean, factor], product, self.schema.MulOptionsT())
        self.add_reshape(product, output)
