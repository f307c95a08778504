"""Weights that are worth no bits: what weight decay and dead ReLUs leave behind becomes 0.

Of a trained network whole output channels may hold 1e-32. An int8 codebook gives every channel a
scale of its own, and would spread such noise over all codes; a compiler then stores it in full,
where plain int8 rounds it to zero. MLPerf Tiny's visual wake words came out 2.4 times larger so.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BURIED = 1e-10
"""Of the largest weighted square. A channel of weights that small has an output's variance a
10^10th of its neighbours', which the eps of a BatchNorm behind it buries (1e-5, or 1e-3)."""

_LARGEST = 127
_TRIFLE = 1e-5  # of the largest row's peak: what the exporter lets become 0


def without_noise(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Set to 0 what does not matter beside the largest of its tensor.

    Args:
        weight: floating, finite, any shape.
        importance: of the squared errors, the weight's shape, >= 0; None for all equal.

    Returns:
        The weight itself if all of it matters, else a copy.

    >>> without_noise(torch.tensor([[1.0, 0.5], [1e-32, -2e-32]]))
    tensor([[1.0000, 0.5000],
            [0.0000, 0.0000]])
    """
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        return weight  # refused where it is fitted
    size = weight.detach().abs().double()
    if importance is not None and importance.any():
        size = size * importance.to(size).sqrt()
    small = size <= _BURIED**0.5 * size.max()
    return weight.masked_fill(small, 0) if (small & (weight != 0)).any() else weight


def plain_int8_bits(rows: Tensor) -> float:
    """Entropy, bits per weight, of the codes without clustering: a scale per row, round to nearest.

    What a compiler's entropy coder makes of them; clustering has to stay below it.

    Args:
        rows: `(O, ...)`, output channels first, finite.

    >>> plain_int8_bits(torch.tensor([[1.0, -1.0, 1.0, -1.0], [1e-32, 0.0, 0.0, 0.0]]))
    1.5
    """
    flat = rows.detach().reshape(len(rows) if rows.dim() > 1 else 1, -1).float()
    peaks = flat.abs().amax(1, keepdim=True)
    least = (_TRIFLE * peaks.max()).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (flat / peaks.maximum(least) * _LARGEST).round()
    return entropy(torch.bincount(codes.view(-1).long() + _LARGEST))


def entropy(counts: Tensor) -> float:
    """Bits per symbol of an empirical distribution."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0  # -0.0 for a single symbol
