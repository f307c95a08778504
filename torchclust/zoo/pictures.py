"""Small colour images in the layouts in which they are published: CIFAR-10, visual wake words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import Data, DataError, ImageArrays, ImageFolder, rgb

_RECORD = 1 + 3 * 32 * 32
_PERSON = ("non_person", "person")


def cifar10(root: Path) -> Data:
    """Load CIFAR-10, 50,000 / 10,000 images of (3, 32, 32), from its binary batches.

    `root`, or ``cifar-10-batches-bin`` in it, holds ``data_batch_1.bin`` to ``_5.bin`` and
    ``test_batch.bin``: records of a label and 3,072 bytes, red first.
    """
    inner = root / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else root
    train = [_batch(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    parts = [np.concatenate(train), _batch(folder / "test_batch.bin")]
    return _data([(part[:, 1:].reshape(-1, 3, 32, 32), part[:, 0]) for part in parts], 10)


def visual_wake_words(root: Path, image_size: int = 96) -> Data:
    """Load images of class non_person and person, squeezed to (3, `image_size`, `image_size`).

    `root` holds ``train*/person/*``, ``train*/non_person/*`` (such as ``train2017``), and the same
    under ``val*``. MLPerf Tiny labels COCO so: a person covers more than 2.5 % of the image, or
    there is none.
    """
    parts = []
    for part in ("train", "val"):
        folder = next((f for f in sorted(root.glob(f"{part}*")) if f.is_dir()), None)
        if folder is None or not all((folder / name).is_dir() for name in _PERSON):
            raise DataError(
                f"visual_wake_words: {root} holds no {part}*/person and {part}*/non_person; "
                "data.root is the folder of both:  --set data.root=/path/to/vww"
            )
        files = ImageFolder(folder, _PERSON, image_size).files
        images = np.stack([_squeezed(file, image_size) for file, _ in files])
        parts.append((images, np.array([label for _, label in files])))
    return _data(parts, len(_PERSON))


def _data(parts: list[tuple[NDArray[np.uint8], NDArray[np.integer]]], classes: int) -> Data:
    train, test = (ImageArrays(images.copy(), labels.astype(np.int64)) for images, labels in parts)
    _, channels, height, width = train.images.shape
    return Data(train, test, (channels, height, width), classes)


def _batch(file: Path) -> NDArray[np.uint8]:
    try:
        raw = np.fromfile(file, np.uint8)
    except OSError as error:
        raise DataError(
            f"cifar10: {file} cannot be read; data.root holds the binary version, "
            "cifar-10-batches-bin:  --set data.root=/path/to/cifar-10"
        ) from error
    if len(raw) == 0 or len(raw) % _RECORD:
        raise DataError(
            f"cifar10: {file} is damaged: {len(raw)} bytes are no whole records of {_RECORD}; "
            "copy it anew"
        )
    return raw.reshape(-1, _RECORD)


def _squeezed(file: Path, size: int) -> NDArray[np.uint8]:
    return np.asarray(rgb(file).resize((size, size))).transpose(2, 0, 1)
