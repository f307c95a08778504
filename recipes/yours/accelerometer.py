"""Activities from an accelerometer: a one-dimensional CNN over two seconds of three axes.

The series are made here, so that the example runs as it is; put your own recordings in their place.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ACTIVITIES = ("still", "walking", "running", "shaking")
SAMPLES = 104  # two seconds at 52 Hz


def made(count: int, seed: int) -> TensorDataset:
    """Return `count` series (3, 104) in g, and which activity each one is."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(ACTIVITIES), (count,), generator=random)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    time = torch.arange(SAMPLES) / 52
    rates = torch.tensor([0.0, 1.8, 2.7, 3.4])[labels] * between(0.75, 1.25)
    sizes = torch.tensor([0.0, 0.35, 0.8, 0.7])[labels] * between(0.5, 1.5)
    phase = 2 * math.pi * rates[:, None] * time + between(0, 2 * math.pi, 1)
    # Steps have overtones and act along gravity, shaking has none and acts across it.
    steps = phase.sin() + 0.5 * (2 * phase).sin()
    moved = torch.where((labels == 3)[:, None], phase.sin(), steps) * sizes[:, None]
    gravity = nn.functional.normalize(between(-1, 1, 3), dim=1)
    across = torch.linalg.cross(gravity, nn.functional.normalize(between(-1, 1, 3), dim=1))
    direction = torch.where((labels == 3)[:, None], across, gravity)
    noise = 0.25 * torch.randn(count, 3, SAMPLES, generator=random)
    series = gravity[:, :, None] + direction[:, :, None] * moved[:, None] + noise
    return TensorDataset(series, labels)


class Series(pl.LightningDataModule):
    """Training, validation and test series."""

    def __init__(self, batch_size: int = 64, train: int = 3000) -> None:
        super().__init__()
        self.batch_size, self.train = batch_size, train

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training series, shuffled."""
        return DataLoader(made(self.train, 0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return 500 others."""
        return DataLoader(made(500, 1), 250)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return 1,000 others."""
        return DataLoader(made(1000, 2), 250)


class Activities(pl.LightningModule):
    """Three convolutions, a pooling over time, and a layer that decides."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv1d(3, width, 5, 2, 2), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, 2 * width, 5, 2, 2), nn.BatchNorm1d(2 * width), nn.ReLU()),
            *(nn.Conv1d(2 * width, 2 * width, 5, 2, 2), nn.BatchNorm1d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, len(ACTIVITIES))),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        series, labels = batch
        return nn.functional.cross_entropy(self.net(series), labels, label_smoothing=0.05)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy while training."""
        self.log("val_acc", self._accuracy(batch), prog_bar=True, batch_size=len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log what the recipe's `metric` names."""
        self.log("test_acc", self._accuracy(batch), batch_size=len(batch[1]))

    def _accuracy(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.net(batch[0]).argmax(1) == batch[1]).float().mean() * 100

    def configure_optimizers(self) -> Any:
        """Return AdamW, and one cycle of its rate over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps + 1)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]
