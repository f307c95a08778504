"""Whether tflite-micro, where it is installed, computes what LiteRT's reference kernels compute."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from torchclust.export import backends
from torchclust.export.graph import Graph
from torchclust.export.micro_interpreter import survives
from torchclust.export.runner import Runner

_ARENA = 1 << 18  # bytes beside the tensors, far more than it takes
_ROUNDING = 2  # codes, by which roundings of a few operators may differ
_PER_TENSOR = 1 << 10


@dataclass(frozen=True)
class MicroAgreement:
    """How tflite-micro's answers compare with LiteRT's.

    Attributes:
        difference: the largest of an operator's int8 output, in codes, over all operators; 0 where
            both answer the same to the bit.
        operators: by name, those that answer equal inputs otherwise, and by how many codes.
    """

    difference: int
    operators: dict[str, int]


def compare_micro(content: bytes, graph: Graph, inputs: Sequence[Tensor]) -> MicroAgreement | None:
    """Compare every operator's int8 output on one sample.

    Args:
        content, graph: an int8 file and its parsed form.
        inputs: one sample in the file's layout.

    Returns:
        None where the package ``tflite-micro`` is not installed, or cannot run the file.

    Warns:
        UserWarning: they differ by more than rounding, with the operator where it begins.
    """
    if importlib.util.find_spec("tflite_micro") is None:
        return None
    litert = Runner(content, keep_all=True)
    litert(inputs)
    micro = _answered(content, graph, litert)
    if micro is None:
        return None
    differences: dict[int, int] = {}
    operators: dict[str, int] = {}
    for operator in graph.operators:
        given = max((differences.get(i, 0) for i in operator.inputs), default=0)
        for index in operator.outputs:
            if graph.tensors[index].dtype == "int8":
                other = np.asarray(micro.GetTensor(index, 0)["tensor_data"]).astype(np.int64)
                mine = litert.tensor(index).astype(np.int64)
                found = int(np.abs(mine.ravel() - other.ravel()).max(initial=0))
                differences[index] = found
                if found and not given:
                    operators[operator.name] = max(found, operators.get(operator.name, 0))
    wrong = next((i for i, d in differences.items() if d > _ROUNDING), None)
    if wrong is not None:
        _warn(graph, wrong, differences[wrong])
    return MicroAgreement(max(differences.values(), default=0), operators)


def _warn(graph: Graph, index: int, difference: int) -> None:
    """Say where tflite-micro goes its own way, and why where that is known."""
    kinds = {operator.name for operator in graph.operators}
    remedy = "Check this on the chip"
    if "EMBEDDING_LOOKUP" in kinds:
        remedy = (
            "It reads one scale for a table of embeddings, and int8 codebooks have one per row: "
            'give the table a float codebook,  cluster_(model, {"*": ClusterConfig(16, '
            'codebook_dtype="int8"), "Embedding": ClusterConfig(16)})'
        )
    warnings.warn(
        f"tflite-micro answers otherwise than LiteRT from tensor {graph.tensors[index].name!r} on, "
        f"by {difference} codes. {remedy}",
        stacklevel=4,
    )


def _answered(content: bytes, graph: Graph, litert: Runner) -> Any:
    """tflite-micro's interpreter after a run on the same inputs, or None if it cannot."""
    runtime = backends.micro()
    keep = runtime.InterpreterConfig.kPreserveAllTensors
    activations = sum(8 * math.prod(t.shape) for t in graph.tensors if t.data is None)
    arena = 2 * activations + len(graph.tensors) * _PER_TENSOR + _ARENA
    if not survives(content, graph, arena):
        return None
    with backends.quietly():
        try:
            micro = runtime.Interpreter.from_bytes(
                content, intrepreter_config=keep, arena_size=arena
            )
            for position, values in enumerate(litert.given()):
                micro.set_input(values, position)
            micro.invoke()
        except (RuntimeError, ValueError):
            return None
    return micro
