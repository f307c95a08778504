"""Fit an int8 codebook with per-channel scales: the clusters that BatchNorm and Vela leave alone.

``weight[o, ...] ~ scale[o] * codes[indices[o, ...]]`` with integer codes in [-127, 127], symmetric
about 0 and containing 0 (DESIGN.md, "The one idea").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchclust.arguments import check_request
from torchclust.moments import Float64s, Ints
from torchclust.nearest import assign


@dataclass(frozen=True, eq=False)
class IntegerCodebook:
    """Integer codes shared by one tensor, a scale per output channel, and which weight takes which.

    Attributes:
        codes: `(k',)` int8, ascending, symmetric about 0, containing 0; k' odd, <= n_clusters.
        scale: `(O,)` float32, positive and finite.
        indices: uint8, position in `codes` of every weight, in the weight's shape.
        inertia: weighted sum of squared errors.
    """

    codes: Tensor
    scale: Tensor
    indices: Tensor
    inertia: float


def fit_integer_codebook(
    weight: Tensor,
    n_clusters: int,
    *,
    init: str = "optimal",
    max_iter: int = 300,
    importance: Tensor | None = None,
    preserve_sparsity: bool = False,
    seed: int = 0,
) -> IntegerCodebook:
    """Share at most `n_clusters` int8 codes among all of `weight`; its first dim has the scales."""
    check_request(n_clusters, init, max_iter, preserve_sparsity)
    if n_clusters < 3:
        raise ValueError(f"n_clusters must be at least 3 for an int8 codebook, got {n_clusters}")
    rows = weight.detach().reshape(len(weight), -1).to(torch.float64).cpu().numpy()
    if importance is None:
        weights = np.ones_like(rows)
    else:
        weights = importance.detach().reshape(rows.shape).to(torch.float64).cpu().numpy()
    peak = np.abs(rows).max(axis=1)
    scale = np.where(peak > 0, peak, 1.0) / 127
    half = (n_clusters - 1) // 2
    best = np.inf
    for _ in range(max_iter):
        magnitudes = _best_magnitudes(_histogram(rows, weights, scale), half)
        codes = np.concatenate([-magnitudes[::-1], [0], magnitudes])
        taken = _lookup(rows / scale[:, None], codes)
        error = float((weights * np.square(rows - scale[:, None] * taken)).sum())
        if not error < best * (1 - 1e-9):
            break
        best, kept = error, (codes, scale)
        square = (weights * taken * taken).sum(axis=1)
        product = (weights * taken * rows).sum(axis=1)
        scale = np.where(product > 0, product / np.where(square > 0, square, 1), scale)
    codes, scale = kept
    scale32 = torch.from_numpy(scale).to(torch.float32).clamp(min=1e-38)
    codes8 = torch.from_numpy(codes).to(torch.int8)
    shaped = scale32.to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    return IntegerCodebook(
        codes=codes8.to(weight.device),
        scale=scale32.to(weight.device),
        indices=assign(weight.detach().to(torch.float32) / shaped, codes8.to(weight).float()),
        inertia=best,
    )


def _lookup(values: Float64s, codes: Ints) -> Ints:
    return codes[np.searchsorted((codes[:-1] + codes[1:]) / 2, values)]


def _histogram(rows: Float64s, weights: Float64s, scale: Float64s) -> Float64s:
    """`(3, 128)` sums of weight, |u| and u^2 by rounded magnitude, u = weight / scale."""
    u = np.abs(rows / scale[:, None]).ravel()
    mass = (weights * np.square(scale)[:, None]).ravel()
    bins = np.minimum(np.rint(u), 127).astype(np.int64)
    return np.stack([np.bincount(bins, mass * u**power, minlength=128) for power in range(3)])


def _best_magnitudes(sums: Float64s, count: int) -> Ints:
    """The `count` integers in 1..127 that, with 0, cost least; each bin goes to one integer."""
    code = np.arange(128)
    cost = sums[2] - 2 * code[:, None] * sums[1] + np.square(code)[:, None] * sums[0]
    tally = np.concatenate([np.zeros((128, 1)), np.cumsum(cost, axis=1)], axis=1)
    middle = np.minimum((code[:, None] + code + 1) // 2, 127)
    between = tally[code[:, None], middle] - tally[code[:, None], code[:, None] + 1]
    between += tally[code, code] - tally[code, middle]
    between = between + np.diagonal(cost)
    between[np.tril_indices(128)] = np.inf
    total, cuts = np.where(code == 0, cost[0, 0], np.inf), []
    for _ in range(min(count, 127)):
        through = total[:, None] + between
        cuts.append(through.argmin(axis=0))
        total = through.min(axis=0)
    tail = tally[:, 128] - tally[code, code + 1]
    chosen = [int(np.argmin(total + tail))]
    for cut in reversed(cuts[1:]):
        chosen.append(int(cut[chosen[-1]]))
    return np.array(chosen[::-1])
