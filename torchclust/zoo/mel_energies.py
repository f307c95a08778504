"""Logarithmic mel energies: the front ends of MLPerf Tiny's wake word and anomaly detection.

Both cut sound into overlapping windows, weigh the power spectrum with triangles, and take ten
logarithms; they differ in window, mel scale and scaling. The wake word's formulas are those of
tf.signal, the machine's those of librosa, on which the reference networks were trained.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.keywords import RATE, Floats, Samples

Bands = NDArray[np.float64]
_PREEMPHASIS = 1 - 2**-5


def wake_word_energies(clip: Samples) -> Floats:
    """Return the (40, 30) energies, in [0, 1], of up to one second at 16 kHz.

    >>> wake_word_energies(np.zeros(16000, np.int16)).shape
    (40, 30)
    """
    sound = np.pad(clip[:RATE].astype(np.float64), (0, max(0, RATE - len(clip))))
    sound /= max(1.0, sound.max())
    sound -= _PREEMPHASIS * np.append(0.0, sound[:-1])
    frames = np.lib.stride_tricks.sliding_window_view(sound, 1024)[::512]
    power = np.abs(np.fft.rfft(frames * np.hamming(1024))) ** 2 / 1024
    edges = 700 * np.expm1(np.linspace(0, np.log1p(RATE / 2 / 700), 42))
    energies = np.maximum(power, 1e-30) @ triangles(_mel(edges), _mel(_frequencies(1024)))
    decibels = 10 * np.log10(np.maximum(energies, 1e-30))
    found: Floats = np.clip((decibels + 52) / 64, 0, 1).T.astype(np.float32)
    return found


def machine_energies(sound: Samples) -> Floats:
    """Return decibels (frames, 128) of a recording of any length at 16 kHz.

    >>> machine_energies(np.zeros(16000, np.int16)).shape
    (30, 128)
    """
    frames = np.lib.stride_tricks.sliding_window_view(sound / 2.0**15, 1024)[::512]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi / 1024 * np.arange(1024))
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    edges = _slaney_frequencies(np.linspace(0, _slaney_mel(RATE / 2), 130))
    bands = triangles(edges, _frequencies(1024)) * (2 / (edges[2:] - edges[:-2]))
    found: Floats = (10 * np.log10(power @ bands + np.finfo(float).eps)).astype(np.float32)
    return found


def _frequencies(window: int) -> Bands:
    found: Bands = np.fft.rfftfreq(window, 1 / RATE).astype(np.float64)
    return found


def _mel(hertz: Bands) -> Bands:
    """HTK's scale, up to a constant."""
    found: Bands = np.log1p(hertz / 700)
    return found


def triangles(edges: Bands, at: Bands) -> Bands:
    """Of every three edges in turn a triangle of height 1, at these places: (places, bands)."""
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (at[:, None] - low) / (centre - low)
    falling = (high - at[:, None]) / (high - centre)
    found: Bands = np.maximum(np.minimum(rising, falling), 0)
    return found


_STEP, _BREAK = 200 / 3, 15.0  # Slaney's scale: even up to 1,000 Hz, which is 15, then in ratios
_RATIO = np.log(6.4) / 27


def _slaney_mel(hertz: float) -> float:
    return float(_BREAK + np.log(hertz / 1000) / _RATIO) if hertz > 1000 else hertz / _STEP


def _slaney_frequencies(mel: Bands) -> Bands:
    return np.where(mel > _BREAK, 1000 * np.exp(_RATIO * (mel - _BREAK)), _STEP * mel)
