"""Sorted values and their prefix sums: all that k-means in one dimension ever looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_RUN = 32  # values per stored prefix sum: an eighth of float32's memory, 31 values to add a query
_SMALL = 4096  # values up to which every prefix sum is stored
_CHUNK = 1 << 15  # values widened to float64 at a time: a multiple of _RUN that stays in the cache
_LEAST = 1e-300


class Moments:
    """Prefix sums of weight, weighted value and weighted square over ascending values.

    Of a few thousand values each is stored, of more those of runs.

    The sums are of ``u = value * scale - centre``, in float64. `scale` is the power of two that
    brings the largest magnitude below 1, so that the square of neither 1e38 nor a denormal leaves
    the range. They run outwards from `centre`: one huge outlier costs no digits among the rest.

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
        self.scale = _power_of_two(max(abs(float(values[0])), abs(float(values[-1]))))
        self._weight_scale = 1.0 if weights is None else _power_of_two(float(weights.max()))
        middle = float(values[self.n // 2]) if centre is None else centre
        self.centre = middle * self.scale
        origin = int(np.searchsorted(values, values.dtype.type(middle)))
        self._run = 1 if self.n <= _SMALL else _RUN
        terms = self._terms(slice(None)) if self._run == 1 else self._sums_of_runs()
        self._prefix = outward_sums(terms, origin // self._run)

    def at(self, positions: Ints) -> Float64s:
        """`(3, *positions.shape)`: sums over ``values[:position]``, but for a common constant.

        Only their differences mean something: the moments of the values between two positions.
        """
        run, rest = np.divmod(positions, self._run)
        sums = np.empty((3, *positions.shape))
        sums[0] = positions
        sums[3 - len(self._prefix) :] = self._prefix[:, run]
        if rest.any():
            offsets = np.arange(_RUN - 1)
            inside = offsets < rest[..., None]
            reach = np.minimum((run * _RUN)[..., None] + offsets, self.n - 1)
            terms = self._terms(reach)
            sums[3 - len(terms) :] += np.where(inside, terms, 0.0).sum(axis=-1)
        return sums

    def grouped(self, edges: Ints) -> tuple[Float64s, Float64s]:
        """Weight and scaled, centred value of every bin of equal values between `edges`."""
        u = self._scaled(edges[:-1]) - self.centre
        if self.weights is None:
            return np.diff(edges).astype(np.float64), u
        weight = np.add.reduceat(self.weights, edges[:-1], dtype=np.float64) * self._weight_scale
        return np.maximum(weight, _LEAST), u

    def means(self, bounds: Ints, fallback: Float64s) -> Float64s:
        """Weighted mean of each run of values between `bounds`; `fallback` where a run is empty.

        Clipped to the run's own range, so that the mean of equal values is exactly that value.
        """
        weight, first, _ = np.diff(self.at(bounds), axis=1)
        filled = np.diff(bounds) > 0
        offset = np.divide(first, weight, out=np.zeros_like(first), where=weight > 0)
        mean = (offset + self.centre) / self.scale
        low = self.values[np.minimum(bounds[:-1], self.n - 1)]
        high = self.values[np.maximum(bounds[1:] - 1, 0)]
        return np.where(filled, np.minimum(np.maximum(mean, low), high), fallback)

    def _scaled(self, part: slice | Ints) -> Float64s:
        scaled: Float64s = self.values[part].astype(np.float64)
        scaled *= self.scale
        return scaled

    def _weight(self, part: slice | Ints) -> Float64s:
        assert self.weights is not None
        return self.weights[part].astype(np.float64) * self._weight_scale

    def _terms(self, part: slice | Ints) -> Float64s:
        """`([weight,] weight * u, weight * u^2)`; an unweighted value's weight is its count."""
        u = self._scaled(part)
        u -= self.centre
        if self.weights is None:
            return np.stack([u, u * u])
        weight = self._weight(part)
        return np.stack([weight, weight * u, weight * u * u])

    def _sums_of_runs(self) -> Float64s:
        """The terms, summed over every `_RUN` values.

        By einsum, which is no BLAS: threads started for a few microseconds' work wait for a core.
        """
        rows = 2 if self.weights is None else 3
        sums = np.zeros((rows, -(-self.n // _RUN)))
        for start in range(0, self.n, _CHUNK):
            part = slice(start, min(start + _CHUNK, self.n))
            at, whole = start // _RUN, (part.stop - start) // _RUN
            if whole * _RUN < part.stop - start:
                sums[:, at + whole] = self._terms(part)[:, whole * _RUN :].sum(axis=1)
            u = self._scaled(slice(start, start + whole * _RUN)).reshape(whole, _RUN)
            u -= self.centre
            into = sums[:, at : at + whole]
            if self.weights is None:
                np.einsum("ij->i", u, out=into[0])
                np.einsum("ij,ij->i", u, u, out=into[1])
            else:
                weight = self._weight(slice(start, start + whole * _RUN)).reshape(whole, _RUN)
                np.einsum("ij->i", weight, out=into[0])
                weighted = weight * u
                np.einsum("ij->i", weighted, out=into[1])
                np.einsum("ij,ij->i", weighted, u, out=into[2])
        return sums


def outward_sums(terms: Float64s, origin: int) -> Float64s:
    """`(..., n + 1)` prefix sums of `(..., n)` that are 0 at `origin`, negative before it.

    >>> outward_sums(np.array([1.0, 2.0, 3.0]), 1)
    array([-1.,  0.,  2.,  5.])
    """
    prefix = np.zeros((*terms.shape[:-1], terms.shape[-1] + 1))
    np.cumsum(terms[..., origin:], axis=-1, out=prefix[..., origin + 1 :])
    prefix[..., :origin] = -np.cumsum(terms[..., :origin][..., ::-1], axis=-1)[..., ::-1]
    return prefix


def sum_of_squares(
    values: Floats, weights: Floats | None, bounds: Ints, centroids: Float64s
) -> float:
    """Weighted squared distances of every run of values between `bounds` to its centroid, summed.

    Infinite or 0 where the sum itself is out of float64's range.
    """
    scale = _power_of_two(max(abs(float(values[0])), abs(float(values[-1]))))
    weight_scale = 1.0 if weights is None else _power_of_two(float(weights.max()))
    total = np.zeros(())
    for low, high, centroid in zip(bounds[:-1], bounds[1:], centroids, strict=True):
        for start in range(int(low), int(high), _CHUNK):
            part = slice(start, min(start + _CHUNK, int(high)))
            u = values[part].astype(np.float64)
            u *= scale
            u -= centroid * scale
            mass = u if weights is None else u * (weights[part] * np.float64(weight_scale))
            total += np.einsum("i,i->", u, mass)  # no BLAS: see `_sums_of_runs`
    with np.errstate(over="ignore", under="ignore"):
        return float(total / weight_scale / scale / scale)


def distinct_starts(values: Floats, limit: int) -> Ints | None:
    """Where each distinct one of the ascending values begins; None if there are over `limit`."""
    found, count = [np.zeros(1, dtype=np.int64)], 1
    for start in range(1, len(values), _CHUNK):
        part = values[start - 1 : start + _CHUNK]
        changes = np.flatnonzero(part[1:] != part[:-1]) + start
        found.append(changes)
        count += len(changes)
        if count > limit:
            return None
    return np.concatenate(found)


def powers_of_two(largest: Floats) -> Float64s:
    """The factors that bring magnitudes into [0.5, 1), as far as float64 has them; 1 for 0."""
    exponents = np.frexp(largest)[1]
    powers: Float64s = np.ldexp(1.0, np.minimum(-exponents, 1023))
    return np.where(largest == 0, 1.0, powers)


def _power_of_two(largest: float) -> float:
    return float(powers_of_two(np.array(largest)))
