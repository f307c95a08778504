"""Which pixels belong to what: a small U-Net, judged by the mean intersection over union."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from shapes import KINDS, Shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Images(pl.LightningDataModule):
    """Images with the mask of what is in them."""

    def __init__(self, batch_size: int = 32, train: int = 800, test: int = 200) -> None:
        super().__init__()
        self.batch_size, self.train, self.test = batch_size, train, test

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, shuffled."""
        return DataLoader(Shapes(self.train, 0), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return others."""
        return DataLoader(Shapes(self.test, 1), 50)


class Block(nn.Sequential):
    """Two convolutions that keep the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        )


class UNet(nn.Module):
    """Two steps down, two up, and what was there before each step down is joined again."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = Block(1, width), Block(width, 2 * width)
        self.middle = Block(2 * width, 4 * width)
        self.third, self.last = Block(6 * width, 2 * width), Block(3 * width, width)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (n, classes, height, width)."""
        fine = self.first(image)
        coarse = self.second(self.down(fine))
        found = self.middle(self.down(coarse))
        found = self.third(torch.cat([self.up(found), coarse], 1))
        found = self.last(torch.cat([self.up(found), fine], 1))
        return self.head(found)


class Segmentation(pl.LightningModule):
    """Background and three kinds of shapes."""

    def __init__(self, width: int = 8, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr, self.classes = lr, 1 + len(KINDS)
        self.net = UNet(width, self.classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the pixels, those of shapes weighted."""
        weight = torch.tensor([0.3] + [1.0] * len(KINDS), device=self.device)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], weight)

    def on_test_epoch_start(self) -> None:
        """Begin to count."""
        self.counts = torch.zeros(2, self.classes)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count, for each class, the pixels in both masks and in either."""
        found, mask = self.net(batch[0]).argmax(1), batch[1]
        for kind in range(self.classes):
            both = (found == kind) & (mask == kind)
            either = (found == kind) | (mask == kind)
            self.counts[:, kind] += torch.stack([both.sum(), either.sum()]).cpu()

    def on_test_epoch_end(self) -> None:
        """Log the mean over classes: of all test pixels, not a mean of batches."""
        self.log("test_iou", (self.counts[0] / self.counts[1].clamp_min(1)).mean())

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)
