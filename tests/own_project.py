"""A user's project, small: modules of either Lightning, data, and what can be wrong with them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

INPUTS, OUTPUTS = 12, 3


class Network(nn.Module):
    """Dropout and BatchNorm, so that seeds and modes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(INPUTS, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1)
        )
        self.head = nn.Linear(24, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@functools.cache
def classes(tree: str) -> dict[str, Any]:
    """A regression in several states of repair, as classes of one Lightning."""
    pl = importlib.import_module(tree)

    class Regression(pl.LightningModule):
        def __init__(self, lr: float = 1e-2) -> None:
            super().__init__()
            self.lr, self.net = lr, Network()
            self.gain = nn.Parameter(torch.ones(()))  # trains along, outside the file

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.net(x)

        def error(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.error(batch)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_mse", self.error(batch), batch_size=len(batch[0]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    class Silent(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.error(batch)

    class Nan(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_mse", self.error(batch) * float("nan"), batch_size=len(batch[0]))

    class TwoOptimizers(Regression):
        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(part.parameters(), self.lr)
                for part in (self.net.body, self.net.head)
            ]

    class Manual(TwoOptimizers):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.error(batch))
                optimizer.step()

    class Inside(Regression):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net.head(self.net.body(x))

    class Beside(Regression):
        def forward(self, x: Tensor) -> Tensor:
            return self.net.head(self.net.body(x))

    class Wrong(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.error(batch[0])

    class InSetup(Regression):
        def setup(self, stage: str) -> None:
            if stage == "fit":
                self.register_buffer("class_weights", torch.ones(OUTPUTS))

    kinds = (Regression, Silent, Nan, TwoOptimizers, Manual, Inside, Beside, Wrong, InSetup)
    return {cls.__name__: cls for cls in kinds}


def module(kind: str = "Regression", tree: str = "pytorch_lightning", lr: float = 1e-2) -> Any:
    return classes(tree)[kind](lr)


def samples(count: int, seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=random)
    return TensorDataset(x, torch.stack([x[:, 0], x[:, 1] * x[:, 2], x.square().mean(1)], 1))


def loaders(test: bool = True, val: bool = False, empty: bool = False) -> dict[str, Any]:
    # Its own generator, which moves on: a stage must not depend on the stages before it.
    order = torch.Generator().manual_seed(3)
    found = {"train": DataLoader(samples(96, 0), 16, shuffle=True, generator=order)}
    found |= {"test": DataLoader(samples(40, 1), 20)} if test else {}
    found |= {"test": []} if empty else {}
    return found | ({"val": DataLoader(samples(40, 2), 20)} if val else {})


class Endless(IterableDataset):
    """Samples that do not say how many they are."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(samples(96, 0))


def endless() -> dict[str, Any]:
    return loaders() | {"train": DataLoader(Endless(), 16)}


def data_module(tree: str = "pytorch_lightning", test: bool = True) -> Any:
    pl = importlib.import_module(tree)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loaders()["train"]

    if test:
        Data.test_dataloader = lambda self: loaders()["test"]
    return Data()


def score(module: nn.Module, batches: Iterable[Any]) -> float:
    """Minus the squared error, so that more is better."""
    return -sum(float((module(x) - y).square().mean()) for x, y in batches)
