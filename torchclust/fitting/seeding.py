"""Seeds for k-means in one dimension (API section 1), and Lloyd's steps on sorted values."""

from __future__ import annotations

import numpy as np

from torchclust.fitting.moments import Float64s, Ints, Moments

INITS = ("optimal", "linear", "density", "random", "kmeans++")

_PROBES = 64  # positions looked at together while a draw is located


def seeds(init: str, moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """At most k ascending, distinct starting centroids.

    Args:
        init: `"linear"`: evenly spaced from the least to the greatest value. `"density"`: the
            quantiles at evenly spaced shares, 0 and 1 included, of the (weighted) distribution.
            `"random"`: Forgy, distinct values drawn like data points. `"kmeans++"`: each further
            seed drawn with probability proportional to weight times squared distance to the
            nearest one before (Arthur and Vassilvitskii 2007).
        moments: the values, at least k of them distinct.
        k: number of seeds.
        rng: of `"random"` and `"kmeans++"`; the others do not draw.
    """
    if init == "linear":
        return _linear(moments, k)
    if init == "density":
        return np.unique(_quantiles(moments, np.linspace(0.0, 1.0, k)))
    if init == "random":
        return _forgy(moments, k, rng)
    return _plus_plus(moments, k, rng)


def _linear(moments: Moments, k: int) -> Float64s:
    low, high = float(moments.values[0]), float(moments.values[-1])
    if k == 1:  # one side of a pinned zero: the far end, as in TFMOT
        return np.array([high])
    halves = np.linspace(low / 2, high / 2, k)  # high - low may be out of range, half of it is not
    return np.unique(np.clip(2 * halves, low, high))


def _quantiles(moments: Moments, share: Float64s) -> Float64s:
    """Values at these shares of the weight, linear in between; as numpy.quantile if unweighted."""
    values, weights = moments.values, moments.weights
    if weights is None:
        place = share * (moments.n - 1)
    else:
        rank = np.cumsum(weights, dtype=np.float64) - weights / 2
        rank -= rank[0]
        place = np.interp(share * rank[-1], rank, np.arange(moments.n))
    below = np.minimum(place.astype(np.int64), moments.n - 2)
    part = place - below
    low, high = values[below].astype(np.float64), values[below + 1].astype(np.float64)
    between: Float64s = low * (1 - part) + high * part
    return between


def _forgy(moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """A value that occurs twice is twice as likely, but is drawn once."""
    values = moments.values
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    share = np.diff(np.append(starts, moments.n)) / moments.n
    drawn = rng.choice(starts, k, replace=False, p=share)
    return np.sort(values[drawn].astype(np.float64))


def _plus_plus(moments: Moments, k: int, rng: np.random.Generator) -> Float64s:
    """k-means++ on prefix sums: a draw costs O(k + log n), not O(n)."""
    whole = np.array([1.0, 0.0, 0.0])
    chosen = {_draw(moments, (0, moments.n), whole, rng)}
    for _ in range(k - 1):
        centroids = np.array(sorted(chosen))
        bounds = nearest_bounds(moments, centroids)
        u = centroids * moments.scale - moments.centre
        square_distance = np.stack([u * u, -2 * u, np.ones(len(u))])
        mass = np.cumsum(np.maximum((np.diff(moments.at(bounds)) * square_distance).sum(axis=0), 0))
        cell = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
        cell = min(cell, len(u) - 1)
        run = int(bounds[cell]), int(bounds[cell + 1])
        chosen.add(_draw(moments, run, square_distance[:, cell], rng))
    return np.array(sorted(chosen))


def _draw(
    moments: Moments, run: tuple[int, int], factors: Float64s, rng: np.random.Generator
) -> float:
    """A value of the run [low, high), as likely as factors @ (weight, weight u, weight u^2)."""
    low, high = run
    target = rng.random()
    base: Float64s | None = None
    while high - low > 1:
        probes = np.unique(np.linspace(low, high, _PROBES, dtype=np.int64))
        sums = moments.at(probes)
        if base is None:
            base = sums[:, 0]
            target *= float(factors @ (sums[:, -1] - base))
        mass = np.maximum.accumulate(factors @ (sums - base[:, None]))
        at = int(np.searchsorted(mass[1:-1], target, side="right"))
        low, high = int(probes[at]), int(probes[at + 1])
    return float(moments.values[low])


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
    middle = centroids[:-1] / 2 + centroids[1:] / 2
    limits = middle.astype(moments.values.dtype)
    limits = np.where(limits > middle, np.nextafter(limits, limits.dtype.type(-np.inf)), limits)
    inner = np.searchsorted(moments.values, limits, side="right")
    return np.concatenate([[0], inner, [moments.n]])
