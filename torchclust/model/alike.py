"""Layers of one shape and one configuration are fitted in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torchclust.fitting.partition import EXACT
from torchclust.model.slots import Slot
from torchclust.weight.codebooks import can_be_stacked, stack_fits
from torchclust.weight.config import ClusterConfig

Book = tuple[Tensor, Tensor]


class _Member(NamedTuple):
    name: str
    config: ClusterConfig
    rows: Tensor


def books_of_alike(
    chosen: Iterable[tuple[Slot, ClusterConfig]], importance: Mapping[str, Tensor]
) -> dict[str, Book]:
    """Centroids and indices, output channels first, of small tensors that are not the only such.

    Args:
        chosen: what is to be clustered, and how.
        importance: by name, of those that have some.

    Returns:
        By name. Tensors with NaN are left to be refused where they are fitted alone.
    """
    alike: dict[tuple[object, ...], list[_Member]] = {}
    for slot, config in chosen:
        name = slot.candidate.name
        small = slot.candidate.n_elements <= EXACT and config.granularity == "tensor"
        if small and can_be_stacked(config, importance.get(name)):
            rows = slot.value().transpose(0, slot.channel_dim)
            if torch.isfinite(rows).all():
                key = config, rows.shape, rows.dtype, rows.device
                alike.setdefault(key, []).append(_Member(name, config, rows))
    several = (members for members in alike.values() if len(members) > 1)
    return dict(itertools.chain.from_iterable(map(_fitted, several)))


def _fitted(members: list[_Member]) -> Iterator[tuple[str, Book]]:
    centroids, indices = stack_fits([member.rows for member in members], members[0].config)
    for member, own, taken in zip(members, centroids, indices, strict=True):
        yield member.name, (own[: int(taken.max()) + 1], taken)
