"""What happens to a model's clusterings while it trains, as numbers for a logger."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.model.clustering import Clustering, named_clusterings
from torchclust.model.summary import distinct_values, summary


def assignments(model: nn.Module) -> dict[str, Tensor]:
    """Present indices of the tensors whose assignment may change, those with ``"nearest"``."""
    return {
        name: clustering.indices
        for name, clustering in named_clusterings(model)
        if clustering.config.assignment == "nearest"
    }


def measure(
    model: nn.Module, before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> dict[str, float]:
    """Metrics of every clustered tensor: one pass over the indices, another for "nearest".

    Args:
        model: clustered.
        before: `assignments` at an earlier time; what it lacks has not moved.
        now: `assignments` at present.

    Returns:
        ``distinct_values/NAME``: values in use; of several codebooks, in the fullest.
        ``quantization_error/NAME``: ``||weight - clustered|| / ||weight||``, where the weight is
        the one that trains behind a "nearest" lookup, or with "fixed" the one that was fitted.
        ``moved/NAME``, with "nearest" only: the share of weights whose cluster is another one.
    """
    metrics: dict[str, float] = {}
    for name, clustering in named_clusterings(model):
        indices = now.get(name)
        used = clustering.indices if indices is None else indices
        metrics[f"distinct_values/{name}"] = float(distinct_values(clustering, used))
        metrics[f"quantization_error/{name}"] = _error(clustering)
        if indices is not None:
            moved = torch.count_nonzero(indices != before.get(name, indices))
            metrics[f"moved/{name}"] = float(moved) / indices.numel()
    return metrics


@torch.no_grad()
def histograms(model: nn.Module) -> dict[str, Tensor]:
    """The clustered weights by ``weights/NAME``, float32 on the CPU, as a histogram wants them."""
    weights = {
        f"weights/{name}": getattr(clustering.module, clustering.tensor_name)
        for name, clustering in named_clusterings(model)
    }
    return {name: weight.float().cpu() for name, weight in weights.items()}


def write_histograms(loggers: Iterable[Any], model: nn.Module, step: int) -> None:
    """Hand `histograms` to every logger that takes them."""
    for name, weight in histograms(model).items():
        for writer in writers(loggers):
            writer.add_histogram(name, weight, step)


def writers(loggers: Iterable[Any]) -> list[Any]:
    """What the loggers write histograms with: TensorBoard's do, others do not."""
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    return [writer for writer in experiments if hasattr(writer, "add_histogram")]


def announcement(model: nn.Module, *, hint: bool) -> str:
    """What is clustered, as a short table; with ``hint``, how its checkpoints are loaded."""
    found = summary(model)
    clustered = tuple(row for row in found.rows if row.n_clusters is not None)
    table = dataclasses.replace(found, rows=clustered)
    text = f"Clustered {len(clustered)} of {len(found.rows)} tensors:\n{table}"
    name = type(model).__name__
    if not hint:
        return text
    return (
        f"{text}\nCheckpoints hold the clustered model. For {name}.load_from_checkpoint, give "
        f"{name} the line:\n"
        f"    def on_load_checkpoint(self, checkpoint): torchclust.restore_(self, checkpoint)"
    )


@torch.no_grad()
def _error(clustering: Clustering) -> float:
    latent = clustering.latent
    if latent is None:
        return clustering.fit_error
    weight: Tensor = getattr(clustering.module, clustering.tensor_name)
    norm, wide = torch.linalg.vector_norm, torch.promote_types(latent.dtype, torch.float32)
    error = norm(weight - latent, dtype=wide) / norm(latent, dtype=wide)
    return float(error.nan_to_num())  # an all-zero weight has none
