"""The one thing that clustering must not do: make a tensor larger than it was in plain int8."""

from __future__ import annotations

import warnings

import torch

from torchclust.fitting.worth import entropy, plain_int8_bits
from torchclust.model.slots import Slot
from torchclust.weight.clustered import ClusteredWeight

_BYTES = 64  # that few may be lost: what a compiler's alignment takes anyway


def warn_if_larger(slot: Slot, fitted: ClusteredWeight) -> None:
    """Warn of a tensor whose indices cost more than its plain int8 codes would.

    Args:
        slot: the tensor as it is, before clustering.
        fitted: what is to take its place.
    """
    assert fitted.first_original is not None
    indices = fitted.indices_of(fitted.first_original).reshape(-1)
    now = entropy(torch.bincount(indices))
    before = plain_int8_bits(slot.value().transpose(0, slot.channel_dim))
    if (now - before) * len(indices) / 8 > _BYTES:
        name, k = slot.candidate.name, fitted.config.n_clusters
        warnings.warn(
            f"{name!r} gets larger, not smaller: {now:.2f} bits a weight in {k} clusters, "
            f"{before:.2f} in plain int8. A few of its weights are far larger than the rest. "
            f'Give it fewer, or leave it out:  cluster_(model, {{"*": {k}, "{name}": None}})',
            stacklevel=3,
        )
