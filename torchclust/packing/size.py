"""What a packed file holds and what each step of compression gained, read from its headers."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchclust.packing.entropy import entropy
from torchclust.packing.header import Header
from torchclust.packing.record import Record, read_records
from torchclust.packing.sections import PackedFileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAGES = {
    "dense": "as it was",
    "pruned": "zeros left out",
    "clustered": "clustered (Eq. 1)",
    "packed": "entropy-coded (file)",
}


@dataclass(frozen=True)
class PackedRow:
    """One tensor of a packed file.

    Attributes:
        name: of the tensor in the state dict; the first, where it is tied.
        shape: of the tensor.
        dtype: torch's name of it.
        kind: ``"codebook"`` (float values), ``"codes"`` (int8 codes and scales),
            ``"sparse"`` (zeros coded, the rest as it is) or ``"raw"``.
        n_clusters: entries of a codebook, of codes 0 included; None for sparse and raw.
        bytes: in the file, with name, codebooks and checksums.
        bits_per_weight: the same per element, in bits.
        entropy_bits: empirical entropy of the indices, bits per weight; None for raw.
        eq1_bits: Deep Compression, Eq. 1, in bits per weight: ``log2 k`` and the codebooks' share;
            the dtype's width without a codebook.
        bound: bytes that the indices' entropy and the codebooks or raw values come to; or the
            coded indices, if these are smaller.
        zeros: share of elements that are zero; None for raw.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    n_clusters: int | None
    bytes: int
    bits_per_weight: float
    entropy_bits: float | None
    eq1_bits: float
    bound: float
    zeros: float | None
    _stages: tuple[float, float, float] = dataclasses.field(repr=False)

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedSize:
    """A packed file's size, tensor by tensor: ``print`` it, or read `rows` and `to_dict`.

    Attributes:
        bytes: of the whole file.
        rows: its tensors in order; a tied tensor once.

    Example:
        >>> import tempfile, torch, torchclust
        >>> model = torchclust.cluster_(torch.nn.Linear(256, 256), 4)
        >>> size = torchclust.save_packed(model, tempfile.mkdtemp() + "/model.packed")
        >>> size.rate > 13, list(size.stages)
        (True, ['dense', 'pruned', 'clustered', 'packed'])
    """

    bytes: int
    rows: tuple[PackedRow, ...]

    @property
    def entropy_bound(self) -> int:
        """Bytes of the entropy of the indices, codebooks and raw tensors.

        No code of single indices gets below; where rows and columns that hold little make an index
        cheaper than that, it is what they take.
        """
        return math.ceil(sum(row.bound for row in self.rows))

    @property
    def stages(self) -> dict[str, int]:
        """Bytes after each step: ``dense``, ``pruned``, ``clustered``, ``packed``.

        ``pruned`` keeps the values that are not zero and the entropy of where they stand;
        ``clustered`` keeps of those the index, ``log2 k`` bits, and the codebook (Eq. 1);
        ``packed`` is the file.
        """
        sums = [round(sum(row._stages[i] for row in self.rows)) for i in range(3)]
        return dict(zip(_STAGES, [*sums, self.bytes], strict=True))

    @property
    def rate(self) -> float:
        """Bytes before over bytes in the file."""
        return self.stages["dense"] / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        rows = [
            {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "_stages"}
            for row in self.rows
        ]
        totals = {"entropy_bound": self.entropy_bound, "rate": self.rate, "stages": self.stages}
        return {"bytes": self.bytes, **totals, "tensors": rows}

    def plot(self) -> Figure:
        """Bars of the bytes that are left after each step.

        Raises:
            ImportError: without matplotlib, naming the install command.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'plot() draws with matplotlib:  pip install "torchclust[recipes]"'
            ) from error
        figure = Figure(figsize=(7, 2.4), layout="constrained")
        axes = figure.subplots()
        stages = self.stages
        bars = axes.barh([*_STAGES.values()], [*stages.values()], color="tab:blue")
        labels = [f"{n:,} bytes, {stages['dense'] / max(1, n):.1f}x" for n in stages.values()]
        axes.bar_label(bars, labels, padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_xlabel("bytes")
        return figure

    def __str__(self) -> str:
        header = ("tensor", "shape", "kind", "k", "zeros", "entropy", "Eq. 1", "bits", "bytes")
        lines = [header, *(_cells(row) for row in self.rows)]
        weights = f"{sum(row.n_elements for row in self.rows):,} weights"
        lines.append(("total", weights, *[""] * 6, f"{self.bytes:,}"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, "", *_bars(self.stages), f"entropy bound {self.entropy_bound:,}"])


def packed_size(path: str | os.PathLike[str]) -> PackedSize:
    """Read what a packed file holds, without its model and without decoding it.

    Raises:
        OSError: it cannot be read.
        PackedFileError: it is no packed file, or its headers are damaged; the coded data is only
            verified by `load_packed_`.
    """
    with open(path, "rb") as file:
        try:
            records = read_records(file)
        except PackedFileError as error:
            raise PackedFileError(
                f"{os.fspath(path)!r}: {error}. Copy it anew, or write it again:  "
                f"save_packed(model, path)"
            ) from None
        return PackedSize(file.seek(0, 2), tuple(_row(record) for record in records))


def _row(record: Record) -> PackedRow:
    header = record.header
    n, width = header.layout.n_elements, 8 * header.dtype.size
    per_weight = max(1, n)
    side, k = header.side_bytes, header.n_symbols
    has_book = header.kind in ("codebook", "codes")
    eq1 = math.log2(k) + 8 * side / per_weight if k is not None and has_book else float(width)
    stored = side - header.saved_bytes
    literals = side if header.kind == "sparse" else 0
    coded = min(header.entropy_bits * n / 8, float(record.data.length - literals))
    bound = coded + stored if k is not None else float(min(n * width // 8, record.data.length))
    return PackedRow(
        name=header.names[0],
        shape=header.layout.shape,
        dtype=header.dtype.name,
        kind=header.kind,
        n_clusters=k if has_book else None,
        bytes=record.size,
        bits_per_weight=8 * record.size / per_weight,
        entropy_bits=None if k is None else header.entropy_bits,
        eq1_bits=eq1,
        bound=bound,
        zeros=None if k is None else header.zeros / per_weight,
        _stages=_stages(header),
    )


def _stages(header: Header) -> tuple[float, float, float]:
    """Bytes of a tensor as it was, with zeros left out, and clustered."""
    n, size, zeros = header.layout.n_elements, header.dtype.size, header.zeros
    dense, positions = float(n * size), n * entropy(np.array([zeros, n - zeros])) / 8
    pruned = min(dense, positions + (n - zeros) * size)
    k, side = header.n_symbols, header.side_bytes
    if k is None or header.kind == "sparse":
        return dense, pruned, pruned
    among_others = math.log2(max(1, k - 1)) if zeros else math.log2(k)
    indices = min(n * math.log2(k) / 8, positions + (n - zeros) * among_others / 8)
    return dense, pruned, indices + side


def _cells(row: PackedRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (
        row.name,
        f"{shape} {row.dtype}",
        row.kind,
        "" if row.n_clusters is None else str(row.n_clusters),
        "" if not row.zeros else f"{row.zeros:.1%}",
        "" if row.entropy_bits is None else f"{row.entropy_bits:.3f}",
        f"{row.eq1_bits:.2f}",
        f"{row.bits_per_weight:.3f}",
        f"{row.bytes:,}",
    )


def _bars(stages: dict[str, int]) -> list[str]:
    """The stages as a bar chart of characters."""
    dense = max(1, stages["dense"])
    label = max(map(len, _STAGES.values()))
    digits = max(len(f"{n:,}") for n in stages.values())
    return [
        f"{_STAGES[name]:<{label}}  {n:>{digits},}  {dense / max(1, n):6.1f}x  "
        + "#" * max(1, round(40 * n / dense))
        for name, n in stages.items()
    ]
