"""Fit one codebook: k shared values for many weights (Deep Compression, section 3, Eq. 2).

In: arrays; nothing here knows about modules. `arguments` sorts the values once, `partition` or
`seeding` read prefix sums of them (`moments`), `nearest` assigns. Out: a `Codebook` of tensors. A
fit is not a training step: it runs on the CPU, and its results return to the device of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.fitting.arguments import (
    as_float_tensor,
    check_rate,
    check_request,
    checked_importance,
    require_finite,
    sort_values,
)
from torchclust.fitting.integer_codebook import IntegerCodebook, fit_integer_codebook
from torchclust.fitting.moments import Float64s, Floats, Moments, distinct_starts, sum_of_squares
from torchclust.fitting.nearest import assign, count_below, midpoints
from torchclust.fitting.partition import optimal_bounds
from torchclust.fitting.priced import Runs, cheapest_runs, price_of, seeded, settle
from torchclust.fitting.seeding import lloyd, seeds

__all__ = ["Codebook", "IntegerCodebook", "assign", "fit_codebook", "fit_integer_codebook"]


@dataclass(frozen=True, eq=False)
class Codebook:
    """The shared values of one tensor and which weight takes which.

    Attributes:
        centroids: `(k',)` ascending and distinct, k' <= n_clusters, in the dtype of the values.
        indices: position in `centroids` of every value, in the values' shape; uint8 for up to 256
            centroids, else int32. The nearest centroid, the lower one of two as near (`assign`);
            with a `rate` the one of the run of values that it is in.
        inertia: weighted sum of squared errors, with the centroids as they are (rounded to float16
            or bfloat16 where the values are).
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
    rate: float = 0.0,
    seed: int = 0,
) -> Codebook:
    """Share at most `n_clusters` values among all of `values`, by k-means in one dimension.

    Args:
        values: float16, bfloat16, float32 or float64, any shape, finite; a tensor on any device, an
            array or a list (integers count as float64). Fitted in float32 or float64, with float64
            sums; magnitudes up to the largest finite one and down to denormals are fine.
        n_clusters: 2 to 65536 (from 3 with `preserve_sparsity`).
        init: `"optimal"`: the least weighted sum of squared errors (paper Eq. 2), exactly so up to
            4096 distinct values and within 1e-4 of it beyond (see `torchclust.fitting.partition`).
            Or seeds for Lloyd's steps: `"linear"`, evenly spaced from the least to the greatest
            value; `"density"`, evenly spaced quantiles, extremes included; `"random"`, distinct
            data points; `"kmeans++"`.
        max_iter: Lloyd's steps after the seeds, 300 as in scikit-learn; 0 keeps the seeds, as TFMOT
            does. `"optimal"` needs none.
        importance: weights of the squared errors, the values' shape, >= 0; None for all equal. All
            zero counts as all equal.
        preserve_sparsity: one centroid is exactly 0 and every zero maps to it. The others are
            shared between negative and positive values in proportion to their counts (half to
            even); a sign with fewer distinct values than its share leaves the rest to the other.
            Values nearer to 0 than to any other centroid map to 0 as well. `"optimal"` is then the
            optimum under these conditions.
        rate: what a bit costs, >= 0, in units of the values' (weighted) variance: minimised is then
            ``inertia / (n * variance) + rate * entropy of the indices``, with `"optimal"` as
            `torchclust.fitting.priced` says, from other seeds by Lloyd's steps with that price.
            Centroids that are not worth their bits are dropped, and with `preserve_sparsity`
            either sign has as many as pay. 0 is plain k-means. Useful are 0.003 (nearly lossless)
            to 0.3 (about one bit a weight).
        seed: of `"random"` and `"kmeans++"`. Equal arguments give equal results.

    Returns:
        The codebook, on the values' device. With fewer distinct values than `n_clusters` every
        distinct value is its own centroid.

    Raises:
        TypeError: `n_clusters` or `max_iter` is no int; `values` are not real floats.
        ValueError: `n_clusters`, `max_iter` or `rate` out of range; `values` empty or not finite;
            unknown `init`; `importance` of another shape, negative or not finite.

    >>> fit_codebook(torch.arange(11.0), 5, init="linear", max_iter=0).centroids
    tensor([ 0.0000,  2.5000,  5.0000,  7.5000, 10.0000])
    >>> fit_codebook([0.0, 0.1, 5.0, 5.2, 9.9], 3).indices
    tensor([0, 0, 1, 1, 2], dtype=torch.uint8)
    >>> fit_codebook([0.0, 0.1, 0.0, 0.0, 0.2, 9.0], 4, rate=0.1).centroids  # two do not pay
    tensor([0.0600, 9.0000], dtype=torch.float64)
    """
    check_request(n_clusters, init, max_iter, preserve_sparsity)
    check_rate(rate)
    data = as_float_tensor("values", values)
    require_finite("values", data)
    importance = checked_importance(importance, data.shape)
    ordered, weights = sort_values(data, importance)
    dead = importance is not None and weights is None
    method = _Method(init, max_iter, np.random.default_rng(seed))
    if rate > 0:
        runs = _fit_priced(ordered, weights, n_clusters, method, rate, preserve_sparsity)
        return _codebook_of(data, ordered, weights, runs, dead)
    if preserve_sparsity:
        positive, nonzero = int((data > 0).sum()), int((data != 0).sum())
        share = round((n_clusters - 1) * (nonzero - positive) / max(nonzero, 1))
        found = _fit_around_zero(ordered, weights, share, n_clusters - 1 - share, method)
    else:
        found = _fit(ordered, weights, n_clusters, method)
    centroids = torch.unique(torch.from_numpy(found).to(data.dtype)) + 0.0  # no -0.0
    return Codebook(
        centroids=centroids.to(data.device),
        indices=assign(data, centroids.to(data.device)),
        inertia=0.0 if dead else _inertia(ordered, weights, centroids),
    )


class _Method(NamedTuple):
    init: str
    max_iter: int
    rng: np.random.Generator


def _fit(values: Floats, weights: Floats | None, k: int, method: _Method) -> Float64s:
    """At most k centroids of ascending values."""
    starts = distinct_starts(values, k if method.init == "optimal" else k - 1)
    if starts is not None:
        return values[starts].astype(np.float64)
    moments = Moments(values, weights)
    if method.init == "optimal":
        bounds = optimal_bounds(moments, k)
        return moments.means(bounds, np.zeros(len(bounds) - 1))
    return lloyd(moments, seeds(method.init, moments, k, method.rng), method.max_iter)


def _fit_priced(
    values: Floats,
    weights: Floats | None,
    k: int,
    method: _Method,
    rate: float,
    preserve_sparsity: bool,
) -> Runs:
    moments = Moments(values, weights, centre=0.0 if preserve_sparsity else None)
    price = price_of(moments, rate)
    if method.init == "optimal":
        return cheapest_runs(moments, k, price, pinned=preserve_sparsity)
    k -= int(preserve_sparsity)
    few = distinct_starts(values, k - 1)
    if few is None:
        start = seeds(method.init, moments, k, method.rng)
    else:
        start = values[few].astype(np.float64)
    runs = seeded(moments, start, pinned=preserve_sparsity)
    return settle(moments, runs, price, method.max_iter)


def _codebook_of(
    data: Tensor, values: Floats, weights: Floats | None, runs: Runs, dead: bool
) -> Codebook:
    """The codebook of runs of the sorted values; runs whose rounded centroids tie are one."""
    centroids = torch.from_numpy(runs.centroids).to(data.dtype) + 0.0  # no -0.0
    first = np.append(True, (centroids[1:] > centroids[:-1]).numpy())
    centroids = centroids[torch.from_numpy(first)]
    bounds = np.append(runs.bounds[:-1][first], runs.bounds[-1])
    inner = bounds[1:-1]
    limits = np.where(inner > 0, values[np.maximum(inner - 1, 0)], -np.inf).astype(values.dtype)
    if runs.zero is not None:  # zeros of importance 0 are not among the sorted values
        below = np.flatnonzero(first)[:-1] < runs.zero
        least = np.nextafter(values.dtype.type(0), values.dtype.type(-1))
        limits = np.where(below, np.minimum(limits, least), np.maximum(limits, 0))
    wide = centroids.double().numpy()
    return Codebook(
        centroids=centroids.to(data.device),
        indices=count_below(data, torch.from_numpy(limits).to(data.device)),
        inertia=0.0 if dead else sum_of_squares(values, weights, bounds, wide),
    )


def _fit_around_zero(
    values: Floats, weights: Floats | None, k_left: int, k_right: int, method: _Method
) -> Float64s:
    """A centroid at 0 and at most so many on either side of it."""
    below = int(np.searchsorted(values, 0.0, side="left"))
    above = int(np.searchsorted(values, 0.0, side="right"))
    left, right = np.ascontiguousarray(-values[:below][::-1]), values[above:]
    total = k_left + k_right
    k_left = min(_distinct(left, total), max(k_left, total - _distinct(right, total)))
    left_weights = None if weights is None else np.ascontiguousarray(weights[:below][::-1])
    right_weights = None if weights is None else weights[above:]
    negative = _fit_above_zero(left, left_weights, k_left, method)
    positive = _fit_above_zero(right, right_weights, total - k_left, method)
    return np.concatenate([-negative[::-1], [0.0], positive])


def _distinct(values: Floats, most: int) -> int:
    """How many distinct values there are, but at most `most`."""
    starts = distinct_starts(values, most) if len(values) else values
    return most if starts is None else len(starts)


def _fit_above_zero(values: Floats, weights: Floats | None, k: int, method: _Method) -> Float64s:
    """At most k centroids of ascending positive values, beside one that stays at 0."""
    if k == 0 or len(values) == 0:
        return np.empty(0)
    starts = distinct_starts(values, k if method.init == "optimal" else k - 1)
    if starts is not None:
        return values[starts].astype(np.float64)
    moments = Moments(values, weights, centre=0.0)
    if method.init == "optimal":
        bounds = optimal_bounds(moments, k + 1, pinned=True)
        return moments.means(bounds, np.zeros(len(bounds) - 1))[1:]
    start = np.concatenate([[0.0], seeds(method.init, moments, k, method.rng)])
    return lloyd(moments, start, method.max_iter, pinned=True)[1:]


def _inertia(values: Floats, weights: Floats | None, centroids: Tensor) -> float:
    """Of the assignment that `assign` makes: the same boundaries, found among sorted values."""
    wide = centroids.to(torch.float64 if values.dtype == np.float64 else torch.float32)
    inner = np.searchsorted(values, midpoints(wide).numpy(), side="right")
    bounds = np.concatenate([[0], inner, [len(values)]])
    return sum_of_squares(values, weights, bounds, wide.double().numpy())
