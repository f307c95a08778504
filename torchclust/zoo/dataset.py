"""What a data set is here: two fixed parts, batches of them, and the error that names a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

Batch = tuple[Tensor, Tensor]


class DataError(ValueError):
    """A data set is missing, unreadable, or not what its name says; the text names the remedy."""


class ImageArrays(Dataset[Batch]):
    """Images in memory as uint8 (N, C, H, W); `dataset[indices]` is a whole float32 batch."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self.images[indices].float() / 255, self.labels[indices]


class Spectrograms(Dataset[Batch]):
    """Features in memory, float32 (N, 1, frames, coefficients), as `ImageArrays` gives images."""

    def __init__(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        self.features, self.labels = torch.from_numpy(features), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self.features[indices], self.labels[indices]


class ImageFolder(Dataset[Batch]):
    """Image files in one folder per class, read when asked for.

    Each is scaled so that its short side is `size` x 8/7 and cropped to the central `size` x `size`
    (256 and 224 for ImageNet), in RGB. Classes are the folders' names in ascending order.
    """

    SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

    def __init__(self, folder: Path, classes: Sequence[str], size: int) -> None:
        self.size = size
        self.files = [
            (file, index)
            for index, name in enumerate(classes)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in self.SUFFIXES
        ]
        if not self.files:
            raise DataError(f"no images under {folder}: expected {folder}/CLASS/*.jpg (or .png)")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        images = [self._read(self.files[i][0]) for i in indices]
        return torch.stack(images), torch.tensor([self.files[i][1] for i in indices])

    def _read(self, file: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"cannot read the image {file}: {error}; replace it or delete it"
            ) from error
        scale = self.size * 8 / 7 / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(resized.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Data:
    """A training and a test set of the same classes and image shape (channels, height, width)."""

    train: ImageArrays | ImageFolder | Spectrograms
    test: ImageArrays | ImageFolder | Spectrograms
    input_shape: tuple[int, int, int]
    n_classes: int


def loader(dataset: Dataset[Batch], batch_size: int, *, seed: int | None = None) -> DataLoader[Any]:
    """Return batches of (images, labels), in order or, with a `seed`, newly shuffled every epoch.

    The sampler hands whole batches to the data set, which cuts them out of its arrays: collating
    60,000 single images costs more than a small network's forward pass.
    """
    order: SequentialSampler | RandomSampler = SequentialSampler(dataset)  # type: ignore[arg-type]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, False), batch_size=None)


def samples(dataset: Dataset[Batch], count: int, *, seed: int) -> Tensor:
    """Return `count` images (all, if there are fewer), drawn without replacement: (n, C, H, W)."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return dataset[chosen.tolist()][0]
