"""A machine's hum, and what is wrong with it: an autoencoder that is judged by an AUC.

It learns to reproduce spectra of the healthy machine; what it reproduces badly is suspicious. No
`test_step` is needed: the recipe's `score` names the function below. The spectra are made here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BINS = 96


def spectra(count: int, seed: int, *, faulty: bool = False) -> Tensor:
    """Return log spectra (count, 96): harmonics of a speed that varies, and a floor of noise."""
    random = torch.Generator().manual_seed(seed)
    bins = torch.arange(BINS).float()
    speed = 9 + 2 * torch.rand(count, 1, generator=random)
    level = torch.randn(count, BINS, generator=random) * 0.15 - 2
    power = torch.zeros(count, BINS)
    for harmonic, height in enumerate((1.0, 0.6, 0.8, 0.3, 0.5, 0.2, 0.3, 0.2), start=1):
        height = height * (1 + 0.2 * torch.randn(count, 1, generator=random))
        # A worn bearing puts sidebands beside some harmonics.
        offsets = (0.0, 3.0) if faulty and harmonic in (3, 5) else (0.0,)
        for offset in offsets:
            size = height if offset == 0 else 0.35 * height
            power += size * torch.exp(-0.5 * ((bins - harmonic * speed - offset) / 0.8) ** 2)
    return torch.log(power.clamp_min(0) + level.exp())


def loaders(batch_size: int = 64, train: int = 4000) -> dict[str, Iterable[Any]]:
    """Return healthy spectra to train on; to test on, half of them faulty."""
    tested = torch.cat([spectra(400, 2), spectra(400, 3, faulty=True)])
    of_train = TensorDataset(spectra(train, 0), torch.zeros(train, dtype=torch.bool))
    of_test = TensorDataset(tested, torch.arange(800) >= 400)
    return {
        "train": DataLoader(of_train, batch_size, shuffle=True),
        "test": DataLoader(of_test, 200),
    }


class Hum(pl.LightningModule):
    """An autoencoder of fully connected layers, with a bottleneck of eight numbers."""

    def __init__(self, width: int = 96, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        sizes = (BINS, width, width, 8, width, width, BINS)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-2])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the squared error of what comes out."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)


def auc(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return how often a faulty spectrum has the larger error than a healthy one."""
    found = [((module.net(x) - x).square().mean(1), y) for x, y in batches]
    errors, is_faulty = (torch.cat(column) for column in zip(*found, strict=True))
    healthy, faulty = errors[~is_faulty], errors[is_faulty]
    return float((faulty[:, None] > healthy).float().mean())
