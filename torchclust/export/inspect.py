"""Reading a .tflite file back: what its weights hold, which operators it has, what it takes.

In: any .tflite file. `graph` reads it into immutable values, of which every weight, operator and
port is counted here. Out: an `Inspection`; nothing is run.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchclust.export.graph import Array, Graph, Tensor, Weight, read_graph


@dataclass(frozen=True)
class WeightRow:
    """One weight tensor of a file.

    Attributes:
        name: the tensor's name in the file.
        operator: what first uses it, for example ``"CONV_2D"``.
        shape: in the file's layout.
        dtype: ``"int8"``, ``"float32"``, ...
        codes: distinct values.
        scales: how many quantization scales; 0 for float.
        entropy_bits: empirical entropy of the values, bits per weight.
        scale_values: the scales, float32.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    codes: int
    scales: int
    entropy_bits: float
    scale_values: Array = field(repr=False, compare=False)


@dataclass(frozen=True)
class Port:
    """An input or an output: ``scale`` and ``zero_point`` are 0 where it is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_tflite` found. Iterates over its rows; prints as a table.

    Attributes:
        path: the file.
        size_bytes: its size.
        rows: one `WeightRow` per weight tensor, in file order.
        operators: how many of each operator.
        inputs, outputs: `Port` by `Port`.
        made_by: each operator's name by that of its output.
        float_operators: operators that compute in float though the file's inputs are quantized; an
            int8 accelerator leaves them to the CPU.
    """

    path: Path
    size_bytes: int
    rows: tuple[WeightRow, ...]
    operators: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    float_operators: tuple[str, ...]
    made_by: dict[str, str] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[WeightRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> WeightRow:
        return self.rows[index]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.size_bytes:,} bytes)"]
        lines += [f"  in   {_port(p)}" for p in self.inputs]
        lines += [f"  out  {_port(p)}" for p in self.outputs]
        lines.append(
            f"  {'operator':<18}{'shape':<20}{'type':<9}{'codes':>6}{'scales':>8}{'bits':>7}"
        )
        lines += (
            f"  {r.operator:<18}{'x'.join(map(str, r.shape)):<20}{r.dtype:<9}"
            f"{r.codes:>6}{r.scales:>8}{r.entropy_bits:>7.2f}"
            for r in self.rows
        )
        lines.append("  " + ", ".join(f"{n} {name}" for name, n in self.operators.items()))
        return "\n".join(lines)


def inspect_tflite(path: str | os.PathLike[str]) -> Inspection:
    """Read a .tflite file: codes, scales and entropy per weight tensor, operators, I/O types.

    Args:
        path: any .tflite file, whoever wrote it.

    Returns:
        An `Inspection`, which iterates over one `WeightRow` per weight tensor.

    Raises:
        ValueError: not a TFLite file.
        OSError: it cannot be read.
        ImportError: the package's export extra is not installed.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        graph = read_graph(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Inspection(
        path=path,
        size_bytes=len(content),
        rows=tuple(_row(weight) for weight in graph.weights()),
        operators=count_operators(graph),
        inputs=tuple(port(t) for t in graph.inputs),
        outputs=tuple(port(t) for t in graph.outputs),
        float_operators=tuple(graph.operators[i].name for i in float_operators(graph)),
        made_by={graph.tensors[i].name: o.name for o in graph.operators for i in o.outputs},
    )


def count_operators(graph: Graph) -> dict[str, int]:
    """How many of each operator, in order of first appearance."""
    return dict(collections.Counter(operator.name for operator in graph.operators))


def float_operators(graph: Graph) -> list[int]:
    """Indices of operators on float tensors, if anything in the file is quantized; else none."""
    if not any(t.dtype == "int8" and len(t.scales) for t in graph.tensors):
        return []
    floats = {t.index for t in graph.tensors if t.dtype.startswith("float")}
    return [
        number
        for number, operator in enumerate(graph.operators)
        if floats.intersection((*operator.inputs, *operator.outputs))
    ]


def port(tensor: Tensor) -> Port:
    """A tensor as an input or output."""
    quantized = len(tensor.scales) > 0
    return Port(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        scale=float(tensor.scales[0]) if quantized else 0.0,
        zero_point=int(tensor.zero_points[0]) if quantized else 0,
    )


def _row(weight: Weight) -> WeightRow:
    tensor = weight.tensor
    _, counts = np.unique(weight.matrix, return_counts=True)
    share = counts / counts.sum()
    return WeightRow(
        name=tensor.name,
        operator=weight.operator.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        codes=len(counts),
        scales=len(tensor.scales),
        entropy_bits=float(-(share * np.log2(share)).sum()) + 0.0,
        scale_values=tensor.scales,
    )


def _port(p: Port) -> str:
    quantization = f", scale {p.scale:.6g}, zero point {p.zero_point}" if p.scale else ""
    return f"{p.name}: {p.dtype} {'x'.join(map(str, p.shape))}{quantization}"
