"""Evenly spaced codebooks: where weights start that will train at a price of bits.

The codebook of least error plus price has few centroids, far apart where weights are few. That is
best for weights that stay; weights that train at a price all but leave, or move far out of their
first range, and need values on the way. An entropy coder takes unused ones for nothing. At high
resolution even spacing is optimal anyway (Gish and Pierce 1968), with a step of ``sigma sqrt(6 rate
/ ln 2)``: there a finer step costs as much in bits as it gains in error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchclust.fitting.arguments import (
    as_float_tensor,
    checked_importance,
    require_finite,
    sort_values,
)
from torchclust.fitting.moments import Moments
from torchclust.fitting.priced import objective, price_of, seeded

_STEPS = 2.0 ** -np.arange(0, 12, 0.125)  # tried, as shares of the largest magnitude


def even_step(
    values: Tensor | npt.ArrayLike,
    half: int,
    rate: float,
    importance: Tensor | npt.ArrayLike | None = None,
) -> float:
    """The step of the evenly spaced codebook of least squared error plus price of its bits.

    Args:
        values: as for `torchclust.fit_codebook`.
        half: centroids on either side of 0, from 1. Few of them take a wider step.
        rate: the price of a bit, as there, above 0.
        importance: weights of the squared errors, as there.

    Returns:
        The step, within 9 % (an eighth of an octave) of the best; 0 for zeros.

    Raises:
        TypeError, ValueError: as `torchclust.fit_codebook`, of values and importances.

    >>> import torch
    >>> normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> round(even_step(normal, 15, rate=0.1), 1)  # sqrt(0.6 / ln 2) is 0.93
    0.9
    """
    data = as_float_tensor("values", values)
    require_finite("values", data)
    ordered, weights = sort_values(data, checked_importance(importance, data.shape))
    widest = max(-float(ordered[0]), float(ordered[-1]))
    if widest <= 0:
        return 0.0
    moments, grid = Moments(ordered, weights), np.arange(-half, half + 1.0)
    price = price_of(moments, rate)
    costs = [
        objective(moments, seeded(moments, widest * step * grid, pinned=False), price)
        for step in _STEPS
    ]
    return widest * float(_STEPS[int(np.argmin(costs))])
