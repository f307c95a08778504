"""What is in an image and where: one network with two outputs, a kind and a box.

The network returns a dict, the file two tensors; `test_step` sees the dict in both cases.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from shapes import KINDS, Shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Images(pl.LightningDataModule):
    """Images with one shape each."""

    def __init__(self, batch_size: int = 32, train: int = 1500, test: int = 300) -> None:
        super().__init__()
        self.batch_size, self.train, self.test = batch_size, train, test

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, shuffled."""
        return DataLoader(Shapes(self.train, 0), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return others."""
        return DataLoader(Shapes(self.test, 1), 50)


class Detector(nn.Module):
    """Convolutions down to 6x6 places, then one layer per output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(4 * width, 16, 1), nn.ReLU(), nn.Flatten())
        self.kind, self.box = nn.Linear(16 * 36, len(KINDS)), nn.Linear(16 * 36, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return logits of the kind (n, 3) and the box (n, 4), centre and size in [0, 1]."""
        features = self.body(image)
        return {"kind": self.kind(features), "box": self.box(features).sigmoid()}


class Detection(pl.LightningModule):
    """Learns both outputs together."""

    def __init__(self, width: int = 8, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr, self.net = lr, Detector(width)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of both losses."""
        image, _, kind, box = batch
        found = self.net(image)
        of_kind = nn.functional.cross_entropy(found["kind"], kind)
        return of_kind + 10 * nn.functional.smooth_l1_loss(found["box"], box, beta=0.05)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how many have the right kind and a box that overlaps by half."""
        image, _, kind, box = batch
        found = self.net(image)
        right = (found["kind"].argmax(1) == kind) & (overlap(found["box"], box) > 0.5)
        self.log("test_found", 100 * right.float().mean(), batch_size=len(kind))

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over union of boxes (n, 4)."""
    low = torch.maximum(*(box[:, :2] - box[:, 2:] / 2 for box in (one, other)))
    high = torch.minimum(*(box[:, :2] + box[:, 2:] / 2 for box in (one, other)))
    both = (high - low).clamp_min(0).prod(1)
    return both / (one[:, 2:].prod(1) + other[:, 2:].prod(1) - both)
