"""Fit an int8 codebook with channel scales: the clusters that BatchNorm and Vela leave alone.

``weight[o, ...] = scale[o] * codes[indices[o, ...]]``, the codes integers in [-127, 127], symmetric
about 0 and with 0 among them (DESIGN.md, "The one idea").

The fit alternates two steps. Given the scales, the codes are optimal: a dynamic programme over the
127 magnitudes of the grid, on a histogram whose bins end where the borders between two codes can
lie, at multiples of one half. Given the codes, every channel's scale is searched along a line, then
set to ``<w, code> / <code, code>`` until its assignments settle: the closed form alone stops at a
nearby scale, often several per cent worse. The result is a local optimum; of two starts (the peak
of every channel at code 127, and four times its root mean square) the better one is kept.
benchmarks/fit.py says how far it is from the best of many random starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.fitting.arguments import (
    as_float_tensor,
    check_rate,
    check_request,
    checked_importance,
    flat_array,
    require_finite,
)
from torchclust.fitting.channels import GRID, Channels
from torchclust.fitting.moments import Float64s, Floats, Ints, Moments, distinct_starts
from torchclust.fitting.nearest import count_below, count_below_in_rows, mirrored_limits
from torchclust.fitting.priced_integers import fit_priced, priced_limits, settle_priced
from torchclust.fitting.seeding import seeds

_TRIALS = 33  # scales tried along the line, fewer where codes are many
_REACH = 0.4  # how far the line goes to either side, as a logarithm
_ROUNDS = 30  # of both steps; about five are needed
_SETTLE = 10  # closed-form steps
_GAIN = 1e-6  # relative improvement that is worth another round
_UNTOLD = 1e-9  # of the mean importance
_WEIGHTS_AT_ONCE = 1 << 20
_LIMITS_AT_ONCE = 1 << 13  # of codes, looked up in one call: what small tensors spend time on


@dataclass(frozen=True, eq=False)
class IntegerCodebook:
    """Integer codes shared by one tensor, a scale per output channel, and which weight takes which.

    Attributes:
        codes: `(k',)` int8, ascending, symmetric about 0 and with 0; k' is odd, at most the
            `n_clusters` asked for, and every magnitude is in use.
        scale: `(O,)` float32, positive and finite; for a channel of zeros the median of the others.
        indices: uint8, position in `codes` of every weight, in the weight's shape. The nearest
            code, the lower one of two as near, by ``weight / scale`` in float32.
        inertia: weighted sum of squared errors.
    """

    codes: Tensor
    scale: Tensor
    indices: Tensor
    inertia: float


def fit_integer_codebook(
    weight: Tensor | npt.ArrayLike,
    n_clusters: int,
    *,
    init: str = "optimal",
    max_iter: int = 300,
    importance: Tensor | npt.ArrayLike | None = None,
    preserve_sparsity: bool = False,
    rate: float = 0.0,
    seed: int = 0,
) -> IntegerCodebook:
    """Share at most `n_clusters` integer codes among all of `weight`, with a scale per channel.

    Args:
        weight: `(O, ...)`, output channels first; float16, bfloat16, float32 or float64, finite.
        n_clusters: from 3; an even number gives one code less, and 255 is the most there are.
        init: `"optimal"`: as the module says. The others seed the magnitudes of ``weight / scale``
            with the channel's peak at 127, rounded to the grid, then take Lloyd's steps on the grid
            and in the scales.
        max_iter: Lloyd's steps; 0 keeps the seeds. `"optimal"` needs none.
        importance: weights of the squared errors, the weight's shape, >= 0; None for all equal.
        preserve_sparsity: as it is anyway: 0 is always a code, and zeros always take it.
        rate: what a bit costs, as for `torchclust.fit_codebook` (see
            `torchclust.fitting.priced_integers`); codes that are not worth it are dropped.
        seed: of `"random"` and `"kmeans++"`.

    Returns:
        The codebook, on the weight's device. A tensor of zeros has the one code 0 and scales 1.

    Raises:
        TypeError, ValueError: as `torchclust.fit_codebook`; fewer than 3 clusters.

    >>> weight = torch.tensor([[-2.0, 0.0, 1.0, 2.0], [0.1, -0.1, 0.05, 0.0]])
    >>> book = fit_integer_codebook(weight, 5)
    >>> (book.scale[:, None] * book.codes[book.indices.int()]).allclose(weight, atol=0.01)
    True
    """
    check_request(n_clusters, init, max_iter, preserve_sparsity)
    check_rate(rate)
    if n_clusters < 3:
        raise ValueError(
            f"n_clusters must be at least 3 for an int8 codebook, got {n_clusters}: it holds 0 and "
            "is symmetric about it. For example n_clusters=3"
        )
    data = as_float_tensor("weight", weight)
    importance = checked_importance(importance, data.shape)
    require_finite("weight", data)
    rows = _rows(data)
    given = None if importance is None else _rows(importance)
    weights = None if given is None else _weights_of_rows(rows, given)
    channels = Channels(rows, weights)
    half = min((n_clusters - 1) // 2, GRID)
    limits: Float64s | None = None
    if not channels.peak.any():
        codes, ratio = np.empty(0, dtype=np.int64), np.ones(len(rows))
    elif rate > 0:
        price = rate * _variance(rows, weights) / float(channels.peak.max()) ** 2
        if init == "optimal":
            priced = fit_priced(channels, half, price)
        else:
            start = _lloyd_fit(channels, half, init, max_iter, np.random.default_rng(seed))
            priced = settle_priced(channels, *start, price, max_iter)
        codes, ratio, limits = priced.codes, priced.ratio, priced_limits(channels, priced, price)
    elif init == "optimal":
        codes, ratio = _best_fit(channels, half)
    else:
        codes, ratio = _lloyd_fit(channels, half, init, max_iter, np.random.default_rng(seed))
    return _assigned(data, given, codes, _scales(channels.peak, ratio), limits)


def _variance(rows: Floats, weights: Floats | None) -> float:
    """Weighted, in float64; of values of any magnitude that has a square."""
    wide = rows.astype(np.float64)
    mean = np.average(wide, weights=weights)
    return float(np.average(np.square(wide - mean), weights=weights))


def _weights_of_rows(rows: Floats, importance: Floats) -> Floats | None:
    """Importances of mean 1, of which every channel has some, or None where they say nothing.

    With that mean the price of a bit is in units of the squared errors as they are weighed. A
    channel that has none on what is not 0 gets next to nothing on everything: its scale then suits
    it as far as the codes of the others allow, and it moves none of them.
    """
    told = (importance * (rows != 0)).any(axis=1, keepdims=True)
    if not told.any():
        return None
    return np.where(told, importance / importance.mean(dtype=np.float64), _UNTOLD).astype(
        importance.dtype
    )


def _rows(data: Tensor) -> Floats:
    return flat_array(data).reshape(data.shape[0] if data.dim() else 1, -1)


def _best_fit(channels: Channels, half: int) -> tuple[Ints, Float64s]:
    """Magnitudes of the codes, and every channel's scale in units of its peak."""
    typical = channels.typical()
    starts = np.ones_like(typical), 4 * typical
    fits = [_alternate(channels, half, start / GRID) for start in starts]
    _, codes, ratio = min(fits, key=lambda fit: fit[0])
    return codes, ratio


def _alternate(channels: Channels, half: int, ratio: Float64s) -> tuple[float, Ints, Float64s]:
    """Codes and scales by turns until the error settles, then once more on the finest grid."""
    best = np.inf, np.empty(0, dtype=np.int64), ratio
    for _ in range(_ROUNDS):
        fit = _round(channels, half, ratio)
        if fit[0] >= best[0] * (1 - _GAIN):
            break
        best, ratio = fit, fit[2]
    finest = _round(channels, half, best[2] * (best[1][-1] / GRID))
    return min(finest, best, key=lambda fit: fit[0] * (1 + _GAIN * (GRID - int(fit[1][-1]))))


def _round(channels: Channels, half: int, ratio: Float64s) -> tuple[float, Ints, Float64s]:
    codes = best_magnitudes(channels.histogram(ratio), half)
    error, ratio = _best_scales(channels, codes, ratio)
    return error, codes, ratio


def best_magnitudes(moments: Float64s, half: int) -> Ints:
    """The `half` magnitudes in 1..127 that, beside 0, cost least.

    Args:
        moments: `(3, 254)`, `Channels.histogram`. Two neighbouring codes meet at half their sum: at
            the end of a bin, so each bin has one nearest code and the optimum is exact.
    """
    code = np.arange(GRID + 1)
    each = moments[2] - 2 * code[:, None] * moments[1] + np.square(code)[:, None] * moments[0]
    below = np.concatenate([np.zeros((GRID + 1, 1)), np.cumsum(each, axis=1)], axis=1)
    lower, upper = code, code[:, None]
    meet = np.minimum(lower + upper, 2 * GRID)
    own = below[code, 2 * code]
    between = below[lower, meet] - own + (own[:, None] - below[upper, meet])
    between[lower >= upper] = np.inf
    total, cuts = np.where(code == 0, 0.0, np.inf), []
    for _ in range(half):
        through = between + total
        cut = through.argmin(axis=1)
        total = through[code, cut]
        cuts.append(cut)
    beyond = below[:, -1] - own
    chosen = [int((total + beyond).argmin())]
    for cut in cuts[:0:-1]:
        chosen.append(int(cut[chosen[-1]]))
    return np.array(chosen[::-1])


def _best_scales(channels: Channels, codes: Ints, ratio: Float64s) -> tuple[float, Float64s]:
    trials = min(_TRIALS, max(9, 512 // len(codes)))
    factors = np.exp(np.linspace(-_REACH, _REACH, trials | 1))
    at_once = max(1, _LIMITS_AT_ONCE // (len(ratio) * len(codes)))
    parts = (factors[i : i + at_once, None] for i in range(0, len(factors), at_once))
    errors = np.concatenate([channels.errors(codes, part * ratio)[0] for part in parts])
    ratio = factors[errors.argmin(axis=0)] * ratio
    for _ in range(_SETTLE):
        error, better = channels.errors(codes, ratio)
        if np.allclose(better, ratio, rtol=1e-7, atol=0.0):
            break
        ratio = better
    return float(error.sum()), ratio


def _lloyd_fit(
    channels: Channels, half: int, init: str, max_iter: int, rng: np.random.Generator
) -> tuple[Ints, Float64s]:
    ratio = np.full(len(channels.peak), 1 / GRID)
    u, mass = channels.pooled(ratio)
    starts = distinct_starts(u, half)
    first = u[starts] if starts is not None else seeds(init, Moments(u, mass), half, rng)
    codes = _on_grid(first)
    for _ in range(max_iter):
        _, better = channels.errors(codes, ratio)
        moved = _mean_magnitudes(channels.histogram(better), codes)
        if np.array_equal(moved, codes) and np.allclose(better, ratio, rtol=1e-7, atol=0.0):
            break
        codes, ratio = moved, better
    return codes, ratio


def _mean_magnitudes(moments: Float64s, codes: Ints) -> Ints:
    """Every code moves to the mean of what is nearest to it; an empty one stays."""
    borders = np.concatenate([[0], codes[:-1]]) + codes
    mass, first = np.add.reduceat(moments[:2], borders, axis=1)
    return _on_grid(np.divide(first, mass, out=codes.astype(np.float64), where=mass > 0))


def _on_grid(magnitudes: Float64s) -> Ints:
    return np.unique(np.clip(np.rint(magnitudes), 1, GRID)).astype(np.int64)


def _scales(peak: Float64s, ratio: Float64s) -> Tensor:
    scale = ratio * peak
    present = scale[peak > 0]
    filled = np.where(peak > 0, scale, np.median(present) if len(present) else 1.0)
    limits = torch.finfo(torch.float32)
    return torch.from_numpy(np.clip(filled, limits.tiny, limits.max)).to(torch.float32)


def _assigned(
    data: Tensor,
    weights: Floats | None,
    magnitudes: Ints,
    scale: Tensor,
    limits: Float64s | None,
) -> IntegerCodebook:
    """The codes within whose limits the weights lie; those that no weight takes are dropped.

    Without limits these are the nearest codes, with the scales as rounded.
    """
    codes = np.concatenate([-magnitudes[::-1], [0], magnitudes])
    table = torch.from_numpy(codes).to(data.device)
    if limits is None:
        by_channel = scale.to(data.device).reshape(-1, *[1] * (data.dim() - 1))
        indices = count_below(data.float() / by_channel, (table[1:] + table[:-1]).float() / 2)
    else:
        ends = mirrored_limits(torch.from_numpy(limits).float()).to(data.device)
        indices = count_below_in_rows(data, ends)
    members = torch.bincount(indices.reshape(-1), minlength=len(codes)).cpu().numpy()
    used = (members + members[::-1] > 0) | (codes == 0)
    kept = torch.from_numpy(np.cumsum(used) - 1).to(torch.uint8).to(data.device)
    return IntegerCodebook(
        codes=table[torch.from_numpy(used).to(data.device)].to(torch.int8),
        scale=scale.to(data.device),
        indices=kept[indices.int()],
        inertia=_inertia(_rows(data), weights, scale, codes, indices),
    )


def _inertia(
    rows: Floats, weights: Floats | None, scale: Tensor, codes: Ints, indices: Tensor
) -> float:
    taken = indices.reshape(rows.shape).cpu().numpy()
    by_channel = scale.double().numpy()[:, None]
    at_once = max(1, _WEIGHTS_AT_ONCE // rows.shape[1])
    total = 0.0
    with np.errstate(over="ignore", under="ignore"):
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            square = np.square(rows[part] - by_channel[part] * codes[taken[part]])
            total += float((square if weights is None else square * weights[part]).sum())
    return total
