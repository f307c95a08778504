"""Mel energies, band by band: the formulas of both front ends, written out for one frame."""

from __future__ import annotations

import math

import numpy as np
import pytest

from torchclust.zoo.mel_energies import machine_energies, wake_word_energies


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return (3000 * np.random.default_rng(0).normal(size=16000)).astype(np.int16)


def test_wake_word_frame(noise: np.ndarray) -> None:
    sound = noise / noise.max()
    emphasised = [sound[i] - (1 - 1 / 32) * (sound[i - 1] if i else 0.0) for i in range(len(sound))]
    frame = np.array(emphasised[3 * 512 : 3 * 512 + 1024])
    window = [0.54 - 0.46 * math.cos(2 * math.pi * n / 1023) for n in range(1024)]
    power = np.abs(np.fft.rfft(frame * window)) ** 2 / 1024
    highest = 1127 * math.log(1 + 8000 / 700)
    edges = [highest * i / 41 for i in range(42)]
    for band in (0, 7, 39):
        low, centre, high = edges[band : band + 3]
        total = 0.0
        for k, value in enumerate(power):
            at = 1127 * math.log(1 + k * 16000 / 1024 / 700)
            total += max(0, min((at - low) / (centre - low), (high - at) / (high - centre))) * value
        expected = min(1, max(0, (10 * math.log10(total) + 52) / 64))
        assert wake_word_energies(noise)[band, 3] == pytest.approx(expected, abs=1e-6)


def test_wake_word_takes_any_length_and_loudness(noise: np.ndarray) -> None:
    quiet = (noise // 2 * 2).astype(np.int16)
    np.testing.assert_allclose(wake_word_energies(quiet), wake_word_energies(quiet // 2), atol=1e-6)
    assert wake_word_energies(noise[:100]).shape == wake_word_energies(np.tile(noise, 2)).shape
    assert not wake_word_energies(noise[:100])[:, 1:].any()  # silence


def slaney(hertz: float) -> float:
    """Slaney's scale, Auditory Toolbox (1998): 3 mel in 200 Hz, above 1,000 Hz logarithmic."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def test_machine_frame(noise: np.ndarray) -> None:
    frame = noise[2 * 512 : 2 * 512 + 1024] / 32768
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 1024) for n in range(1024)]
    power = np.abs(np.fft.rfft(frame * window)) ** 2
    found = machine_energies(noise)
    assert found.shape == (30, 128)
    grid = np.linspace(0, 8000, 160001)
    mels = [slaney(hertz) for hertz in grid]
    edges = np.interp(np.linspace(0, slaney(8000), 130), mels, grid)
    for band in (0, 20, 127):
        low, centre, high = edges[band : band + 3]
        total = 0.0
        for k, value in enumerate(power):
            at = k * 16000 / 1024
            total += max(0, min((at - low) / (centre - low), (high - at) / (high - centre))) * value
        expected = 10 * math.log10(total * 2 / (high - low) + np.finfo(float).eps)
        assert found[2, band] == pytest.approx(expected, abs=1e-3)
