"""Fit one codebook: k shared values for many weights (Deep Compression, section 3, Eq. 2).

Arrays in, tensors out; nothing here knows about modules. Fitting happens on the CPU, in float64
sums over values sorted once; the results return to the device of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.arguments import as_tensor, check_request, sort_values
from torchclust.integer_codebook import IntegerCodebook, fit_integer_codebook
from torchclust.moments import Float64s, Floats, Moments
from torchclust.nearest import assign
from torchclust.partition import optimal_bounds
from torchclust.seeding import lloyd, nearest_bounds, seeds

__all__ = ["Codebook", "IntegerCodebook", "assign", "fit_codebook", "fit_integer_codebook"]


@dataclass(frozen=True, eq=False)
class Codebook:
    """The shared values of one tensor and which weight takes which.

    Attributes:
        centroids: `(k',)` ascending and distinct, k' <= n_clusters, in the dtype of the values.
        indices: position in `centroids` of every value, in the values' shape; uint8 for up to 256
            centroids, else int32.
        inertia: weighted sum of squared errors.
    """

    centroids: Tensor
    indices: Tensor
    inertia: float


def fit_codebook(
    values: Tensor | npt.ArrayLike,
    n_clusters: int,
    *,
    init: str = "optimal",
    max_iter: int = 300,
    importance: Tensor | npt.ArrayLike | None = None,
    preserve_sparsity: bool = False,
    seed: int = 0,
) -> Codebook:
    """Share at most `n_clusters` values among all of `values`, by k-means in one dimension.

    >>> fit_codebook(torch.arange(11.0), 5, init="linear", max_iter=0).centroids
    tensor([ 0.0000,  2.5000,  5.0000,  7.5000, 10.0000])
    """
    check_request(n_clusters, init, max_iter, preserve_sparsity)
    data = as_tensor(values)
    ordered, weights = sort_values(data, importance)
    rng = np.random.default_rng(seed)
    if preserve_sparsity:
        found = _fit_around_zero(ordered, weights, n_clusters, init, max_iter, rng)
    else:
        found = _fit_side(ordered, weights, n_clusters, init, max_iter, rng, pinned=False)
    centroids = torch.unique(torch.from_numpy(found).to(data.dtype))
    rounded = centroids.to(torch.float64).numpy()
    moments = Moments(ordered, weights)
    return Codebook(
        centroids=centroids.to(data.device),
        indices=assign(data, centroids.to(data.device)),
        inertia=moments.inertia(nearest_bounds(moments, rounded), rounded),
    )


def _fit_side(
    values: Floats,
    weights: Floats | None,
    k: int,
    init: str,
    max_iter: int,
    rng: np.random.Generator,
    *,
    pinned: bool,
) -> Float64s:
    """Centroids of ascending values; with `pinned` a centroid at 0 comes first, on top of the k."""
    zero = np.zeros(int(pinned))
    distinct = _few_distinct(values, k)
    if distinct is not None:
        return np.concatenate([zero, distinct])
    moments = Moments(values, weights, centre=0.0 if pinned else None)
    if init == "optimal":
        bounds = optimal_bounds(moments, k + int(pinned), pinned=pinned)
        means = moments.means(bounds, np.zeros(len(bounds) - 1))
        return np.concatenate([zero, means[int(pinned) :]])
    start = np.concatenate([zero, seeds(init, moments, k, rng)])
    return lloyd(moments, start, max_iter, pinned=pinned)


def _few_distinct(values: Floats, k: int) -> Float64s | None:
    """The distinct values if there are at most k of them."""
    found, at = [], 0
    while at < len(values):
        if len(found) == k:
            return None
        found.append(float(values[at]))
        at = int(np.searchsorted(values, values[at], side="right"))
    return np.array(found)


def _fit_around_zero(
    values: Floats,
    weights: Floats | None,
    n_clusters: int,
    init: str,
    max_iter: int,
    rng: np.random.Generator,
) -> Float64s:
    """One centroid at 0; the others shared out in proportion to the counts of either sign."""
    below = int(np.searchsorted(values, 0.0, side="left"))
    above = len(values) - int(np.searchsorted(values, 0.0, side="right"))
    left = -values[:below][::-1], None if weights is None else weights[:below][::-1]
    right = values[len(values) - above :], None if weights is None else weights[-above:]
    free = n_clusters - 1
    k_left = round(free * below / max(below + above, 1))
    sides = []
    for (side, side_weights), k in ((left, k_left), (right, free - k_left)):
        if len(side) and k:
            sides.append(_fit_side(side, side_weights, k, init, max_iter, rng, pinned=True)[1:])
        else:
            sides.append(np.empty(0))
    return np.concatenate([-sides[0][::-1], [0.0], sides[1]])
