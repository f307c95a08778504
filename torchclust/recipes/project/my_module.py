"""A network, its training and its data: put yours in the place of what is marked.

It recognises digits of 8x8 pixels, which scikit-learn ships, and runs as it is.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class MyData(pl.LightningDataModule):
    """Batches to train on and to test on; the recipe's `data:` gives the arguments."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read the data. YOURS: any Dataset whose items your steps below understand."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        everything = TensorDataset(images, torch.from_numpy(labels))
        split = torch.Generator().manual_seed(0)
        self.train: Dataset[Any]
        self.test: Dataset[Any]
        self.train, self.test = torch.utils.data.random_split(everything, [0.8, 0.2], split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches to train on."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches to test on: what the report is about."""
        return DataLoader(self.test, self.batch_size)


class MyModule(pl.LightningModule):
    """How the network is trained and judged; the recipe's `module:` gives the arguments."""

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        # YOURS: any nn.Module. The recipe's `exports: net` makes this part the file.
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss. YOURS: losses, augmentations, several optimizers, what you like."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log what the recipe's `metric:` names. The int8 file is judged by this very step."""
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("test_acc", 100 * right, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Return optimizers, and schedules if you have them."""
        return torch.optim.Adam(self.parameters(), self.lr)
