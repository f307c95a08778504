"""How far second moments of few samples are to be trusted.

With fewer samples than inputs there are directions in which the samples do not vary at all, and
errors there would seem to cost nothing. So moments are drawn towards those of equal and independent
inputs, by the share that makes the expected squared error least: Ledoit and Wolf, "A
well-conditioned estimator for large-dimensional covariance matrices" (2004). What one sample says
of the moments is not one column, as neighbouring positions are alike; parts of the samples are
compared with each other instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def covariances(moments: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`(groups, d, d)` covariances from mean products and the `(groups, d)` means of both sides."""
    return moments - left[:, :, None] * right[:, None]


def sizes_of(moments: Tensor, mean: Tensor) -> Tensor:
    """`(2, groups)` float64 sums of the squared elements, not centred, and centred."""
    both = _norm(moments), _norm(covariances(moments, mean, mean))
    return torch.stack(both).square()  # not in float32, which cannot hold every square


def _norm(matrices: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)
    return found


def doubt_of(whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The expected squared error of moments of all samples, by how much those of parts scatter.

    Args:
        whole: `sizes_of` them.
        parts: `sizes_of` those of each part; the parts are about equally large.

    Returns:
        `(2, groups)`, like these; 0 where there is one part only.
    """
    n = len(parts)
    scatter = torch.stack(list(parts)).sum(0) - n * whole
    return scatter.clamp_min(0) / max(1, n * (n - 1))


def shrunk(moments: Tensor, doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw moments towards equal and independent inputs.

    Args:
        moments: `(groups, d, d)`.
        doubt: `(groups,)` their expected squared error.

    Returns:
        The moments; by what they were multiplied, and what was added to their diagonal, both
        `(groups, 1, 1)`.
    """
    level = moments.diagonal(dim1=1, dim2=2).mean(1)
    away = moments.square().sum((1, 2)) - moments.shape[1] * level.square()
    share = torch.where(away > doubt, doubt / away.where(away > 0, 1), 1)
    kept, added = (1 - share)[:, None, None], (share * level)[:, None, None]
    return kept * moments + added * torch.eye(moments.shape[1]).to(moments), kept, added
