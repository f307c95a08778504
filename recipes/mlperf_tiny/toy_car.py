"""MLPerf Tiny's anomaly detection: does a toy car sound as it should? For ad.yaml.

The network is an autoencoder of five frames of 128 mel energies. It has learned to give back the
sound of healthy cars, and what it gives back badly is suspicious: a recording's score is the mean
squared error over its frames, and the network's is the area under the ROC curve, the mean over
the cars.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchclust.zoo import mlperf_ad
from torchclust.zoo.dataset import DataError
from torchclust.zoo.mel_energies import machine_energies
from torchclust.zoo.speech import read_wav

FRAMES = 5
MIDDLE = slice(49, 249)  # of a recording, as the benchmark does
_NAME = re.compile(r"(normal|anomaly)_id_(\d+)_\d+\.wav")
Clip = tuple[Tensor, Tensor, Tensor]


class Recordings(Dataset[Clip]):
    """Each recording's inputs (frames, 640), whether it is an anomaly, and which car it is of."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Clip:
        file = self.files[index]
        found = _NAME.fullmatch(file.name)
        assert found is not None
        energies = machine_energies(read_wav(file))[MIDDLE]
        windows = np.lib.stride_tricks.sliding_window_view(energies, FRAMES, axis=0)
        inputs = torch.from_numpy(windows.transpose(0, 2, 1).reshape(len(windows), -1).copy())
        return inputs, torch.tensor(found[1] == "anomaly"), torch.tensor(int(found[2]))


def loaders(root: str, train: int = 500) -> dict[str, Iterable[Any]]:
    """Return `train` recordings of healthy cars, and all that there are to test with.

    `root` is ToyCar of ToyADMOS as DCASE 2020's task 2 shipped it: ``train/normal_id_01_*.wav``,
    ``test/normal_id_01_*.wav``, ``test/anomaly_id_01_*.wav`` ...
    """
    listed = {
        part: [f for f in sorted((Path(root) / part).glob("*.wav")) if _NAME.fullmatch(f.name)]
        for part in ("train", "test")
    }
    for part, files in listed.items():
        if not files:
            raise DataError(
                f"no normal_id_01_00000000.wav and the like in {Path(root) / part}; data.root is "
                "the folder ToyCar of DCASE 2020, task 2, with train and test in it:  "
                "--set data.root=/path/to/ToyCar"
            )
    chosen = np.random.default_rng(0).permutation(len(listed["train"]))[:train]
    healthy = Recordings([listed["train"][i] for i in sorted(chosen)])
    return {
        "train": DataLoader(healthy, batch_size=None, shuffle=True),
        "test": DataLoader(Recordings(listed["test"]), batch_size=None),
    }


class Autoencoder(pl.LightningModule):
    """MLPerf Tiny's network, under the names that its weights have."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.fc = mlperf_ad().fc

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        """Return the squared error of what comes out."""
        return nn.functional.mse_loss(self.fc(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)


def auc(module: nn.Module, clips: Iterable[Clip]) -> float:
    """Return how often an anomaly has the larger error than a healthy recording of its car."""
    found = [((module.fc(x) - x).square().mean(), bad, car) for x, bad, car in clips]
    errors, is_bad, car = (torch.stack(column) for column in zip(*found, strict=True))
    areas = []
    for number in car.unique():
        healthy, bad = (errors[(car == number) & (is_bad == kind)] for kind in (False, True))
        areas.append((bad[:, None] > healthy).float().mean())
    return float(torch.stack(areas).mean())
