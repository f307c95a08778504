"""Spoken digits: a temporal convolutional network over the bands of a spectrogram.

The recordings are the Free Spoken Digit Dataset's, one 8 kHz wav file for each
``DIGIT_SPEAKER_NUMBER.wav``; as its authors have it, numbers 0 to 4 are there to test on.
"""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

RATE, WINDOW, HOP, BANDS, FRAMES = 8000, 256, 160, 24, 48


def samples_of(file: Path) -> Tensor:
    """Return a recording of 16 bits as floats."""
    with wave.open(str(file), "rb") as recording:
        content = recording.readframes(recording.getnframes())
    return torch.from_numpy(np.frombuffer(content, np.int16).astype(np.float32)) / 32768


def bands() -> Tensor:
    """Return triangular filters (24, 129), evenly spaced in mel from 60 Hz on."""
    mel = torch.linspace(1127 * math.log1p(60 / 700), 1127 * math.log1p(4000 / 700), BANDS + 2)
    edges = 700 * ((mel / 1127).exp() - 1) / RATE * WINDOW
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = torch.arange(WINDOW // 2 + 1)
    return torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(0)


def features(samples: Tensor) -> Tensor:
    """Return log energies (24, 48) of about a second, the recording in the middle."""
    spectrum = torch.stft(
        samples, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True
    )
    energy = (bands() @ spectrum.abs().square() + 1e-5).log()
    energy = energy[:, :FRAMES]
    missing = FRAMES - energy.shape[1]
    floor = math.log(1e-5)
    return nn.functional.pad(energy, (missing // 2, missing - missing // 2), value=floor)


class Digits(pl.LightningDataModule):
    """Recordings under `root`, as features."""

    def __init__(self, root: str, batch_size: int = 64) -> None:
        super().__init__()
        self.root, self.batch_size = Path(root), batch_size

    def setup(self, stage: str) -> None:
        """Read the recordings."""
        files = sorted(self.root.glob("*_*_*.wav"))
        if not files:
            raise FileNotFoundError(f"no DIGIT_SPEAKER_NUMBER.wav in {self.root}")
        tests = [int(file.stem.split("_")[2]) < 5 for file in files]
        self.train, self.test = (
            self._read([f for f, is_test in zip(files, tests, strict=True) if is_test is wanted])
            for wanted in (False, True)
        )

    def _read(self, files: list[Path]) -> TensorDataset:
        labels = torch.tensor([int(file.stem.split("_")[0]) for file in files])
        return TensorDataset(torch.stack([features(samples_of(file)) for file in files]), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return recordings 5 to 49 of each digit and speaker, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return recordings 0 to 4."""
        return DataLoader(self.test, 100)


class Tcn(nn.Module):
    """Convolutions over time with gaps of 1, 2, 4 and 8 frames, each added to what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.BatchNorm1d(BANDS), nn.Conv1d(BANDS, width, 3, padding=1), nn.BatchNorm1d(width)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 3, padding=gap, dilation=gap), nn.BatchNorm1d(width)
            )
            for gap in (1, 2, 4, 8)
        )
        self.last = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, energies: Tensor) -> Tensor:
        """Return logits (n, 10) of features (n, 24, 48)."""
        x = self.first(energies).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.last(x)


class Speech(pl.LightningModule):
    """Shifts recordings in time and blanks bands while it learns."""

    def __init__(self, width: int = 48, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr, self.net = lr, Tcn(width)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        energies, labels = batch
        energies = energies.roll(int(torch.randint(-6, 7, ())), 2)
        keep = torch.rand(len(labels), BANDS, 1, device=self.device) > 0.1
        energies = torch.where(keep, energies, energies.mean((1, 2), keepdim=True))
        return nn.functional.cross_entropy(self.net(energies), labels, label_smoothing=0.1)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test_acc", 100 * right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Return AdamW, its rate falling to nothing along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]
