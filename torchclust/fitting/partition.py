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

EXACT = 4096  # up to this many distinct values every boundary is a candidate
_FEWEST = 1024  # candidate boundaries where there are more distinct values
_MANY = 512  # clusters beyond which candidates are not weighed but taken
TABLE = 256  # up to this many distinct values the costs of all runs are tabulated
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
    starts = distinct_starts(moments.values, EXACT)
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
    if last > TABLE:
        return _heavy_runs(first, sums, k)
    table = table_of_costs(*moments.grouped(edges))
    path = cheapest_path(first if pinned else table[:, 0], [table] * (k - 1), last)
    return np.concatenate([[0], path])


def cost_of_runs(low: Float64s, high: Float64s) -> Float64s:
    """Sum of squares within the run between two prefix sums (paper Eq. 2); 0 if it is empty."""
    weight, first = high[0] - low[0], high[1] - low[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, high[2] - low[2] - first * first / weight, 0.0)


def table_of_costs(weight: Float64s, u: Float64s) -> Float64s:
    """`[..., end, start]`: sum of squares within ``u[..., start:end]``, infinite where end < start.

    Welford's recurrence, one value at a time appended to all runs that end before it.
    """
    m = u.shape[-1]
    table = np.where(np.tri(m + 1, dtype=bool), 0.0, np.full((*u.shape[:-1], 1, 1), np.inf))
    mass, mean, cost = np.zeros((3, *u.shape))
    for end in range(1, m + 1):
        runs, added = (..., slice(0, end)), weight[..., end - 1, None]
        away = u[..., end - 1, None] - mean[runs]
        total = mass[runs] + added
        cost[runs] += away * away * (added * (mass[runs] / total))
        mean[runs] += away * (added / total)
        mass[runs] = total
        table[..., end, :end] = cost[runs]
    return table


def cheapest_path(first: Float64s, layers: Iterable[Float64s], last: int) -> Ints:
    """The cheapest path: `first[i]` to begin at i, then `layer[j, i]` from i to j, up to `last`.

    Args:
        first: `(..., m)`, of one problem or of many.
        layers: each `(..., m, m)`.
        last: where all paths end.

    Returns:
        `(..., layers + 1)`: the place taken before each layer, and `last`.
    """
    total, cuts = first, []
    for layer in layers:
        through = layer + total[..., None, :]
        cut = through.argmin(axis=-1)
        total = np.take_along_axis(through, cut[..., None], axis=-1)[..., 0]
        cuts.append(cut)
    return _path_through(cuts, np.full((*first.shape[:-1], 1), last))


def _path_through(cuts: list[Ints], last: Ints) -> Ints:
    """Back from the last place, each cut saying for every place which one came before."""
    path = [last]
    for cut in reversed(cuts):
        path.append(np.take_along_axis(cut, path[-1], axis=-1))
    return np.concatenate(path[::-1], axis=-1)


def _heavy_runs(first: Float64s, sums: Float64s, k: int) -> Ints:
    """`divide_and_conquer`, but for edges before which no weight is added that float64 can tell."""
    grown = np.maximum.accumulate(sums[0])
    heavy = np.flatnonzero(np.concatenate([[True], grown[1:] > grown[:-1]]))
    heavy[-1] = len(grown) - 1
    chosen: Ints = heavy[divide_and_conquer(first[None, heavy], sums[:, None, heavy], k)[0]]
    return chosen


def divide_and_conquer(first: Float64s, sums: Float64s, k: int) -> Ints:
    """As `cheapest_path` over all runs between edges, in O(k m log m) and without their table.

    Costs are a Monge array: the best last boundary never moves left as the end moves right, so
    each row need only look between the boundaries of two rows already known.

    Args:
        first: `(problems, m + 1)` cost of the first run up to every edge.
        sums: `(3, problems, m + 1)` prefix sums at the edges; the weight grows at each.
        k: number of runs.

    Returns:
        `(problems, k + 1)` edges that bound the runs.
    """
    total, cuts = first, [np.zeros(first.shape, dtype=np.int64)]
    rounds = list(_rounds(first.shape[1] - 1))
    for _ in range(k - 2):
        total, cut = _append_run(total, sums, rounds, cuts[-1])
        cuts.append(cut)
    ending = total + cost_of_runs(sums, sums[:, :, -1:])  # the last run ends at the end alone
    path = _path_through(cuts, ending.argmin(axis=1)[:, None])
    return np.concatenate([path, np.full((len(first), 1), first.shape[1] - 1)], axis=1)


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
    total: Float64s, sums: Float64s, rounds: Iterable[tuple[Ints, Ints, Ints]], before: Ints
) -> tuple[Float64s, Ints]:
    """Append one non-empty run: for every end the least cost and the edge before the new run.

    All problems at once, each with its own stretch of candidates: numpy's calls cost more than
    the arithmetic of a small one. The new run begins no earlier than the last of one run less
    (`before`), which leaves about half of a stretch.
    """
    problems, size = total.shape
    weight, first, second = sums.reshape(3, -1)
    cut = np.zeros((problems, size + 1), dtype=np.int64)
    cut[:, size] = size - 2
    best, rest = total.copy(), (total - sums[2]).ravel()
    row = np.arange(problems)[:, None] * size
    for ends, below, above in rounds:
        high = np.minimum(cut[:, above], ends - 1)
        low = np.minimum(np.maximum(cut[:, below], before[:, ends]), high)
        lengths = (high - low + 1).ravel()
        starts = np.cumsum(lengths) - lengths
        begin, at = (low + row).ravel(), (ends + row).ravel()
        problem = np.repeat(np.arange(len(at)), lengths)
        tried = np.arange(len(problem)) + (begin - starts)[problem]
        square = first[at][problem] - first[tried]
        square *= square
        square /= weight[at][problem] - weight[tried]
        cost = rest[tried] - square
        least = np.minimum.reduceat(cost, starts)
        hits = np.flatnonzero(cost == least[problem])[::-1]
        begin[problem[hits]] = tried[hits]
        cut[:, ends] = begin.reshape(problems, -1) - row
        best.reshape(-1)[at] = least + second[at]
    return best, cut[:, :size]


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
    return cheapest_path(cost[0, :, 0], cost[1:], 0)[:-1]
