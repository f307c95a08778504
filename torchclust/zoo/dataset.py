"""What a data set is here: two fixed parts, batches of them, and the error that names a remedy."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from PIL import Image

Batch = tuple[Tensor, Tensor]


class DataError(ValueError):
    """A data set is missing, unreadable, or not what its name says; the text names the remedy."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Make a `DataError` that names `file` of whatever a reader raises on it.

    Readers of other packages promise no list of exceptions: of damaged files Pillow alone raises
    OSError, SyntaxError, ValueError and one of its own, and zipfile five more.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"cannot read {file}: {reason}; replace it or delete it") from error


def required(module: str, package: str, what: str) -> Any:
    """Return a module that `what` needs, or raise a `DataError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{what} needs the package {package}, which is not installed:  "
            'pip install "torchclust[recipes]"'
        ) from error


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
    (256 and 224 for ImageNet), in RGB as `rgb` shows it. What begins with a dot is no image, but a
    system's or an editor's.

    Raises:
        DataError: a class has no images, or Pillow is not installed.
    """

    SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

    def __init__(self, folder: Path, classes: Sequence[str], size: int) -> None:
        required("PIL", "Pillow", "a folder of images")
        self.size = size
        self.files: list[tuple[Path, int]] = []
        for index, name in enumerate(classes):
            found = [(file, index) for file in _visible(folder / name) if self._is_image(file)]
            if not found:
                raise DataError(
                    f"no images in {folder / name}: add some ({', '.join(self.SUFFIXES)}), or "
                    "delete the class"
                )
            self.files += found

    def _is_image(self, file: Path) -> bool:
        return file.suffix.lower() in self.SUFFIXES and not file.is_dir()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        images = [self._read(self.files[i][0]) for i in indices]
        return torch.stack(images), torch.tensor([self.files[i][1] for i in indices])

    def _read(self, file: Path) -> Tensor:
        from PIL.Image import Resampling

        image = rgb(file)
        scale = self.size * 8 / 7 / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Resampling.BILINEAR)
        pixels = np.array(resized.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _visible(folder: Path) -> Iterator[Path]:
    """Yield what is under a folder but for names with a dot in front, and what is under those."""
    for path in sorted(folder.rglob("*")):
        if not any(name.startswith(".") for name in path.relative_to(folder).parts):
            yield path


def rgb(file: Path) -> Image.Image:
    """Return an image in RGB as a viewer shows it: upright, and on white where it is transparent.

    Of 16-bit gray the high byte is kept, as Pillow keeps it of 16-bit colours; its own conversion
    makes everything above 255 white.

    Raises:
        DataError: `file` is damaged, or has 32-bit pixels, of which nobody knows what is white.
    """
    from PIL import Image, ImageOps

    with reading(file), Image.open(file) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise DataError(
                f"{file} has pixels of 32 bits, whose range is unknown: save it with 8 or 16 bits"
            )
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


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
