"""Copies of a module that Lightning's averaging callbacks keep, while that is clustered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from torchclust.model.cluster import strip_
from torchclust.weight.stored import Stored

if TYPE_CHECKING:
    from pytorch_lightning import Callback


def averaged_copies(callbacks: Iterable[Callback]) -> Iterator[nn.Module]:
    """The modules that `WeightAveraging` and `StochasticWeightAveraging` average into."""
    for callback in callbacks:
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, nn.Module):
            yield copy


def mend_copies_(callbacks: Iterable[Callback]) -> None:
    """Undo what averaging buffers did to indices, before they are copied into the module."""
    for copy in averaged_copies(callbacks):
        for module in copy.modules():
            if isinstance(module, Stored):
                module.mend_()


def strip_copies_(callbacks: Iterable[Callback]) -> None:
    """Make the copies plain with their module: a later validation exchanges their tensors."""
    for copy in averaged_copies(callbacks):
        strip_(copy, validate=False)
