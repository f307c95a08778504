"""The best partition of sorted values into k runs: dynamic programming, then multigrid.

How good the result is:

- Up to 4096 distinct values: the global optimum, as every boundary between distinct values is a
  candidate. Up to 256 distinct values costs come from a recurrence of positive terms, which cancels
  nothing whatever the values.
- Beyond, up to 512 clusters: the global optimum over 1024 or more candidate boundaries (64 a
  cluster up to 64 clusters, 16 at least), then the optimum over windows around those boundaries on
  ever finer grids, down to single values. Moving the boundaries of the true optimum to candidates
  costs at most ``sum(gap * mass * spread)``: the distance of the two centroids, the weight and the
  mean deviation of the bin hit. That is ``3 (k / candidates)^2`` of the optimum where the density
  varies little within a cluster (7e-4 for 16 clusters), and a third of it on average. So much could
  be lost if a distant partition were almost as good as the one found; the descent to single values
  wins the rest back. Measured against exact solutions the loss is usually 0, at most 2e-5 for 16
  clusters and 4e-5 for 256: benchmarks/fit.py.
- Beyond, over 512 clusters: evenly filled bins, then Lloyd's steps; a local optimum.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from torchclust.fitting.moments import Float64s, Ints, Moments, distinct_starts
from torchclust.fitting.seeding import lloyd, nearest_bounds

_EXACT = 4096  # up to this many distinct values every boundary is a candidate
_FEWEST = 1024  # candidate boundaries where there are more distinct values
_MANY = 512  # clusters beyond which candidates are not weighed but taken
_TABLE = 256  # up to this many distinct values the costs of all runs are tabulated
_HALF_WINDOW = 16  # candidates on either side of each boundary while refining
_LLOYD = 100  # steps, where the optimum is not sought
_WAYS = 4  # rows solved between two known ones at a time: fewer, larger numpy calls than halving
_LEAST = 1e-300


def optimal_bounds(moments: Moments, k: int, *, pinned: bool = False) -> Ints:
    """`(k + 1,)` positions: run i of the best partition is ``values[bounds[i]:bounds[i + 1]]``.

    Args:
        moments: the values, more than k of them distinct.
        k: number of runs.
        pinned: keep the first run's centroid at 0, the centre of the moments; it may be empty.
    """
    starts = distinct_starts(moments.values, _EXACT)
    if starts is not None:
        edges = np.append(starts, moments.n)
        return edges[_best_edges(moments, edges, k, pinned)]
    if k > _MANY:
        return _local_optimum(moments, k, pinned)
    edges = even_candidates(moments, max(_FEWEST, 16 * k, min(64 * k, 4 * _FEWEST)))
    chosen = _best_edges(moments, edges, k, pinned)
    wide = edges[np.minimum(chosen + 4, len(edges) - 1)] - edges[np.maximum(chosen - 4, 0)]
    return _refine(moments, edges[chosen], wide, pinned)


def _local_optimum(moments: Moments, k: int, pinned: bool) -> Ints:
    edges = even_candidates(moments, k + 1 - int(pinned))
    centroids = moments.means(edges, np.zeros(len(edges) - 1))
    if pinned:
        centroids = np.concatenate([[0.0], centroids])
    return nearest_bounds(moments, lloyd(moments, centroids, _LLOYD, pinned=pinned))


def even_candidates(moments: Moments, size: int) -> Ints:
    """`size` positions from 0 to n (fewer if values tie) whose bins have like sums of squares.

    That is how the optimal boundaries themselves lie (as dense as the density to the power 1/3),
    so every cluster gets about as many bins as any other, in the bulk as in the tails. Not
    all free positions are given out at once, because a bin is only known to be uneven once cut.
    """
    edges = np.unique(np.linspace(0, moments.n, max(size // 8, 2), dtype=np.int64))
    while (room := size - len(edges)) > 0:
        sums = moments.at(edges)
        share = np.cbrt(np.maximum(cost_of_runs(sums[:, :-1], sums[:, 1:]), 0.0))
        granted = max(3 * room // 4, min(room, size // 16))
        pieces = (share * (granted / max(float(share.sum()), _LEAST))).astype(np.int64)
        pieces[np.argsort(-share)[: granted - int(pieces.sum())]] += 1
        finer = _split(moments, edges, pieces + 1)
        if len(finer) == len(edges):
            break
        edges = finer
    return edges


def _split(moments: Moments, edges: Ints, pieces: Ints) -> Ints:
    """Cut bin i into `pieces[i]` bins of equal width in value."""
    values, cuts = moments.values, pieces - 1
    low = np.repeat(values[edges[:-1]].astype(np.float64), cuts)
    high = np.repeat(values[edges[1:] - 1].astype(np.float64), cuts)
    first = np.repeat(np.cumsum(cuts) - cuts, cuts)
    share = (np.arange(len(first)) - first + 1) / np.repeat(pieces, cuts)
    at = (low * (1 - share) + high * share).astype(values.dtype)
    return np.union1d(edges, np.searchsorted(values, at, side="right"))


def _best_edges(moments: Moments, edges: Ints, k: int, pinned: bool) -> Ints:
    """Which k + 1 of the edges bound the best k runs."""
    sums = moments.at(edges)
    first = sums[2] - sums[2, 0] if pinned else cost_of_runs(sums[:, :1], sums)
    last = len(edges) - 1
    if last > _TABLE:
        return _divide_and_conquer(first, sums, k)
    table = table_of_costs(*moments.grouped(edges))
    return np.array([0, *_cheapest(first if pinned else table[:, 0], [table] * (k - 1), last)])


def cost_of_runs(low: Float64s, high: Float64s) -> Float64s:
    """Sum of squares within the run between two prefix sums (paper Eq. 2); 0 if it is empty."""
    weight, first = high[0] - low[0], high[1] - low[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, high[2] - low[2] - first * first / weight, 0.0)


def table_of_costs(weight: Float64s, u: Float64s) -> Float64s:
    """`[end, start]`: sum of squares within ``u[start:end]``, infinite where end < start.

    Welford's recurrence, one value at a time appended to all runs that end before it.
    """
    m = len(u)
    table = np.where(np.tri(m + 1, dtype=bool), 0.0, np.inf)
    mass, mean, cost = np.zeros(m), np.zeros(m), np.zeros(m)
    for end in range(1, m + 1):
        runs, added = slice(0, end), weight[end - 1]
        away = u[end - 1] - mean[runs]
        total = mass[runs] + added
        cost[runs] += away * away * (added * (mass[runs] / total))
        mean[runs] += away * (added / total)
        mass[runs] = total
        table[end, runs] = cost[runs]
    return table


def _cheapest(first: Float64s, layers: Iterable[Float64s], last: int) -> list[int]:
    """The cheapest path: `first[i]` to begin at i, then `layer[j, i]` from i to j, up to `last`.

    Returns:
        The place taken before each layer, and `last`.
    """
    total, cuts = first, []
    for layer in layers:
        through = layer + total
        cut = through.argmin(axis=1)
        total = through[np.arange(len(cut)), cut]
        cuts.append(cut)
    path = [last]
    for cut in reversed(cuts):
        path.append(int(cut[path[-1]]))
    return path[::-1]


def _divide_and_conquer(first: Float64s, sums: Float64s, k: int) -> Ints:
    """As `_cheapest` over all runs between edges, in O(k m log m) and without their table.

    Costs are a Monge array: the best last boundary never moves left as the end moves right, so
    each row need only look between the boundaries of two rows already known. An edge before which
    no weight is added that float64 can tell is left out.
    """
    grown = np.maximum.accumulate(sums[0])
    heavy = np.flatnonzero(np.concatenate([[True], grown[1:] > grown[:-1]]))
    heavy[-1] = len(grown) - 1
    total, sums, cuts = first[heavy], sums[:, heavy], []
    rounds = list(_rounds(len(heavy) - 1))
    for _ in range(k - 2):
        total, cut = _append_run(total, sums, rounds)
        cuts.append(cut)
    last = int((total + cost_of_runs(sums, sums[:, -1:])).argmin())  # its run ends at the end alone
    path = [len(heavy) - 1, last]
    for cut in reversed(cuts):
        path.append(int(cut[path[-1]]))
    return np.concatenate([[0], heavy[path[::-1]]])


def _rounds(m: int) -> Iterable[tuple[Ints, Ints, Ints]]:
    """Ends 1..m in rounds, each with the nearest ends already known; m + 1 stands for beyond."""
    stride = _WAYS ** int(np.ceil(np.log(m + 1) / np.log(_WAYS)))
    while stride > 1:
        known, stride = stride, stride // _WAYS
        ends = np.arange(stride, m + 1, stride)
        ends = ends[ends % known != 0]
        below = ends - ends % known
        yield ends, below, np.minimum(below + known, m + 1)


def _append_run(
    total: Float64s, sums: Float64s, rounds: Iterable[tuple[Ints, Ints, Ints]]
) -> tuple[Float64s, Ints]:
    """Append one non-empty run: for every end the least cost and the edge before the new run."""
    weight, first, second = sums
    m = len(total) - 1
    cut = np.zeros(m + 2, dtype=np.int64)
    cut[m + 1] = m - 1
    best, before = total.copy(), total - second
    for ends, below, above in rounds:
        low = cut[below]
        lengths = np.minimum(cut[above], ends - 1) - low + 1
        starts = np.cumsum(lengths) - lengths
        tried = np.arange(starts[-1] + lengths[-1]) + np.repeat(low - starts, lengths)
        square = np.repeat(first[ends], lengths) - first[tried]
        square *= square
        square /= np.repeat(weight[ends], lengths) - weight[tried]
        cost = before[tried] - square
        least = np.minimum.reduceat(cost, starts)
        hits = np.flatnonzero(cost == np.repeat(least, lengths))[::-1]
        cut[ends[np.searchsorted(starts, hits, side="right") - 1]] = tried[hits]
        best[ends] = least + second[ends]
    return best, cut[: m + 1]


def _refine(moments: Moments, bounds: Ints, reach: Ints, pinned: bool) -> Ints:
    """The optimum over a window of candidates around each boundary, ever closer together.

    A boundary that ends up at the rim of its window keeps its spacing for another round. Done when
    all candidates are neighbouring values and no set of boundaries wants to move.
    """
    inner, n = bounds[1:-1], moments.n
    step = np.maximum(1, -(-reach[1:-1] // _HALF_WINDOW))
    offsets = np.array(sorted(range(-_HALF_WINDOW, _HALF_WINDOW + 1), key=abs))
    rims = np.array([[0], [n]]).repeat(len(offsets), axis=1)
    while True:
        places = np.clip(inner[:, None] + step[:, None] * offsets, 0, n)
        choice = _best_places(moments, np.concatenate([rims[:1], places, rims[1:]]), pinned)
        moved = places[np.arange(len(inner)), choice]
        if (step == 1).all() and (moved == inner).all():
            return np.concatenate([[0], inner, [n]])
        at_rim = choice >= 2 * _HALF_WINDOW - 1
        step = np.where(at_rim, 2 * step, np.maximum(1, step // 4))
        inner = moved


def _best_places(moments: Moments, grid: Ints, pinned: bool) -> Ints:
    """A column for each inner row of the grid, such that the runs between its rows cost least."""
    sums = moments.at(grid)
    left, right = sums[:, :-1, None, :], sums[:, 1:, :, None]
    cost = cost_of_runs(left, right)
    if pinned:
        cost[0] = right[2, 0] - left[2, 0]
    cost[grid[1:, :, None] < grid[:-1, None, :]] = np.inf
    return np.array(_cheapest(cost[0, :, 0], cost[1:], 0)[:-1])
