"""Magnitudes sorted by output channel: what an int8 codebook with channel scales is fitted to."""

from __future__ import annotations

import numpy as np

from torchclust.fitting.moments import Float64s, Floats, Ints

GRID = 127  # the largest code

_ENTRIES = 1 << 20  # more weights than this are summed in runs of neighbouring magnitudes
_WEIGHTS_AT_ONCE = 1 << 20
_LEAST = 5e-324


class Channels:
    """Sorted magnitudes ``|w| / peak`` of every channel, with importance and prefix sums.

    Scales are in the same unit: ``scale = ratio * peak``. Squared errors are in units of the
    largest peak's square. A channel of zeros has peak 0 and error 0.

    Args:
        rows: `(O, N)` finite weights.
        weights: `(O, N)` importances, or None for all ones.
    """

    def __init__(self, rows: Floats, weights: Floats | None) -> None:
        self.peak: Float64s = np.abs(rows).max(axis=1).astype(np.float64)
        run = -(-rows.size // _ENTRIES)
        sums = _sums_of_runs(rows, weights, self.peak, run)
        self._sums = sums
        self.share = np.square(self.peak / max(float(self.peak.max()), _LEAST))
        self.magnitude: Float64s = np.divide(
            sums[1], sums[0], out=np.zeros_like(sums[1]), where=sums[0] > 0
        )
        count, self._width = self.magnitude.shape
        self._held = np.minimum(run * np.arange(self._width + 1), rows.shape[1]).astype(np.float64)
        self._first = np.arange(count)[:, None]
        # One ascending array for all channels: a single call then searches in every one of them.
        self._ladder = (np.maximum.accumulate(self.magnitude, axis=1) / 2 + self._first).ravel()
        self._prefix = np.zeros((2, count, self._width + 1))
        np.cumsum(sums[:2], axis=2, out=self._prefix[:, :, 1:])
        self._square = sums[2].sum(axis=1)

    def histogram(self, ratio: Float64s) -> Float64s:
        """`(3, 254)` moments, by half-integer bins, of the magnitudes in units of their scales.

        Giving all of bin j the code c costs ``h[2, j] - 2 c h[1, j] + c^2 h[0, j]``.
        """
        unit = 1.0 / ratio[:, None]
        bins = self._bins(ratio)
        factor = (self.share * np.square(ratio))[:, None]
        mass, first, second = self._sums
        moments = mass * factor, first * (factor * unit), second * self.share[:, None]
        return np.stack([np.bincount(bins, m.ravel(), minlength=2 * GRID) for m in moments])

    def counts(self, ratio: Float64s) -> Float64s:
        """`(254,)` how many weights are in each of `histogram`'s bins."""
        held = np.broadcast_to(np.diff(self._held), self.magnitude.shape)
        return np.bincount(self._bins(ratio), held.ravel(), minlength=2 * GRID).astype(np.float64)

    def _bins(self, ratio: Float64s) -> Ints:
        in_halves = self.magnitude * (2.0 / ratio[:, None])
        bins: Ints = np.minimum(in_halves, 2 * GRID - 1).astype(np.int64).ravel()
        return bins

    def typical(self) -> Float64s:
        """Root mean square of every channel's non-zero magnitudes, above 0 even where all are 0."""
        mass = np.where(self.magnitude > 0, self._sums[0], 0.0).sum(axis=1)
        mean_square = np.divide(self._square, mass, out=np.ones_like(mass), where=mass > 0)
        typical: Float64s = np.sqrt(np.maximum(mean_square, _LEAST))
        return typical

    def pooled(self, ratio: Float64s) -> tuple[Float64s, Float64s]:
        """All non-zero magnitudes in units of their scales, ascending, and what they weigh."""
        u, mass = self.magnitude / ratio[:, None], self._sums[0] * self.share[:, None]
        counts = (u > 0) & (mass > 0)
        order = np.argsort(u[counts])
        return u[counts][order], mass[counts][order]

    def errors(self, codes: Ints, ratio: Float64s) -> tuple[Float64s, Float64s]:
        """Squared error of every channel, and the scale that its present codes would like best.

        Args:
            codes: `(h,)` positive, ascending; 0 is a code besides.
            ratio: `(..., O)` scales.
        """
        known = np.concatenate([[0], codes]).astype(np.float64)
        limits = ratio[..., None] * ((known[1:] + known[:-1]) / 2)
        return self._errors(known, ratio, self._below(limits))

    def priced_errors(
        self, codes: Ints, ratio: Float64s, limits: Float64s, price: Float64s | None = None
    ) -> tuple[Float64s, Float64s, Float64s]:
        """`errors`, and the members of every code, 0 first, where cells end at given limits.

        Args:
            codes: as for `errors`.
            ratio: `(O,)` scales.
            limits: `(O, h)` ends of all cells but the last, ascending, in units of the peaks.
            price: `(h + 1,)` what a member of each code costs besides, 0 first.
        """
        inner = self._below(limits)
        error, better = self._errors(np.concatenate([[0], codes]).astype(float), ratio, inner)
        ends = np.full((len(inner), 1), self._width)
        counts = np.diff(self._held[np.concatenate([0 * ends, inner, ends], axis=1)])
        return (error if price is None else error + counts @ price), better, counts.sum(axis=0)

    def _below(self, limits: Float64s) -> Ints:
        """How many of a channel's runs lie at or below each limit."""
        wanted = np.clip(limits, 0.0, 1.5) / 2 + self._first
        inner: Ints = np.searchsorted(self._ladder, wanted, side="right")
        inner -= self._first * self._width
        return inner

    def _errors(self, known: Float64s, ratio: Float64s, inner: Ints) -> tuple[Float64s, Float64s]:
        sums = self._prefix[:, self._first, inner]
        whole = self._prefix[:, :, -1].reshape(2, *[1] * (sums.ndim - 3), -1, 1)
        last = np.broadcast_to(whole, (*sums.shape[:-1], 1))
        mass, first = np.diff(sums, axis=-1, append=last)
        square = np.einsum("...c,c->...", mass, np.square(known[1:]))
        product = np.einsum("...c,c->...", first, known[1:])
        error = (self._square - ratio * (2 * product - ratio * square)) * self.share
        better = np.divide(product, square, out=ratio.copy(), where=(product > 0) & (square > 0))
        return error, better


def _sums_of_runs(rows: Floats, weights: Floats | None, peak: Float64s, run: int) -> Float64s:
    """`(3, O, ceil(N / run))`: importance, times magnitude, times its square, by sorted runs."""
    count, width = rows.shape
    starts = np.arange(0, width, run)
    sums = np.empty((3, count, len(starts)))
    unit = np.where(peak > 0, peak, 1.0)[:, None]
    at_once = max(1, _WEIGHTS_AT_ONCE // width)
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        magnitude = np.abs(rows[part])
        if weights is None:
            magnitude.sort(axis=1)
            mass = np.ones(magnitude.shape)
        else:
            order = magnitude.argsort(axis=1)
            magnitude = np.take_along_axis(magnitude, order, axis=1)
            mass = np.take_along_axis(weights[part], order, axis=1).astype(np.float64)
        scaled = magnitude / unit[part]
        for power in range(3):
            sums[power, part] = np.add.reduceat(mass, starts, axis=1)
            mass *= scaled
    return sums
