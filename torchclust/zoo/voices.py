"""Keywords as espeak-ng's voices say them, with noise."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import DataError, required
from torchclust.zoo.keywords import CLASSES, OTHER_WORDS, RATE, Floats, Samples, features, to_int16

# A voice is an accent and a variant, the shape of a throat. No variant speaks in both parts.
_ACCENTS = ("en-us", "en-gb", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd",
            "en-gb-x-rp")  # fmt: skip
TRAIN_VARIANTS = ("m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f4", "klatt", "klatt2",
                   "klatt4", "Alex", "Alicia", "Andrea", "Andy", "Denis", "Gene", "Hugo",
                   "Jacky", "Lee", "Mario", "Mike", "ed", "john", "max", "pablo", "robert",
                   "sandro", "zac")  # fmt: skip
TEST_VARIANTS = ("m5", "m8", "f3", "f5", "klatt3", "Annie", "Michael", "linda", "david", "steph")


def espeak_version() -> str:
    """Return espeak-ng's version, or raise a `DataError` that says how to install it."""
    if shutil.which("espeak-ng") is None:
        raise DataError(
            "data speech_synthetic is spoken by espeak-ng, which is not installed:  "
            "apt-get install espeak-ng  — or name a folder of recordings, Speech Commands v0.02:  "
            "--set data.root=/path/to/speech_commands"
        )
    return _espeak("--version").decode(errors="replace").split("Data at")[0].strip()


def speak_all(
    count: int, variants: Sequence[str], seed: int, part: int, threads: int
) -> list[tuple[Floats, int]]:
    """Return `count` clips, the classes taking turns, each drawn from a stream of its own."""

    def one(index: int) -> tuple[Floats, int]:
        rng = np.random.default_rng([seed, part, index])
        label = index % len(CLASSES)
        return features(_clip(_word(label, rng), variants, rng)), label

    # Threads: the work is espeak-ng's, in a process of its own for each clip.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(count)))


def _word(label: int, rng: np.random.Generator) -> str | None:
    """Return what is said in a clip of a class; nothing for silence."""
    if CLASSES[label] == "silence":
        return None
    return str(rng.choice(OTHER_WORDS)) if CLASSES[label] == "unknown" else CLASSES[label]


def _clip(word: str | None, variants: Sequence[str], rng: np.random.Generator) -> Samples:
    """Return one second, int16 (16000,), with a word somewhere in it and noise everywhere."""
    level = 10 ** rng.uniform(2.0, 3.6)
    noise = _noise(rng)
    if word is None:
        return to_int16(noise * level)
    spoken = _spoken(word, variants, rng)
    spoken = spoken / max(float(np.sqrt(np.mean(spoken**2))), 1e-6)
    second = np.zeros(RATE)
    start = int(rng.integers(0, max(1, RATE - len(spoken) + 1)))
    second[start : start + len(spoken)] = spoken[: RATE - start]
    return to_int16(level * (second + noise * 10 ** (-rng.uniform(0, 25) / 20)))


def _spoken(word: str, variants: Sequence[str], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a word as some voice says it, without the silence around it, at 16 kHz."""
    signal = required("scipy.signal", "scipy", "data speech_synthetic")
    voice = f"{rng.choice(_ACCENTS)}+{rng.choice(variants)}"
    pitch, speed = str(rng.integers(15, 90)), str(rng.integers(110, 240))
    wav = _espeak("--stdout", "-v", voice, "-p", pitch, "-s", speed, word)
    # The header's lengths are not filled in when espeak-ng writes to a pipe.
    at = wav.index(b"data") + 8
    rate = int.from_bytes(wav[24:28], "little")
    raw = np.frombuffer(wav[at : len(wav) - (len(wav) - at) % 2], np.int16).astype(np.float64)
    sound = signal.resample_poly(raw, RATE, rate)
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max(initial=1.0))
    return np.asarray(sound[loud[0] : loud[-1] + 1] if len(loud) else sound[:1], np.float64)


def _espeak(*words: str) -> bytes:
    """Return what espeak-ng writes; where it writes nothing, it usually lacks the voice."""
    done = subprocess.run(["espeak-ng", *words], capture_output=True)
    if done.returncode or not done.stdout:
        reason = " ".join(done.stderr.decode(errors="replace").split()).rstrip(".")
        raise DataError(
            f"espeak-ng {' '.join(words)} failed: {reason or 'it says nothing'}; install it with "
            "all its voices:  apt-get install --reinstall espeak-ng espeak-ng-data"
        )
    return done.stdout


def _noise(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a second of noise of power 1 whose spectrum falls by 0 to 6 dB an octave.

    Its loudness wanders by some decibels, so that noise alone does not sound like a constant.
    """
    spectrum = np.fft.rfft(rng.standard_normal(RATE))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0, 1)
    wander = np.interp(np.arange(RATE), np.linspace(0, RATE, 9), rng.normal(0, 3, 9))
    noise = np.fft.irfft(spectrum, RATE) * 10 ** (wander / 20)
    return np.asarray(noise / np.sqrt(np.mean(noise**2)))
