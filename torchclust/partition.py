"""The best partition of sorted values into k runs: exact dynamic programming, then multigrid."""

from __future__ import annotations

import numpy as np

from torchclust.moments import Float64s, Ints, Moments, run_cost

_EXACT = 2048  # this many distinct values or fewer: every boundary is tried
_HALF = 16  # the refinement looks at this many places on either side of each boundary


def optimal_bounds(moments: Moments, k: int, *, pinned: bool = False) -> Ints:
    """`(k + 1,)` positions: run i of the best partition is ``values[bounds[i]:bounds[i + 1]]``.

    With `pinned` the first run keeps its centroid at 0 (and may be empty): the cluster of the zeros.
    """
    n = moments.n
    starts = np.flatnonzero(moments.values[1:] != moments.values[:-1]) + 1
    exact = len(starts) < _EXACT
    edges = np.concatenate([[0], starts, [n]]) if exact else _coarse_edges(moments, k)
    chosen = _best_edges(moments.at(edges), k, pinned)
    bounds = edges[chosen]
    if exact:
        return bounds
    last = len(edges) - 1
    wide = edges[np.minimum(chosen + 2, last)] - edges[np.maximum(chosen - 2, 0)]
    return _refine(moments, bounds, wide, pinned)


def _coarse_edges(moments: Moments, k: int) -> Ints:
    """Positions from 0 to n whose bins all have about the same sum of squares.

    That is the spacing of the optimal boundaries themselves (density to the power 1/3), so every
    cluster gets about as many bins as any other, in the bulk as in the tails.
    """
    size = max(1024, 8 * k)
    edges = np.unique(np.linspace(0, moments.n, size // 8, dtype=np.int64))
    for _ in range(12):
        room = size - len(edges)
        if room < size // 16:
            break
        sums = moments.at(edges)
        share = np.cbrt(run_cost(sums[:, :-1], sums[:, 1:]))
        pieces = (share * (room / max(float(share.sum()), 1e-300))).astype(np.int64) + 1
        finer = _split(moments, edges, pieces)
        if len(finer) == len(edges):
            break
        edges = finer
    return edges


def _split(moments: Moments, edges: Ints, pieces: Ints) -> Ints:
    """Cut bin i into `pieces[i]` bins of equal width in value."""
    values = moments.values
    cuts = pieces - 1
    low, high = values[edges[:-1]].astype(np.float64), values[edges[1:] - 1].astype(np.float64)
    first = np.repeat(np.cumsum(cuts) - cuts, cuts)
    share = (np.arange(len(first)) - first + 1) / np.repeat(pieces, cuts)
    at = np.repeat(low, cuts) * (1 - share) + np.repeat(high, cuts) * share
    return np.union1d(edges, np.searchsorted(values, at.astype(values.dtype), side="right"))


def _best_edges(sums: Float64s, k: int, pinned: bool) -> Ints:
    """Indices of the k + 1 edges that bound the best k runs; layer j extends the best j - 1 runs.

    The cost is a Monge array, so the best last boundary never moves left as the end moves right
    (divide and conquer: O(k m log m)).
    """
    m = sums.shape[1] - 1
    first = sums[2] - sums[2][0] if pinned else run_cost(sums[:, :1], sums)
    costs, cuts = first, []
    for _ in range(k - 1):
        costs, cut = _extend(costs, sums)
        cuts.append(cut)
    chosen = [m]
    for cut in reversed(cuts):
        chosen.append(int(cut[chosen[-1]]))
    return np.array([0, *reversed(chosen)])


def _extend(costs: Float64s, sums: Float64s) -> tuple[Float64s, Ints]:
    """Append one run: for every end the least cost and the boundary before the new run."""
    m = len(costs) - 1
    best, cut = costs.copy(), np.zeros(m + 2, dtype=np.int64)
    cut[m + 1] = m
    stride = 1 << m.bit_length()
    while stride > 1:
        half = stride // 2
        ends = np.arange(half, m + 1, stride)
        low = cut[ends - half]
        high = np.minimum(cut[np.minimum(ends + half, m + 1)], ends)
        lengths = high - low + 1
        starts = np.cumsum(lengths) - lengths
        which = np.repeat(np.arange(len(ends)), lengths)
        tried = np.arange(len(which)) - (starts - low)[which]
        total = costs[tried] + run_cost(sums[:, tried], sums[:, ends[which]])
        least = np.minimum.reduceat(total, starts)
        hits = np.flatnonzero(total == least[which])[::-1]
        best[ends] = least
        cut[ends[which[hits]]] = tried[hits]
        stride = half
    return best, cut[: m + 1]


def _refine(moments: Moments, bounds: Ints, reach: Ints, pinned: bool) -> Ints:
    """Exact dynamic programming among places near each boundary, ever closer together.

    Ends when every boundary has been compared with all its neighbours one value apart and none,
    alone or together with the others, wants to move.
    """
    n, inner = moments.n, bounds[1:-1].copy()
    step = np.maximum(1, -(-reach[1:-1] // _HALF))
    offsets = np.arange(-_HALF, _HALF + 1)
    ends = np.array([[0], [n]]).repeat(len(offsets), axis=1)
    for _ in range(200):
        places = np.clip(inner[:, None] + step[:, None] * offsets, 0, n)
        grid = np.concatenate([ends[:1], places, ends[1:]])
        choice = _best_places(moments.at(grid), grid, pinned)
        moved = places[np.arange(len(inner)), choice]
        if (step == 1).all() and (moved == inner).all():
            break
        outermost = (choice == 0) | (choice == 2 * _HALF)
        step = np.where(outermost, step, np.maximum(1, step // 8))
        inner = moved
    return np.concatenate([[0], inner, [n]])


def _best_places(sums: Float64s, grid: Ints, pinned: bool) -> Ints:
    """One column per row of the grid (its first and last row fixed) such that the runs cost least."""
    left, right = sums[:, :-1, None, :], sums[:, 1:, :, None]
    cost = run_cost(left, right)
    if pinned:
        cost[0] = right[2, 0] - left[2, 0]
    cost[grid[1:, :, None] < grid[:-1, None, :]] = np.inf
    columns = np.arange(grid.shape[1])
    total, cuts = cost[0, :, 0], []
    for layer in cost[1:]:
        through = layer + total
        cut = through.argmin(axis=1)
        total = through[columns, cut]
        cuts.append(cut)
    chosen = [0]
    for cut in reversed(cuts):
        chosen.append(int(cut[chosen[-1]]))
    return np.array(chosen[:0:-1])
