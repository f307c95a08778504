"""What the compiler is given: TOSA files, read back and executed.

TOSA is the operator set between PyTorch and Vela. Its files are flatbuffers that hold the weights
as int8, and its reference model computes what the accelerator computes, to the bit.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchclust.export.backends import ExportError
from torchclust.export.codes import Array
from torchclust.export.executorch import packages

# How the weight's layout becomes (output channels, spatial..., inputs).
_TO_ROWS = {
    "CONV2D": (0, 1, 2, 3),
    "CONV3D": (0, 1, 2, 3, 4),
    "TRANSPOSE_CONV2D": (0, 1, 2, 3),
    "DEPTHWISE_CONV2D": (2, 3, 0, 1),
}
_ROW_AXES = {"DEPTHWISE_CONV2D": 2}  # of those; one elsewhere
_CONSTANTS = ("CONST", "CONST_SHAPE")


@dataclass(frozen=True, eq=False)
class TosaWeight:
    """An int8 weight of a TOSA file; ``matrix`` is (output channels, spatial..., inputs)."""

    name: str
    operator: str
    shape: tuple[int, ...]
    matrix: Array


@dataclass(frozen=True, eq=False)
class TosaFile:
    """A TOSA file: its bytes, its weights in order, and how many of each operator it has."""

    content: bytes
    weights: tuple[TosaWeight, ...]
    operators: dict[str, int]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Execute the file on TOSA's reference model, to the bit as the accelerator does."""
        model = packages.load("tosa_reference_model")
        with _nothing_printed():
            outputs, status = model.run(self.content, list(inputs))
        if status != model.GraphStatus.TOSA_VALID:
            raise ExportError(f"TOSA's reference model refuses the file: {status}")
        return list(outputs)


def read_tosa(content: bytes) -> TosaFile:
    """Parse a TOSA file's bytes."""
    graph = packages.load("tosa.TosaGraph").TosaGraph.GetRootAs(content, 0)
    regions = [graph.Regions(i) for i in range(graph.RegionsLength())]
    blocks = [region.Blocks(i) for region in regions for i in range(region.BlocksLength())]
    names: list[str] = []
    weights: dict[str, TosaWeight] = {}
    for block in blocks:
        tensors = {t.Name(): t for t in map(block.Tensors, range(block.TensorsLength()))}
        for operator in map(block.Operators, range(block.OperatorsLength())):
            name = _operators()[operator.Op()]
            names.append(name)
            if name in _TO_ROWS:
                weight = _weight(name, tensors[operator.Inputs(1)])
                weights.setdefault(weight.name, weight)
    counted = collections.Counter(name for name in names if name not in _CONSTANTS)
    return TosaFile(content, tuple(weights.values()), dict(counted))


def _weight(operator: str, tensor: Any) -> TosaWeight:
    shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
    # The serializer pads data to whole words.
    data = np.frombuffer(tensor.DataAsNumpy().tobytes(), np.int8, math.prod(shape)).reshape(shape)
    rows = data.transpose(_TO_ROWS[operator])
    count = math.prod(rows.shape[: _ROW_AXES.get(operator, 1)])
    return TosaWeight(tensor.Name().decode(), operator, shape, rows.reshape(count, -1))


@functools.cache
def _operators() -> dict[int, str]:
    values = vars(packages.load("tosa.Op").Op).items()
    return {value: name for name, value in values if isinstance(value, int)}


@contextlib.contextmanager
def _nothing_printed() -> Any:
    """The reference model warns on file descriptor 1 that the file is of an older version."""
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere, contextlib.redirect_stdout(io.StringIO()):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
