"""`preserve_sparsity` beyond 4,096 distinct values a side: against an exhaustive programme."""

import numpy as np
import pytest
from draws import draw
from numpy.typing import NDArray

from torchclust import fit_codebook
from torchclust.fitting.partition import EXACT

ROWS = 256  # ends at a time: the whole table of runs would take a gigabyte


def least_errors_beside_zero(side: NDArray, weights: NDArray, most: int) -> list[float]:
    """Sums of squares of ascending positive values beside 0, with 1 to `most` free centroids.

    Exactly: every boundary of every run is tried, in O(n^2) for each centroid.
    """
    powers = np.stack([weights, weights * side, weights * side**2])
    sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)
    best, found = sums[2], []  # all at 0
    for _ in range(most):
        following = best.copy()
        for low in range(1, len(best), ROWS):
            ends = np.arange(low, min(low + ROWS, len(best)))
            starts = np.arange(ends[-1])
            mass, first, second = sums[:, ends, None] - sums[:, None, starts]
            cost = second - first**2 / np.where(mass > 0, mass, 1)
            cost[starts >= ends[:, None]] = np.inf
            following[ends] = np.minimum(best[ends], (best[starts] + cost).min(axis=1))
        best = following
        found.append(float(best[-1]))
    return found


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [("gauss", False), ("laplace", True), ("two modes", True)],
)
def test_is_within_a_ten_thousandth_of_every_partition(kind: str, weighted: bool) -> None:
    drawn = np.abs(draw(kind, 8_600, seed=7))
    values = np.concatenate([-drawn[::2], drawn[1::2], np.zeros(500)])
    importance = np.random.default_rng(8).exponential(size=len(values))
    weights = importance if weighted else np.ones_like(values)
    least = np.zeros(2)
    for sign in (-1, 1):
        side, of_side = values[values * sign > 0] * sign, weights[values * sign > 0]
        assert len(np.unique(side)) > EXACT
        order = np.argsort(side)
        least += least_errors_beside_zero(side[order], of_side[order], len(least))
    for k, error in zip((3, 5), least, strict=True):
        book = fit_codebook(values, k, preserve_sparsity=True, importance=weights)
        assert (book.centroids < 0).sum() == (book.centroids > 0).sum() == k // 2
        assert error * (1 - 1e-9) <= book.inertia <= error * (1 + 1e-4)


def test_the_reference_finds_what_enumeration_finds() -> None:
    """One and two free centroids on a dozen values: every pair of boundaries, written out."""
    rng = np.random.default_rng(9)
    side, weights = np.sort(rng.exponential(size=12)), rng.exponential(size=12)

    def spread(low: int, high: int) -> float:
        if low == high:
            return 0.0
        part, mass = side[low:high], weights[low:high]
        return float((mass * (part - np.average(part, weights=mass)) ** 2).sum())

    def at_zero(high: int) -> float:
        return float((weights[:high] * side[:high] ** 2).sum())

    one = min(at_zero(i) + spread(i, 12) for i in range(13))
    two = min(at_zero(i) + spread(i, j) + spread(j, 12) for i in range(13) for j in range(i, 13))
    assert least_errors_beside_zero(side, weights, 2) == pytest.approx([one, two])
