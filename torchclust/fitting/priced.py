"""The best partition of sorted values when bits cost: entropy-constrained quantization in 1-D.

Minimised is ``sum of squares + price * sum_i n_i log2(n / n_i)`` over the runs i of the values: the
second sum is what an entropy coder spends on the indices (Chou, Lookabaugh and Gray 1989). With n
given, a run's share of it depends on that run alone, so the optimum is a shortest path over the
runs' ends, as without a price. But ``-n log n`` is concave: costs are no Monge array, and every run
between two candidate ends has to be looked at.

How good the result is: up to 1024 distinct values and 512 clusters the global optimum among
partitions into runs. Without importances that is the optimum among all partitions. Beyond, it is
the optimum over 1024 candidate ends, from which Lloyd's steps (ECVQ) then descend to single values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from torchclust.fitting.moments import Float64s, Ints, Moments, distinct_starts
from torchclust.fitting.nearest import priced_midpoints
from torchclust.fitting.partition import cost_of_runs, even_candidates, table_of_costs
from torchclust.fitting.seeding import nearest_bounds

_ENDS = 1024  # candidates, so that a table over pairs of them takes 8 MB
_MANY = 512  # clusters beyond which a local optimum has to do
_STEPS = 100  # of ECVQ, behind the path over candidates


class Runs(NamedTuple):
    """Ascending values cut into runs, each with its centroid.

    Attributes:
        bounds: `(k + 1,)` run i is ``values[bounds[i]:bounds[i + 1]]``; none is empty, but for the
            one at `zero`.
        centroids: `(k,)` ascending.
        zero: the run whose centroid is pinned to 0, or None.
    """

    bounds: Ints
    centroids: Float64s
    zero: int | None


def price_of(moments: Moments, rate: float) -> float:
    """What a bit costs in the moments' own units, from the rate in variances."""
    whole = moments.at(np.array([0, moments.n]))
    return rate * float(cost_of_runs(whole[:, 0], whole[:, 1])) / moments.n


def cheapest_runs(moments: Moments, k: int, price: float, *, pinned: bool = False) -> Runs:
    """The best partition into at most k runs.

    Args:
        moments: the values; with `pinned` their centre is 0.
        k: most runs, the pinned one included.
        price: of a bit, in the moments' units.
        pinned: one run holds all zeros and its centroid is 0.
    """
    if k > _MANY:
        edges = even_candidates(moments, k + 1)
        start = seeded(moments, moments.means(edges, np.zeros(len(edges) - 1)), pinned)
        start = settle(moments, start, 0.0, _STEPS)
        return settle(moments, start, price, _STEPS)
    starts = distinct_starts(moments.values, _ENDS)
    if starts is not None:
        edges = np.append(starts, moments.n)
        table = table_of_costs(*moments.grouped(edges))
    else:
        edges = _whole_ties(moments, even_candidates(moments, _ENDS))
        sums = moments.at(edges)
        table = cost_of_runs(sums[:, None, :], sums[:, :, None])
        table[np.triu_indices(len(table), 1)] = np.inf
    table += price * bits_of_runs(edges[:, None] - edges, moments.n)
    if pinned:
        path, zero = _path_around_zero(moments, edges, table, k, price)
    else:
        path, zero = _trace(*_layers(table, k), len(edges) - 1), None
    found = _without_empty(moments, edges[path], zero)
    return found if starts is not None else settle(moments, found, price, _STEPS)


def seeded(moments: Moments, centroids: Float64s, pinned: bool) -> Runs:
    """Runs around given centroids: their nearest values, whatever a bit costs."""
    zero = None
    if pinned:
        centroids = np.unique(np.append(centroids, 0.0))
        zero = int(np.searchsorted(centroids, 0.0))
    return Runs(nearest_bounds(moments, centroids), centroids, zero)


def settle(moments: Moments, runs: Runs, price: float, steps: int) -> Runs:
    """Assign by distance and price, drop what is empty, average: while that pays, `steps` at most.

    Where importances differ within a run its best end is not where the average value would have it,
    and a step may not pay.
    """
    runs = _kept(runs)
    best = objective(moments, runs, price)
    for _ in range(steps):
        bits = np.log2(moments.n / np.maximum(np.diff(runs.bounds), 1))
        weight = float(np.diff(moments.at(np.array([0, moments.n])))[0, 0]) / moments.n
        limits = priced_midpoints(
            torch.from_numpy(runs.centroids * moments.scale),
            torch.from_numpy(bits),
            torch.tensor(price / weight, dtype=torch.float64),
        ).numpy()
        inner = np.searchsorted(moments.values, _below(limits / moments.scale, moments), "right")
        bounds = np.concatenate([[0], inner, [moments.n]])
        if runs.zero is not None:
            bounds = _around_zeros(moments, bounds, runs.zero)
        moved = _without_empty(moments, bounds, runs.zero)
        cost = objective(moments, moved, price)
        if not cost < best:
            break
        runs, best = moved, cost
    return runs


def _around_zeros(moments: Moments, bounds: Ints, zero: int) -> Ints:
    """The pinned run takes all zeros, however little another run's bits cost."""
    low, high = (int(np.searchsorted(moments.values, 0.0, side)) for side in ("left", "right"))
    return np.concatenate(
        [np.minimum(bounds[: zero + 1], low), np.maximum(bounds[zero + 1 :], high)]
    )


def bits_of_runs(lengths: Ints, n: int) -> Float64s:
    """``n_i log2(n / n_i)`` of every length n_i; 0 where that is not positive."""
    counts = np.maximum(lengths, 0).astype(np.float64)
    bits: Float64s = counts * np.log2(n / np.maximum(counts, 1))
    return bits


def objective(moments: Moments, runs: Runs, price: float) -> float:
    """Of runs whose centroids are given: up to a constant of the values."""
    weight, first, _ = np.diff(moments.at(runs.bounds), axis=1)
    u = runs.centroids * moments.scale - moments.centre
    squares = float((u * (u * weight - 2 * first)).sum())
    return squares + price * float(bits_of_runs(np.diff(runs.bounds), moments.n).sum())


def _layers(table: Float64s, most: int) -> tuple[list[Float64s], list[Ints]]:
    """Least costs to reach every end by up to 0, 1, ... runs, and where the last run starts.

    A run may be empty and then costs nothing, so more runs are never dearer; fewer than `most` are
    returned where more gain nothing.
    """
    total = np.full(len(table), np.inf)
    total[0] = 0.0
    totals: list[Float64s] = [total]
    cuts: list[Ints] = []
    ends = np.arange(len(table))
    for _ in range(most):
        through = table + total
        cut = through.argmin(axis=1)
        total = through[ends, cut]
        if not (total < totals[-1]).any():
            break
        totals.append(total)
        cuts.append(cut)
    return totals, cuts


def _trace(totals: list[Float64s], cuts: list[Ints], end: int) -> list[int]:
    path = [end]
    for cut in reversed(cuts[: len(totals) - 1]):
        path.append(int(cut[path[-1]]))
    return path[::-1]


def _path_around_zero(
    moments: Moments, edges: Ints, table: Float64s, k: int, price: float
) -> tuple[list[int], int]:
    """Runs below and above the one of the zeros, as many on either side as pays; and which it is.

    Paths to the zero run's two ends come from the left and, mirrored, from the right.
    """
    low = np.searchsorted(moments.values, 0.0, "left")
    high = np.searchsorted(moments.values, 0.0, "right")
    below, above = int((edges <= low).sum()), int((edges < high).sum())
    last = len(edges) - 1
    mirrored = table[::-1, ::-1].T
    left = _layers(table[:below, :below], k - 1)
    right = _layers(mirrored[: last + 1 - above, : last + 1 - above], k - 1)
    second = moments.at(edges)[2]
    run = second[None, above:] - second[:below, None]
    run = run + price * bits_of_runs(edges[None, above:] - edges[:below, None], moments.n)
    best, choice = np.inf, (0, 0, 0, 0)
    for taken in range(min(k, len(left[0]))):
        rest = min(k - 1 - taken, len(right[0]) - 1)
        cost = left[0][taken][:, None] + run + right[0][rest][None, ::-1]
        at = int(cost.argmin())
        if cost.flat[at] < best:
            best, choice = float(cost.flat[at]), (taken, rest, *divmod(at, cost.shape[1]))
    taken, rest, begin, end = choice
    before = _trace(left[0][: taken + 1], left[1], begin)
    behind = _trace(right[0][: rest + 1], right[1], last - above - end)
    return [*before, *(last - place for place in reversed(behind))], len(before) - 1


def _without_empty(moments: Moments, bounds: Ints, zero: int | None) -> Runs:
    means = moments.means(bounds, np.zeros(len(bounds) - 1))
    if zero is not None:
        means[zero] = 0.0
    return _kept(Runs(bounds, means, zero))


def _kept(runs: Runs) -> Runs:
    """Only the runs that hold something, and the pinned one."""
    kept = np.diff(runs.bounds) > 0
    zero = runs.zero
    if zero is not None:
        kept[zero] = True
        zero = int(kept[:zero].sum())
    bounds = np.append(runs.bounds[:-1][kept], runs.bounds[-1])
    return Runs(bounds, runs.centroids[kept], zero)


def _whole_ties(moments: Moments, edges: Ints) -> Ints:
    """Ends that part no equal values: both ends of what they would part."""
    values = moments.values
    at = values[np.minimum(edges, moments.n - 1)]
    low, high = np.searchsorted(values, at, "left"), np.searchsorted(values, at, "right")
    rims = np.array([0, moments.n])
    zeros = np.searchsorted(values, 0.0, "left"), np.searchsorted(values, 0.0, "right")
    return np.unique(np.concatenate([low, high[(low < edges)], rims, zeros]))


def _below(limits: Float64s, moments: Moments) -> Float64s:
    """Limits in the values' own precision, none above what it was."""
    rounded = limits.astype(moments.values.dtype)
    down = np.nextafter(rounded, rounded.dtype.type(-np.inf))
    return np.where(rounded > limits, down, rounded)
