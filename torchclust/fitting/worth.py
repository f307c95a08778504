"""Weights that are worth no bits: what weight decay and dead ReLUs leave behind becomes 0.

Of a trained network whole output channels may hold 1e-32. An int8 codebook gives every channel a
scale of its own, and would spread such noise over all codes; a compiler then stores it in full,
where plain int8 rounds it to zero. MLPerf Tiny's visual wake words came out 2.4 times larger so.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127
_TRIFLE = 1e-5
"""Of the largest. A channel of weights that small has an output's variance a 10^10th of its
neighbours', which the eps of a BatchNorm behind it buries (1e-5, or 1e-3), and the exporter lets it
become 0."""


def without_noise(weight: Tensor, effect: Tensor) -> Tensor:
    """Set to 0 every weight that does next to nothing to the outputs beside the largest.

    Args:
        weight: floating, finite, any shape.
        effect: what the square of each does to the outputs, the weight's shape, >= 0. Where all of
            it is 0 it says nothing, and all effects are taken for equal.

    Returns:
        The weight itself if all of it matters, else a copy.
    """
    size = weight.detach().abs().double()
    if effect.any():
        size = size * effect.to(size).sqrt()
    return _without(weight, size)


def without_dead_channels(rows: Tensor) -> Tensor:
    """Set to 0 every output channel whose weights are all noise beside the largest of the tensor.

    Single weights of a channel are not looked at: beside its largest they take the code 0 anyway.

    Args:
        rows: `(O, ...)`, output channels first, floating.

    Returns:
        The tensor itself if all of it matters, else a copy.

    >>> without_dead_channels(torch.tensor([[1.0, 2e-9], [1e-32, -2e-32]]))
    tensor([[1.0000e+00, 2.0000e-09],
            [0.0000e+00, 0.0000e+00]])
    """
    if rows.dim() < 2:
        return rows
    dims = tuple(range(1, rows.dim()))
    return _without(rows, rows.detach().abs().double().amax(dims, keepdim=True))


def _without(weight: Tensor, size: Tensor) -> Tensor:
    if weight.numel() == 0 or not torch.isfinite(size).all():
        return weight  # refused where it is fitted
    small = size <= _TRIFLE * size.max()
    return weight.masked_fill(small, 0) if (small & (weight != 0)).any() else weight


def plain_int8_bits(rows: Tensor) -> float:
    """Entropy, bits per weight, of the codes without clustering: a scale per row, round to nearest.

    What a compiler's entropy coder makes of them; clustering has to stay below it.

    Args:
        rows: `(O, ...)`, output channels first, finite.

    >>> plain_int8_bits(torch.tensor([[1.0, -1.0, 1.0, -1.0], [1e-32, 0.0, 0.0, 0.0]]))
    1.5
    """
    flat = rows.detach().reshape(len(rows) if rows.dim() > 1 else 1, -1).double()
    peaks = flat.abs().amax(1, keepdim=True)
    least = (_TRIFLE * peaks.max()).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (flat / peaks.maximum(least) * _LARGEST).round()
    return entropy(torch.bincount(codes.reshape(-1).long() + _LARGEST))


def entropy(counts: Tensor) -> float:
    """Bits per symbol of an empirical distribution."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0  # -0.0 for a single symbol
