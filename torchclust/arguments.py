"""What both fits take: validated arguments, and values sorted once."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.moments import Floats
from torchclust.seeding import INITS

MAX_CLUSTERS = 65536


def check_request(n_clusters: int, init: str, max_iter: int, preserve_sparsity: bool) -> None:
    """Refuse what no fit can serve, naming the argument and what was given."""
    if isinstance(n_clusters, bool):
        raise TypeError(f"n_clusters must be an int, got {n_clusters!r} (bool)")
    try:
        operator.index(n_clusters)
    except TypeError:
        kind = type(n_clusters).__name__
        raise TypeError(f"n_clusters must be an int, got {n_clusters!r} ({kind})") from None
    least = 3 if preserve_sparsity else 2
    if n_clusters < least or n_clusters > MAX_CLUSTERS:
        why = " with preserve_sparsity, which takes one for 0" if preserve_sparsity else ""
        raise ValueError(f"n_clusters must be in {least}..{MAX_CLUSTERS}{why}, got {n_clusters}")
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: use one of {', '.join(map(repr, INITS))}")
    if max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}")


def as_tensor(values: Tensor | npt.ArrayLike) -> Tensor:
    data = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    return data if data.is_floating_point() else data.to(torch.float64)


def sort_values(data: Tensor, importance: Any) -> tuple[Floats, Floats | None]:
    """Ascending float32 (float64 stays) copies of the values and their importances."""
    if data.numel() == 0:
        raise ValueError(f"values is empty (shape {tuple(data.shape)}): nothing to cluster")
    wide = data if data.dtype == torch.float64 else data.to(torch.float32)
    flat = wide.reshape(-1).cpu().numpy()
    if importance is None:
        ordered, weights = np.sort(flat), None
    else:
        weight = as_tensor(importance).to(torch.float64)
        if weight.shape != data.shape:
            given, wanted = tuple(weight.shape), tuple(data.shape)
            raise ValueError(f"importance has shape {given}, values has {wanted}: they must agree")
        weights = weight.reshape(-1).cpu().numpy()
        if not (weights >= 0).all() or not np.isfinite(weights).all():
            raise ValueError("importance must be finite and at least 0")
        order = np.argsort(flat)
        ordered, weights = flat[order], weights[order]
        if weights.any():
            ordered, weights = ordered[weights > 0], weights[weights > 0]
        else:
            weights = None
    if not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):
        bad = int((~torch.isfinite(data)).sum())
        raise ValueError(f"values has {bad} NaN or infinite of {data.numel()} elements")
    return ordered, weights
