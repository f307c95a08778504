"""Twelve classes of keywords, and the front end: a second of sound becomes 49 x 10 features."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import required

Samples = NDArray[np.int16]
Floats = NDArray[np.float32]

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES = (*WORDS, "silence", "unknown")
OTHER_WORDS = (
    *("backward", "bed", "bird", "cat", "dog", "eight", "five", "follow", "forward", "four"),
    *("happy", "house", "learn", "marvin", "nine", "one", "seven", "sheila", "six", "three"),
    *("tree", "two", "visual", "wow", "zero"),
)
RATE = 16_000  # samples in a second, and in a clip
FRAMES, COEFFICIENTS = 49, 10


def features(clip: Samples) -> Floats:
    """Return the (49, 10) features of one second, int16 (16000,)."""
    front_end = _front_end().MicroFrontend()
    raw, frames, start = clip.tobytes(), [], 0
    while start + 320 <= len(raw):  # 10 ms of 16-bit samples, which is what one call reads
        done = front_end.process_samples(raw[start : start + 320])
        start += 2 * done.samples_read
        if done.features:
            frames.append(done.features)
    mel = np.asarray(frames[: 2 * FRAMES : 2], np.float32)
    return np.asarray(mel @ _cosines(mel.shape[1]))


def _cosines(channels: int) -> Floats:
    """Return the first 10 vectors of the orthonormal DCT-II as columns: (`channels`, 10)."""
    angles = np.pi / channels * np.outer(np.arange(channels) + 0.5, np.arange(COEFFICIENTS))
    basis: NDArray[np.float64] = np.cos(angles) * np.sqrt(2 / channels)
    basis[:, 0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _front_end() -> Any:
    return required("pymicro_features", "pymicro-features", "speech")


def front_end_version() -> str:
    """Return the version of the audio front end, on which features depend."""
    _front_end()
    return importlib.metadata.version("pymicro-features")


def to_int16(samples: NDArray[np.float64]) -> Samples:
    """Return samples rounded and clipped to int16."""
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)
