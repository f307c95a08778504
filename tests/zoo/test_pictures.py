"""CIFAR-10's batches and visual wake words' folders, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchclust.zoo.dataset import DataError
from torchclust.zoo.pictures import cifar10, visual_wake_words


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """Five batches of 20 records and a test batch of 10; the label is also the first red pixel."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{n}", 20) for n in range(1, 6)), ("test_batch", 10)]:
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = records[:, 1] = np.arange(count) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def test_cifar10_is_read_from_its_binary_batches(batches: Path) -> None:
    data = cifar10(batches)
    assert (len(data.train), len(data.test)) == (100, 10)
    assert (data.input_shape, data.n_classes) == ((3, 32, 32), 10)
    images, labels = data.train[[3, 57]]
    assert torch.equal(images[:, 0, 0, 0] * 255, labels.float())
    raw = np.frombuffer((batches / "data_batch_3.bin").read_bytes(), np.uint8).reshape(-1, 3073)
    np.testing.assert_array_equal(images[1].numpy().ravel(), np.float32(raw[17, 1:]) / 255)
    assert torch.equal(cifar10(batches.parent).test.images, data.test.images)


def test_cifar10_missing_or_damaged(batches: Path) -> None:
    (batches / "data_batch_2.bin").write_bytes(b"x" * 3072)
    with pytest.raises(DataError, match="bytes are no whole records of 3073; copy it anew"):
        cifar10(batches)
    (batches / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"cannot be read; .* binary version, .*--set data\.root="):
        cifar10(batches)


def test_visual_wake_words_squeezes_whole_images(tmp_path: Path) -> None:
    for part in ("train2017", "val2017"):
        for name, colour in (("person", (255, 0, 0)), ("non_person", (0, 0, 255))):
            (tmp_path / part / name).mkdir(parents=True)
            image = Image.new("RGB", (40, 20), colour)
            image.paste(Image.new("RGB", (20, 20), (0, 255, 0)), (20, 0))
            image.save(tmp_path / part / name / "1.png")
    data = visual_wake_words(tmp_path, image_size=16)
    assert (data.input_shape, data.n_classes, len(data.train)) == ((3, 16, 16), 2, 1 + 1)
    images, labels = data.test[[0, 1]]
    assert labels.tolist() == [0, 1]
    assert images[1, 0, :, :6].eq(1).all()  # red on the left
    assert images[1, 1, :, 10:].eq(1).all()  # green on the right, nothing cropped
    (tmp_path / "val2017" / "person" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read .*2\.jpg: .*; replace it or delete it"):
        visual_wake_words(tmp_path)


def test_visual_wake_words_missing(tmp_path: Path) -> None:
    message = r"holds no train\*/person and train\*/non_person; .*--set data\.root="
    with pytest.raises(DataError, match=message):
        visual_wake_words(tmp_path)
