"""The front end of MLPerf Tiny's keyword spotting: a second of sound becomes 49 x 10 MFCCs.

Windows of 30 ms every 20 ms, 40 mel bands from 20 to 4,000 Hz, logarithm, cosine transform. The
formulas are those of tf.signal, on which the reference network was trained.
"""

from __future__ import annotations

import numpy as np

from torchclust.zoo.keywords import COEFFICIENTS, RATE, Floats, Samples
from torchclust.zoo.mel_energies import Bands, triangles

_WINDOW, _STEP, _BINS = 480, 320, 512
_BANDS, _LOWEST, _HIGHEST = 40, 20.0, 4000.0
_FLOOR = 1e-6


def mfcc(clip: Samples) -> Floats:
    """Return the (49, 10) features of up to one second at 16 kHz; what is missing is silence.

    >>> mfcc(np.zeros(16000, np.int16)).shape
    (49, 10)
    """
    sound = np.pad(clip[:RATE].astype(np.float64), (0, max(0, RATE - len(clip))))
    sound /= max(1.0, sound.max())
    frames = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[::_STEP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi / _WINDOW * np.arange(_WINDOW))
    energies = np.abs(np.fft.rfft(frames * hann, _BINS)) @ _mel_bands()
    bands = np.arange(_BANDS) + 0.5
    cosines = np.cos(np.pi / _BANDS * np.outer(bands, np.arange(COEFFICIENTS)))
    found: Floats = (np.log(energies + _FLOOR) @ cosines * np.sqrt(2 / _BANDS)).astype(np.float32)
    return found


def _mel_bands() -> Bands:
    """Triangles, evenly spaced in mel, over the spectrum's bins; the constant is left out."""
    mel = 1127 * np.log1p(np.linspace(0, RATE / 2, _BINS // 2 + 1) / 700)
    lowest, highest = 1127 * np.log1p(_LOWEST / 700), 1127 * np.log1p(_HIGHEST / 700)
    bands = triangles(np.linspace(lowest, highest, _BANDS + 2), mel)
    bands[0] = 0
    return bands
