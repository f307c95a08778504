"""Sorted values and their prefix sums: all that k-means in one dimension ever looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BLOCK = (
    32  # values per stored prefix sum: 1/32 of the memory, at most 31 values to add up per query
)
_CHUNK = 1 << 16  # values converted to float64 at a time: stays in the second-level cache


class Moments:
    """Prefix sums of weight, weighted value and weighted square over ascending values.

    The sums are of ``u = value * scale - centre``, in float64: `scale` is the power of two that brings the
    largest magnitude near 1, so that neither 1e38 nor a denormal over- or underflows when squared, and
    they run outwards from `centre`, so that one huge outlier costs no digits among the small values.

    Args:
        values: `(n,)` ascending, finite, float32 or float64, n >= 1.
        weights: `(n,)` positive importances in the same order, or None for all ones.
        centre: the value that the sums are taken about; the median by default.
    """

    def __init__(
        self, values: Floats, weights: Floats | None = None, centre: float | None = None
    ) -> None:
        self.values = values
        self.weights = weights
        self.n = len(values)
        largest = max(abs(float(values[0])), abs(float(values[-1])))
        self.scale = float(np.ldexp(1.0, -int(np.frexp(largest)[1]))) if largest else 1.0
        if not np.isfinite(self.scale):  # float64 denormals only
            self.scale = float(np.ldexp(1.0, 1023))
        middle = float(values[self.n // 2]) if centre is None else centre
        self.centre = middle * self.scale
        origin = int(np.searchsorted(values, values.dtype.type(middle))) // _BLOCK
        blocks = self._block_sums()
        self._prefix = np.zeros((3, blocks.shape[1] + 1))
        np.cumsum(blocks[:, origin:], axis=1, out=self._prefix[:, origin + 1 :])
        inward = np.cumsum(blocks[:, :origin][:, ::-1], axis=1)[:, ::-1]
        self._prefix[:, :origin] = -inward

    def _terms(self, start: int, stop: int) -> Float64s:
        """`(3, stop - start)`: weight, weighted u and weighted u squared of some of the values."""
        terms = np.empty((3, stop - start))
        u = self.values[start:stop] * np.float64(self.scale) - self.centre
        terms[0] = 1.0 if self.weights is None else self.weights[start:stop]
        np.multiply(terms[0], u, out=terms[1])
        np.multiply(terms[1], u, out=terms[2])
        return terms

    def _block_sums(self) -> Float64s:
        full = -(-self.n // _BLOCK)
        sums = np.zeros((3, full))
        for start in range(0, self.n, _CHUNK):
            stop = min(start + _CHUNK, self.n)
            terms = self._terms(start, stop)
            whole = (stop - start) // _BLOCK
            first = start // _BLOCK
            sums[:, first : first + whole] = (
                terms[:, : whole * _BLOCK].reshape(3, whole, _BLOCK).sum(axis=2)
            )
            if whole * _BLOCK < stop - start:
                sums[:, first + whole] = terms[:, whole * _BLOCK :].sum(axis=1)
        return sums

    def at(self, positions: Ints) -> Float64s:
        """`(3, *positions.shape)`: the sums over ``values[:position]``, up to a common constant."""
        block, rest = np.divmod(positions, _BLOCK)
        sums = self._prefix[:, block]
        if not rest.any():
            return sums
        offsets = np.arange(_BLOCK - 1)
        reach = np.minimum((block * _BLOCK)[..., None] + offsets, self.n - 1)
        u = self.values[reach] * np.float64(self.scale) - self.centre
        weight = (offsets < rest[..., None]).astype(np.float64)
        if self.weights is not None:
            weight *= self.weights[reach]
        first = weight * u
        sums[0] += weight.sum(axis=-1)
        sums[1] += first.sum(axis=-1)
        sums[2] += (first * u).sum(axis=-1)
        return sums

    def means(self, bounds: Ints, fallback: Float64s) -> Float64s:
        """Weighted mean of each run of values between `bounds`; `fallback` where a run is empty.

        Clipped to the run's own range, so that the mean of equal values is exactly that value.
        """
        weight, first, _ = np.diff(self.at(bounds), axis=1)
        filled = (np.diff(bounds) > 0) & (weight > 0)
        mean = (first / np.where(filled, weight, 1.0) + self.centre) / self.scale
        low = self.values[np.minimum(bounds[:-1], self.n - 1)]
        high = self.values[np.maximum(bounds[1:] - 1, 0)]
        return np.where(filled, np.minimum(np.maximum(mean, low), high), fallback)

    def inertia(self, bounds: Ints, centroids: Float64s) -> float:
        """Weighted sum of squared distances of each run to its centroid, by a second pass."""
        total = 0.0
        for low, high, centroid in zip(bounds[:-1], bounds[1:], centroids, strict=True):
            middle = np.float64(centroid) * self.scale
            for start in range(int(low), int(high), _CHUNK):
                part = slice(start, min(start + _CHUNK, int(high)))
                u = self.values[part] * np.float64(self.scale) - middle
                total += float(np.dot(u if self.weights is None else u * self.weights[part], u))
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float64(total) / self.scale / self.scale)


def run_cost(low: Float64s, high: Float64s) -> Float64s:
    """Within-run sum of squares (paper Eq. 2) between two prefix sums; 0 for an empty run."""
    weight, first, second = high[0] - low[0], high[1] - low[1], high[2] - low[2]
    mean_square = np.divide(first * first, weight, out=np.zeros_like(first), where=weight > 0)
    return np.maximum(second - mean_square, 0.0)
