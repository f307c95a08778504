"""What is in a compiled file, layer by layer: a table to read and to print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchclust.export.compiled.streams import Decoded
from torchclust.export.graph import Array


@dataclass(frozen=True)
class CompiledRow:
    """One layer as it stands in the compiled file.

    Attributes:
        name: the weight tensor's name in the original; empty without one.
        operator: what the original does with it, else the accelerator.
        weights: how many.
        format: ``"slow"`` or ``"fast"``, as the accelerator decodes them, or ``"cpu"``.
        bytes: all its weight streams.
        bits: the same per weight.
        palette: entries of the largest palette; 0 without one.
        run_zeros: share of what is coded that are zeros in runs, outside of the palette.
        padding: share of what is coded that is no weight.
        header_bytes: slice headers, palettes, and what fills the ends of streams.
        streams: how many.
    """

    name: str
    operator: str
    weights: int
    format: str
    bytes: int
    bits: float
    palette: int
    run_zeros: float
    padding: float
    header_bytes: int
    streams: int


@dataclass(frozen=True)
class CompiledInspection:
    """What is in a Vela-compiled file. Iterates over its rows; prints as a table.

    Attributes:
        path: the compiled file.
        original: with which all its weights and scales were compared; None if with none.
        accelerator: for which it was compiled; empty if nothing of it runs there.
        rows: one `CompiledRow` per weight tensor of the original, in its order; without one, per
            operation of the accelerator.
    """

    path: Path
    original: Path | None
    accelerator: str
    rows: tuple[CompiledRow, ...]

    @property
    def weights(self) -> int:
        """All weights of its rows."""
        return sum(row.weights for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "file": str(self.path),
            "original": None if self.original is None else str(self.original),
            "accelerator": self.accelerator,
            "weights": self.weights,
            "layers": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        compared = "compared with no original"
        if self.original is not None:
            compared = f"value by value as in {self.original}"
        lines = [
            f"{self.path} ({self.accelerator or 'nothing on the accelerator'}): "
            f"{self.weights:,} weights, {compared}",
            f"  {'operator':<18}{'weights':>11}{'bytes':>11}{'bits':>6}{'format':>7}{'palette':>8}"
            f"{'zero runs':>10}{'padding':>8}{'headers':>8}",
        ]
        lines += (
            f"  {r.operator:<18}{r.weights:>11,}{r.bytes:>11,}{r.bits:>6.2f}{r.format:>7}"
            f"{r.palette:>8}{r.run_zeros:>10.0%}{r.padding:>8.0%}{r.header_bytes:>8,}"
            for r in self.rows
        )
        return "\n".join(lines)

    def __iter__(self) -> Iterator[CompiledRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CompiledRow:
        return self.rows[index]


def encoded_row(name: str, operator: str, weights: int, parts: Sequence[Decoded]) -> CompiledRow:
    """A layer from the operations that compute it."""
    streams = [stream for part in parts for stream in part.streams]
    size = sum(span.length for part in parts for span in part.operation.weights)
    values = sum(len(part.values) for part in parts)
    return CompiledRow(
        name=name,
        operator=operator,
        weights=weights,
        format="fast" if any(part.operation.fast for part in parts) else "slow",
        bytes=size,
        bits=8 * size / weights,
        palette=max(stream.palette for stream in streams),
        run_zeros=sum(stream.run_zeros for stream in streams) / values,
        padding=1 - sum(part.weights for part in parts) / values,
        header_bytes=sum(stream.header_bits + stream.tail_bits for stream in streams) // 8,
        streams=len(streams),
    )


def plain_row(name: str, operator: str, data: Array) -> CompiledRow:
    """A layer that the compiler left to the CPU, as it is."""
    return CompiledRow(
        name=name,
        operator=operator,
        weights=data.size,
        format="cpu",
        bytes=data.nbytes,
        bits=8.0 * data.itemsize,
        palette=0,
        run_zeros=0.0,
        padding=0.0,
        header_bytes=0,
        streams=0,
    )
