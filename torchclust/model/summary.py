"""What a model's clusterings amount to: a table for the terminal, a dict, and a plot.

In: a model, clustered or not. `slots` says of every tensor how it is clustered or why it is not,
`clustering` what it holds now. Out: a `Summary` of rows, from which all three are drawn.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchclust.fitting.nearest import in_rows
from torchclust.fitting.worth import entropy
from torchclust.model.clustering import Clustering, count_distinct, named_clusterings
from torchclust.model.rules import Decision
from torchclust.model.slots import decisions
from torchclust.weight.config import ClusterConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TensorRow:
    """One parameter tensor of a model.

    Attributes:
        name: the parameter's name.
        shape: of the weight.
        n_clusters: most values per codebook; None where the tensor is not clustered, as for
            ``codebook_dtype``, ``entropy_bits`` and ``error``.
        codebook_dtype: ``"float32"`` or ``"int8"``.
        distinct: values that occur. Of an int8 codebook its codes, with one codebook per channel
            or group those of the fullest.
        entropy_bits: bits per weight that an entropy coder can reach for the indices alone:
            their empirical entropy.
        bits_per_weight: Deep Compression, Eq. 1, without entropy coding: ``log2 k`` plus the
            codebooks' (and scales') share; the dtype's width where the tensor is not clustered.
        rate: Eq. 1's compression rate, the dtype's width over ``bits_per_weight``.
        error: ``||weight - clustered|| / ||weight||`` when the codebook was fitted.
        skipped: why the tensor is not clustered, else None.
    """

    name: str
    shape: tuple[int, ...]
    n_clusters: int | None
    codebook_dtype: str | None
    distinct: int
    entropy_bits: float | None
    bits_per_weight: float
    rate: float
    error: float | None
    skipped: str | None

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """A model's tensors as a table: ``print`` it, or read `rows`, `to_dict` and `plot`.

    Attributes:
        rows: every parameter tensor in the model's order, clustered or not.
    """

    rows: tuple[TensorRow, ...]
    _weights: dict[str, tuple[Tensor, Clustering]] = dataclasses.field(repr=False, compare=False)

    @property
    def rate(self) -> float:
        """Deep Compression's Eq. 1 over the whole model: bits before over bits after."""
        before = sum(row.n_elements * row.bits_per_weight * row.rate for row in self.rows)
        after = sum(row.n_elements * row.bits_per_weight for row in self.rows)
        return before / after if after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The rows and the total rate as plain values, ready for JSON."""
        return {"tensors": [dataclasses.asdict(row) for row in self.rows], "rate": self.rate}

    def plot(self) -> Figure:
        """Histograms of the clustered weights with their centroids marked.

        Returns:
            A matplotlib figure, one panel a tensor; of an int8 codebook in units of the scale.

        Raises:
            ImportError: without matplotlib, naming the install command.
            ValueError: if nothing is clustered.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'plot() draws with matplotlib:  pip install "torchclust[recipes]"'
            ) from error
        if not self._weights:
            raise ValueError("nothing to plot: no tensor is clustered; call cluster_(model) first")
        figure = Figure(figsize=(7, 1.9 * len(self._weights)), layout="constrained")
        panels = figure.subplots(len(self._weights), 1, squeeze=False)[:, 0]
        for axes, (name, (weight, clustering)) in zip(panels, self._weights.items(), strict=True):
            _plot_tensor(axes, name, weight, clustering)
        return figure

    def __str__(self) -> str:
        header = ("tensor", "shape", "clusters", "distinct", "entropy", "bits", "rate", "error", "")
        body = [_cells(row) for row in self.rows]
        total = ("total", f"{sum(row.n_elements for row in self.rows)} weights", *[""] * 4)
        lines = [header, *body, (*total, f"{self.rate:.1f}x", "", "")]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, 1, 8) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def summary(model: nn.Module) -> Summary:
    """Describe every parameter tensor of a model: clustered how, at what cost, or skipped why.

    Args:
        model: clustered or not; it stays unchanged.

    Example:
        >>> from torchclust import cluster_
        >>> row = summary(cluster_(torch.nn.Linear(32, 32), 4)).rows[0]
        >>> row.name, row.n_clusters, row.distinct, round(row.rate, 1)
        ('weight', 4, 4, 15.1)
    """
    clusterings = dict(named_clusterings(model))
    found = decisions(model)
    return Summary(
        tuple(
            _row(name, value, decision, clusterings.get(name)) for name, value, decision in found
        ),
        {name: (value, clusterings[name]) for name, value, _ in found if name in clusterings},
    )


def _row(name: str, value: Tensor, decision: Decision, clustering: Clustering | None) -> TensorRow:
    width = 8 * value.element_size()
    n_elements = max(1, value.numel())
    if clustering is None:
        distinct = 0 if value.is_meta else count_distinct(value)
        return TensorRow(
            name, tuple(value.shape), None, None, distinct, None, width, 1.0, None, decision.skipped
        )
    config, indices = clustering.config, clustering.indices
    bits = math.log2(_codebook_size(config)) + _codebook_bits(clustering, width) / n_elements
    return TensorRow(
        name=name,
        shape=tuple(value.shape),
        n_clusters=config.n_clusters,
        codebook_dtype=config.codebook_dtype,
        distinct=distinct_values(clustering, indices),
        entropy_bits=entropy(torch.bincount(indices.reshape(-1))),
        bits_per_weight=bits,
        rate=width / bits,
        error=clustering.fit_error,
        skipped=None,
    )


def _codebook_size(config: ClusterConfig) -> int:
    if config.codebook_dtype == "float32":
        return config.n_clusters
    return config.n_clusters - 1 + config.n_clusters % 2


def _codebook_bits(clustering: Clustering, width: int) -> int:
    scale = clustering.scale
    if scale is not None:
        return 8 * _codebook_size(clustering.config) + scale.numel() * width
    return clustering.centroids.numel() * width


def distinct_values(clustering: Clustering, indices: Tensor) -> int:
    """Entries in use; of several codebooks, in the fullest."""
    config = clustering.config
    if config.granularity == "tensor":
        return int((torch.bincount(indices.reshape(-1)) > 0).sum())
    rows = in_rows(indices.transpose(0, clustering.channel_dim))
    return max(len(part.unique()) for part in rows.split(config.group_size or 1))


def _cells(row: TensorRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    if row.n_clusters is None:
        bits = f"{row.bits_per_weight:.0f}"
        return (row.name, shape, "-", "", "", bits, "", "", f"skipped: {row.skipped}")
    return (
        row.name,
        shape,
        f"{row.n_clusters}{' int8' if row.codebook_dtype == 'int8' else ''}",
        str(row.distinct),
        f"{row.entropy_bits:.2f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.rate:.1f}x",
        f"{row.error:.4f}",
        "",
    )


def _plot_tensor(axes: Any, name: str, weight: Tensor, clustering: Clustering) -> None:
    """The weights behind the lookup where they still train, else the clustered values' counts."""
    codes, scale = clustering.codes, clustering.scale
    latent = clustering.latent
    values, unit = (weight if latent is None else latent).float(), "weight"
    centroids = weight.float().unique()
    if codes is not None and scale is not None:
        shape = [1] * weight.dim()
        shape[clustering.channel_dim] = -1
        values, unit = values / scale.float().view(shape), "weight / channel scale"
        centroids = codes.float()
    flat = values.reshape(-1).cpu().numpy()
    if latent is None:
        positions, counts = torch.from_numpy(flat).round(decimals=6).unique(return_counts=True)
        axes.vlines(positions, 0, counts, color="tab:blue", linewidth=3)
    else:
        axes.hist(flat, bins=200, color="tab:blue", alpha=0.5)
    if len(centroids) <= 256:
        axes.plot(centroids.cpu(), [0] * len(centroids), "|", color="tab:red", markersize=14)
    axes.set_title(f"{name}: {len(centroids)} values", fontsize=9, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.set_ylabel("weights", fontsize=8)
    axes.set_yscale("symlog")
