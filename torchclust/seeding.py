"""Seeds for k-means in one dimension (API section 1), and Lloyd's steps on sorted values."""

from __future__ import annotations

import numpy as np

from torchclust.moments import Float64s, Ints, Moments

INITS = ("optimal", "linear", "density", "random", "kmeans++")


def seeds(init: str, moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """At most k ascending, distinct starting centroids by the named rule."""
    low, high = float(moments.values[0]), float(moments.values[-1])
    if init == "linear":
        share = np.linspace(0.0, 1.0, k)
        return np.unique(np.clip(low * (1 - share) + high * share, low, high))
    if init == "density":
        return np.unique(_quantiles(moments, np.linspace(0.0, 1.0, k)))
    if init == "random":
        return _forgy(moments, k, rng)
    return _plus_plus(moments, k, rng)


def _quantiles(moments: Moments, share: Float64s) -> Float64s:
    """Values at these shares of the total weight; numpy.quantile's rule when all weights are equal."""
    values, weights = moments.values, moments.weights
    if weights is None:
        return np.quantile(values.astype(np.float64), share)
    rank = np.cumsum(weights, dtype=np.float64) - weights / 2
    rank = (rank - rank[0]) / max(float(rank[-1] - rank[0]), 1e-300)
    return np.interp(share, rank, values.astype(np.float64))


def _forgy(moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """k distinct values, drawn like data points: a value that occurs twice is twice as likely."""
    values = moments.values
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    drawn = rng.choice(starts, min(k, len(starts)), replace=False, p=counts / len(values))
    return np.sort(values[drawn].astype(np.float64))


def _plus_plus(moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """k-means++: each further seed is drawn with probability proportional to weight x distance^2."""
    values = moments.values.astype(np.float64) * moments.scale
    weights = np.ones(moments.n) if moments.weights is None else moments.weights.astype(np.float64)
    chosen = [float(values[_draw(weights, rng)])]
    distance = np.square(values - chosen[0])
    for _ in range(k - 1):
        potential = weights * distance
        if not potential.any():
            break
        chosen.append(float(values[_draw(potential, rng)]))
        np.minimum(distance, np.square(values - chosen[-1]), out=distance)
    return np.unique(chosen) / moments.scale


def _draw(mass: Float64s, rng: np.random.Generator) -> int:
    total = np.cumsum(mass)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def lloyd(
    moments: Moments, centroids: Float64s, max_iter: int, *, pinned: bool = False
) -> Float64s:
    """Up to `max_iter` rounds of assign-and-average; stops early once nothing moves.

    An empty cluster stays where it is. With `pinned` the first centroid does not move.
    """
    for _ in range(max_iter):
        moved = moments.means(nearest_bounds(moments, centroids), centroids)
        if pinned:
            moved[0] = centroids[0]
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest_bounds(moments: Moments, centroids: Float64s) -> Ints:
    """`(k + 1,)` positions that part the values at the midpoints; a value on one goes below."""
    middle = (centroids[:-1] / 2 + centroids[1:] / 2).astype(moments.values.dtype)
    inner = np.searchsorted(moments.values, middle, side="right")
    return np.concatenate([[0], inner, [moments.n]])
