"""Real recordings of words: Speech Commands for MLPerf Tiny's network, and spoken digits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import Data, DataError, Spectrograms, reading
from torchclust.zoo.keywords import CLASSES, COEFFICIENTS, FRAMES, Floats
from torchclust.zoo.mel_energies import wake_word_energies
from torchclust.zoo.mfcc import mfcc
from torchclust.zoo.speech import read_wav, recorded

LABELS = (
    *("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"),
    *("silence", "unknown"),
)
"""In the order of MLPerf Tiny's reference network."""

_DIGIT = re.compile(r"(\d)_.+_(\d+)\.wav")
_DIGITS_TEST = 5  # recordings 0 to 4 of every digit and speaker are for testing


def speech_commands(root: Path) -> Data:
    """Load the 12 words of Speech Commands v0.02 as MFCCs (1, 49, 10), for MLPerf Tiny's network.

    `root` is the folder as Google ships it (``testing_list.txt``, ``yes/*.wav`` ...), or one that
    holds ``mfcc.npz``: arrays ``mfcc`` (N, 49, 10), ``label`` in the order of `LABELS`, and
    ``split``: ``"a"`` to train or calibrate with, ``"b"`` to test on.
    """
    file = root / "mfcc.npz"
    if file.is_file():
        return _from_arrays(file)
    if not (root / "testing_list.txt").is_file():
        raise DataError(
            f"speech_commands: {root} holds neither mfcc.npz nor testing_list.txt; data.root is "
            "the folder that Speech Commands v0.02 was unpacked into:  "
            "--set data.root=/path/to/speech_commands_v0.02"
        )
    train, test = recorded(root, 0, mfcc)
    order = np.array([LABELS.index(name) for name in CLASSES])
    return _data(train.features, order[train.labels], test.features, order[test.labels], 12)


def wake_word(root: Path) -> Data:
    """Load "marvin", silence and other words of Speech Commands v0.02 as energies (40, 30, 1).

    `root` is the folder as Google ships it; the classes are in the order of MLPerf Tiny's streaming
    wake word network, and each has as many clips as there are of the word.
    """
    train, test = recorded(root, 0, wake_word_energies, ("marvin",))
    shown = [Spectrograms(part.features[..., None], part.labels) for part in (train, test)]
    return Data(shown[0], shown[1], (*train.features.shape[1:], 1), 3)


def fsdd(root: Path) -> Data:
    """Load the Free Spoken Digit Dataset, 2,700 / 300 recordings, as MFCCs (1, 49, 10).

    ``root/recordings`` (or `root`) holds ``DIGIT_SPEAKER_NUMBER.wav`` at 8 kHz; numbers 0 to 4 are
    the test set, as its authors say. A recording is doubled in rate by linear interpolation.
    """
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    files = sorted(folder.glob("[0-9]_*_*.wav"))
    names = [_digit(file) for file in files]
    labels = np.array([digit for digit, _ in names])
    test = np.array([number < _DIGITS_TEST for _, number in names])
    if test.all() or not test.any():
        raise DataError(
            f"fsdd: no DIGIT_SPEAKER_NUMBER.wav in {folder} to train with (5 and up) or to test "
            "with (0 to 4); data.root is the folder of the Free Spoken Digit Dataset:  "
            "--set data.root=/path/to/free-spoken-digit-dataset"
        )
    features = np.stack([mfcc(_doubled(read_wav(file, 8000))) for file in files])
    return _data(features[~test], labels[~test], features[test], labels[test], 10)


def _digit(file: Path) -> tuple[int, int]:
    """Return the digit and the number that a recording's name holds."""
    found = _DIGIT.fullmatch(file.name)
    if found is None:
        raise DataError(f"{file} is not named DIGIT_SPEAKER_NUMBER.wav: rename it or delete it")
    return int(found[1]), int(found[2])


def _doubled(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    at = np.arange(2 * len(samples)) / 2
    return np.interp(at, np.arange(len(samples)), samples).astype(np.int16)


def _from_arrays(file: Path) -> Data:
    with reading(file), file.open("rb") as raw, np.load(raw) as stored:
        features, labels = stored["mfcc"].astype(np.float32), stored["label"].astype(np.int64)
        split = stored["split"].astype(str)
    train, test = split == "a", split == "b"
    shape = (*split.shape, FRAMES, COEFFICIENTS)
    if features.shape != shape or labels.shape != split.shape or not (train.any() and test.any()):
        raise DataError(
            f'{file} should hold mfcc (N, 49, 10), label (N,) and split (N,) of "a" and "b", but '
            f"holds {features.shape}, {labels.shape} and {split.shape} of "
            f"{np.unique(split)[:4].tolist()}; copy it anew"
        )
    return _data(features[train], labels[train], features[test], labels[test], len(LABELS))


def _data(
    train: Floats, train_labels: NDArray[Any], test: Floats, test_labels: NDArray[Any], classes: int
) -> Data:
    parts = ((train, train_labels), (test, test_labels))
    shown = [Spectrograms(x[:, None], labels.astype(np.int64)) for x, labels in parts]
    return Data(shown[0], shown[1], (1, *train.shape[1:]), classes)
