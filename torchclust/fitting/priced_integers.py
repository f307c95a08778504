"""Int8 codes and channel scales when bits cost: what a row's detail is worth depends on its scale.

Minimised is the squared error plus ``price`` times the bits of all indices, a code's sign taken for
one bit more than its magnitude. As without a price (`torchclust.fitting.integer_codebook`) codes
and scales are fitted by turns, from several starts. Given scales, cells are runs of half-integer
bins and each run takes the integer nearest its mean: a shortest path over their ends finds the best
ones. Given codes, every channel has cells of its own: in units of its scale a bit costs the price
over the scale's square, so that a row of small noise becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from torchclust.fitting.channels import GRID, Channels
from torchclust.fitting.moments import Float64s, Ints
from torchclust.fitting.nearest import priced_midpoints
from torchclust.fitting.priced import bits_of_runs

_ROUNDS = 30  # of both steps; about five are needed
_SETTLE = 10  # steps of assigning, counting and scaling
_TRIALS = 17  # scales tried along a line
_REACH = 0.4  # how far it goes to either side, as a logarithm
_GAIN = 1e-6  # relative improvement that is worth another round


@dataclass(frozen=True, eq=False)
class PricedFit:
    """Codes, what an index of each costs, and scales.

    Attributes:
        cost: squared error plus price times bits.
        codes: `(h,)` positive magnitudes, ascending.
        bits: `(h + 1,)` of an index, code 0 first.
        ratio: `(O,)` scales, in units of the channels' peaks.
    """

    cost: float
    codes: Ints
    bits: Float64s
    ratio: Float64s


def fit_priced(channels: Channels, half: int, price: float) -> PricedFit:
    """At most `half` magnitudes beside 0, with the scales that suit them; a local optimum."""
    typical = channels.typical()
    starts = np.ones_like(typical), 4 * typical, np.full_like(typical, 4 * typical.max())
    fits = [_alternate(channels, half, start / GRID, price) for start in starts]
    return min(fits, key=lambda fit: fit.cost)


def settle_priced(
    channels: Channels, codes: Ints, ratio: Float64s, price: float, steps: int
) -> PricedFit:
    """From given codes and scales: assign, count and scale, `steps` times at most."""
    bits = np.zeros(len(codes) + 1)
    best: PricedFit | None = None
    for _ in range(steps + 1):
        limits = _limits(channels, codes, bits, ratio, price if best else 0.0)
        error, ratio_next, counts = channels.priced_errors(codes, ratio, limits)
        total = float(counts.sum())
        lengths = np.log2(total / np.maximum(counts, 0.5)) + (np.arange(len(counts)) > 0)
        cost = float(error.sum()) + price * float((counts * lengths).sum())
        if best is not None and cost >= best.cost * (1 - _GAIN):
            break
        best = PricedFit(cost, codes, lengths, ratio)
        bits, ratio = lengths, ratio_next
    assert best is not None
    return best


def priced_limits(channels: Channels, fit: PricedFit, price: float) -> Float64s:
    """`(O, h)` magnitudes at which the cells of 0 and of all codes but the last end."""
    ends: Float64s = _limits(channels, fit.codes, fit.bits, fit.ratio, price)
    return ends * channels.peak[:, None]


def _alternate(channels: Channels, half: int, ratio: Float64s, price: float) -> PricedFit:
    best: PricedFit | None = None
    for _ in range(_ROUNDS):
        fit = _round(channels, half, ratio, price)
        if best is not None and fit.cost >= best.cost * (1 - _GAIN):
            break
        best, ratio = fit, fit.ratio
    assert best is not None
    return best


def _round(channels: Channels, half: int, ratio: Float64s, price: float) -> PricedFit:
    codes = _cheapest_codes(channels.histogram(ratio), channels.counts(ratio), half, price)
    fit = settle_priced(channels, codes, ratio, price, _SETTLE)
    factors = np.exp(np.linspace(-_REACH, _REACH, _TRIALS))
    costs = []
    for factor in factors:
        tried = factor * fit.ratio
        limits = _limits(channels, codes, fit.bits, tried, price)
        costs.append(channels.priced_errors(codes, tried, limits, price * fit.bits)[0])
    ratio = factors[np.stack(costs).argmin(axis=0)] * fit.ratio
    moved = settle_priced(channels, codes, ratio, price, _SETTLE)
    return min(fit, moved, key=lambda found: found.cost)


def _limits(
    channels: Channels, codes: Ints, bits: Float64s, ratio: Float64s, price: float
) -> Float64s:
    """`(O, h)` ends of the cells of 0 and of all codes but the last, in units of the peaks."""
    unit = channels.share * np.square(ratio)
    in_codes = price / np.maximum(unit, np.finfo(np.float64).tiny)
    known = torch.from_numpy(np.concatenate([[0.0], codes]))
    middle = priced_midpoints(known, torch.from_numpy(bits), torch.from_numpy(in_codes))
    limits: Float64s = ratio[:, None] * middle.numpy()
    return limits


def _cheapest_codes(moments: Float64s, counts: Float64s, half: int, price: float) -> Ints:
    """The best cells of neighbouring bins, at most `half` beside that of 0, and their codes."""
    mass, first, second = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)
    held = np.append(0.0, np.cumsum(counts))
    in_run = held[:, None] - held
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (first[:, None] - first) / (mass[:, None] - mass)
    code = np.clip(np.rint(np.nan_to_num(mean)), 1, GRID)
    cost = second[:, None] - second - code * (2 * (first[:, None] - first))
    cost += code * code * (mass[:, None] - mass)
    cost += price * (bits_of_runs(in_run, held[-1]) + np.maximum(in_run, 0))
    cost[np.triu_indices(len(cost), 1)] = np.inf
    np.fill_diagonal(cost, 0.0)
    total, cuts = second + price * bits_of_runs(held, held[-1]), []
    for _ in range(half):
        through = cost + total
        cuts.append(through.argmin(axis=1))
        total = through.min(axis=1)
    path = [len(held) - 1]
    for cut in reversed(cuts):
        path.append(int(cut[path[-1]]))
    ends = np.unique(path)
    return np.unique(code[ends[1:], ends[:-1]]).astype(np.int64)
