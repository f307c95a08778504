"""Data modules from loaders: what a Trainer, of either Lightning, is given in every case."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchclust.zoo.dataset import Data, loader

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

EVALUATION_BATCH = 250
PARTS = ("train", "val", "test")


def of_loaders(tree: ModuleType, **loaders: Iterable[Any]) -> LightningDataModule:
    """Return a data module of that tree that gives these loaders, by the name of the part."""
    data: LightningDataModule = tree.LightningDataModule()
    for part, batches in loaders.items():
        setattr(data, f"{part}_dataloader", functools.partial(given, batches))
    return data


def named_data(tree: ModuleType, data: Data, batch_size: int, seed: int) -> LightningDataModule:
    """Return a named data set as a data module: training batches in an order of its own."""
    return of_loaders(
        tree,
        train=loader(data.train, batch_size, seed=seed),
        test=loader(data.test, EVALUATION_BATCH),
    )


class Batches:
    """Batches in memory as a loader; a list Lightning would take for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def judge_on_(data: LightningDataModule, batches: Sequence[Any]) -> None:
    """Make these the test batches."""
    kept = Batches(batches)
    data.test_dataloader = functools.partial(given, kept)  # type: ignore[method-assign]


def are_chosen(data: LightningDataModule) -> bool:
    """Whether the test batches are those of `judge_on_`."""
    return any(isinstance(one, Batches) for one in getattr(data.test_dataloader, "args", ()))


def given(batches: Iterable[Any]) -> Iterable[Any]:
    """Return what it is given: Lightning looks into a hook's code, and processes pickle it."""
    return batches
