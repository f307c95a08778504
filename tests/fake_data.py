"""Data for tests: noise in the place of a data set, and files in the IDX format."""

import gzip
import struct
from pathlib import Path

import numpy as np

from torchclust.recipes.schema import DataSection
from torchclust.zoo.dataset import Data, ImageArrays


def fake_data(section: DataSection, count: int = 40) -> Data:
    """Noise in the shape of the data set that a recipe names."""
    shapes = dict.fromkeys(("mnist", "mnist5k", "fashion_mnist"), (1, 28, 28))
    shapes |= {"cifar10": (3, 32, 32), "visual_wake_words": (3, 96, 96)}
    shapes |= {"wake_word": (40, 30, 1)}
    if section.name.startswith("speech"):
        shapes, count = {section.name: (1, 49, 10)}, 12
    classes = {"speech_commands": 12, "visual_wake_words": 2, "wake_word": 3}.get(section.name, 10)
    if section.name == "image_folder":
        shapes[section.name] = (3, section.image_size or 224, section.image_size or 224)
    shape = shapes[section.name]
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    part = ImageArrays(images, np.arange(count) % min(classes, 10))
    return Data(part, part, shape, classes)


def write_idx(file: Path, array: np.ndarray, *, zipped: bool = False) -> None:
    """Write `array` of uint8 as an IDX file."""
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(raw) if zipped else raw)
