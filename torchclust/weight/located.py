"""Where weights stand among the centroids: one search finds both the cheapest and the gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchclust.weight.lookup import lookup

_COUNTABLE = 255  # boundaries that a count in uint8 tells apart


@dataclass(frozen=True, eq=False)
class Located:
    """Of every weight, output channels first.

    Attributes:
        indices: of the centroid whose cell it lies in.
        steps: how far it has come along the axis, in steps that `gaps` knows.
        gaps: `(..., steps)` int64, between which two centroids each step lies.
    """

    indices: Tensor
    steps: Tensor
    gaps: Tensor


def locate(limits: Tensor, borders: Tensor, count_below: Callable[[Tensor], Tensor]) -> Located:
    """Find cell and gap of every weight.

    Args:
        limits: `(..., k - 1)` ascending, between the cells.
        borders: `(..., k - 2)` ascending, between the gaps.
        count_below: how many of such boundaries lie below each weight; its time hardly depends on
            how many there are, so that both kinds are sought together where uint8 holds the count.
    """
    if limits.shape[-1] + borders.shape[-1] > _COUNTABLE:
        gaps = torch.arange(borders.shape[-1] + 1, device=borders.device)
        gaps = gaps.expand(*borders.shape[:-1], -1)
        return Located(count_below(limits), count_below(borders), gaps)
    merged, order = torch.cat([limits, borders], -1).sort(-1)
    cells = nn.functional.pad((order < limits.shape[-1]).cumsum(-1), (1, 0))
    steps = count_below(merged)
    gaps = torch.arange(cells.shape[-1], device=cells.device) - cells
    return Located(lookup(cells.byte(), steps), steps, gaps)
