"""Keywords as features: spoken by espeak-ng here, or read from the Speech Commands data set.

Both give the same twelve classes and the same kind of array, float32 (N, 49, 10): one second at
16 kHz goes through the TFLite-Micro audio front end (40 logarithmic mel energies, noise-reduced,
from windows of 30 ms every 10 ms), of which every second frame is kept, and a discrete cosine
transform keeps the first 10 coefficients of each. That is the 49 x 10 input of Zhang et al., "Hello
Edge" (2017), 20 ms apart, made by what runs on the microcontroller instead of by MFCCs.

Arrays are cached in ``$XDG_CACHE_HOME/torchclust`` (``~/.cache``) under a name that holds a digest
of everything they depend on: of recordings their names, sizes and times of change. Nothing here
downloads unless `fetch` is called.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchclust.zoo.dataset import DataError, reading
from torchclust.zoo.keywords import (
    OTHER_WORDS,
    RATE,
    WORDS,
    Floats,
    Samples,
    features,
    front_end_version,
    to_int16,
)
from torchclust.zoo.voices import TEST_VARIANTS, TRAIN_VARIANTS, espeak_version, speak_all

ARCHIVE_URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
ARCHIVE_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
_RECIPE = 1  # part of the cache's name: raise it when the clips of a seed change
_RECORDINGS = "[!.]*.wav"  # "._1.wav" is what macOS leaves beside 1.wav, and no recording
_STREAMED = 1 << 29  # samples: nine hours
FrontEnd = Callable[[Samples], Floats]  # from one second to its features


@dataclass(frozen=True)
class Part:
    """Features float32 (N, 49, 10) and class indices int64 (N,)."""

    features: Floats
    labels: NDArray[np.int64]


def synthetic(n_train: int, n_test: int, seed: int, threads: int = 2) -> tuple[Part, Part]:
    """Return a training and a test set spoken by espeak-ng, the same ones for the same seed.

    Every clip has a voice, pitch, speed and loudness of its own, sits anywhere in its second, and
    lies in noise of its own colour, at 0 to 25 dB. Test voices are none of the training voices.

    Raises:
        DataError: espeak-ng or pymicro-features is not installed; the text says how to get it.
    """
    version = espeak_version()

    def compute() -> dict[str, NDArray[Any]]:
        train = speak_all(n_train, TRAIN_VARIANTS, seed, 0, threads)
        test = speak_all(n_test, TEST_VARIANTS, seed, 1, threads)
        return _as_arrays(train, test)

    depends = [_RECIPE, n_train, n_test, seed, version, front_end_version()]
    return _as_parts(_cached("speech_synthetic", depends, compute))


def recorded(
    root: Path, seed: int, front_end: FrontEnd = features, words: Sequence[str] = WORDS
) -> tuple[Part, Part]:
    """Return the training and the test set of Speech Commands v0.02 as it is unpacked in `root`.

    Classes are the `words`, then silence, then unknown. The test set is ``testing_list.txt``; what
    ``validation_list.txt`` names is in neither. Clips of the other words (class "unknown") and
    stretches of background noise ("silence") are drawn, seeded, so that each of the two has as many
    clips as a keyword has on average.

    Raises:
        DataError: `root` is not such a folder, has no ``_background_noise_``, or a file in it is no
            16 kHz recording.
    """
    held_out = {name: _listed(root, f"{name}_list.txt") for name in ("testing", "validation")}
    clips = sorted(
        f"{folder.name}/{file.name}"
        for folder in root.iterdir()
        if folder.is_dir() and folder.name in (*WORDS, *OTHER_WORDS)
        for file in folder.glob(_RECORDINGS)
    )
    noises = sorted((root / "_background_noise_").glob(_RECORDINGS))
    test = [clip for clip in clips if clip in held_out["testing"]]
    train = [clip for clip in clips if clip not in held_out["testing"] | held_out["validation"]]
    if not test or not train:
        raise DataError(
            f"{root} is no Speech Commands folder: {len(train)} clips for training and "
            f"{len(test)} for testing in folders yes, no, up ..."
        )
    if not noises:
        raise DataError(
            f"{root}/_background_noise_ holds no recordings, of which the class silence is made; "
            "unpack the archive anew"
        )

    def compute() -> dict[str, NDArray[Any]]:
        parts = ((train, seed), (test, seed + 1))
        return _as_arrays(
            *(_read_all(root, clips, noises, seed, front_end, words) for clips, seed in parts)
        )

    stamps = [_stamps(root / clip for clip in part) for part in (train, test)]
    version = front_end_version() if front_end is features else front_end.__name__
    depends = [_RECIPE, str(root.resolve()), *stamps, _stamps(noises), seed, version, *words]
    return _as_parts(_cached("speech_commands", depends, compute))


def fetch(root: Path, url: str = ARCHIVE_URL, sha256: str = ARCHIVE_SHA256) -> Path:
    """Download Speech Commands (2.4 GB) and unpack it into `root`; nothing if that is a folder.

    The archive is hashed as it arrives and unpacked beside `root`, which appears only when whole.

    Raises:
        DataError: it cannot be downloaded, or is not the archive that `sha256` names.
    """
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as folder:
        archive, unpacked = Path(folder) / "archive.tar.gz", Path(folder) / "unpacked"
        found = hashlib.sha256()
        try:
            with urllib.request.urlopen(url) as remote, archive.open("wb") as file:
                while block := remote.read(1 << 20):
                    found.update(block)
                    file.write(block)
        except (urllib.error.URLError, OSError) as error:
            raise DataError(f"cannot download {url}: {error}") from error
        if found.hexdigest() != sha256:
            raise DataError(
                f"{url} is not the file that was expected: its SHA-256 is {found.hexdigest()}, "
                f"not {sha256}. Nothing of it was kept"
            )
        try:
            with tarfile.open(archive) as content:
                content.extractall(unpacked, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"cannot unpack {url}: {error}") from error
        os.replace(unpacked, root)
    return root


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/torchclust``, or ``~/.cache/torchclust`` where that is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "torchclust"


def _listed(root: Path, name: str) -> set[str]:
    if not (root / name).is_file():
        raise DataError(
            f"{root} is no Speech Commands folder: it has no {name}. Name the folder that the "
            "archive was unpacked into:  --set data.root=/path/to/speech_commands_v0.02  "
            "— or add --download to fetch it (2.4 GB)"
        )
    with reading(root / name):
        return set((root / name).read_text(encoding="utf-8-sig").split())


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return what changes with a recording: reading all of them would take as long as no cache."""
    found = []
    for file in files:
        with reading(file):
            state = file.stat()
        found.append(("/".join(file.parts[-2:]), state.st_size, state.st_mtime_ns))
    return found


def _read_all(
    root: Path,
    clips: Sequence[str],
    noises: Sequence[Path],
    seed: int,
    front_end: FrontEnd,
    words: Sequence[str],
) -> list[tuple[Floats, int]]:
    """Return keywords as they are listed, and as many unknown words and silences as a word has."""
    rng = np.random.default_rng(seed)
    known = [clip for clip in clips if clip.partition("/")[0] in words]
    others = [clip for clip in clips if clip.partition("/")[0] not in words]
    share = max(1, len(known) // len(words))
    chosen = sorted(rng.permutation(len(others))[:share].tolist())
    named = [(clip, words.index(clip.partition("/")[0])) for clip in known]
    named += [(others[i], len(words) + 1) for i in chosen]
    found = [(front_end(_second(read_wav(root / clip))), label) for clip, label in named]
    sounds = [read_wav(file) for file in noises]
    silences = (_stretch(sounds, rng) for _ in range(share))
    return found + [(front_end(clip), len(words)) for clip in silences]


def read_wav(file: Path, rate: int = RATE) -> Samples:
    """Return the samples of a recording, int16 (n,): one channel of 16 bits at `rate`, in hertz.

    Raises:
        DataError: `file` is something else, or is empty, damaged or cut short.
    """
    with reading(file), wave.open(io.BytesIO(file.read_bytes())) as sound:
        kind = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
        stated = sound.getnframes()
        raw = sound.readframes(stated)
    if kind != (1, 2, rate):
        raise DataError(
            f"{file} should be one channel of 16 bits at {rate:,} Hz, but has "
            f"{kind[0]} of {8 * kind[1]} bits at {kind[2]:,} Hz"
        )
    # A program that writes into a pipe states the most that the header can hold: no length at all.
    if not raw or len(raw) % 2 or len(raw) // 2 < stated < _STREAMED:
        raise DataError(
            f"{file} is empty or cut short: it holds {len(raw):,} bytes of {stated:,} samples of "
            "16 bits; copy it anew or delete it"
        )
    return np.frombuffer(raw, np.int16)


def _second(samples: Samples) -> Samples:
    """Return exactly one second: the rest is cut off, what is missing is silence."""
    return np.pad(samples[:RATE], (0, max(0, RATE - len(samples))))


def _stretch(noises: Sequence[Samples], rng: np.random.Generator) -> Samples:
    """Return a second of one of the noises, from anywhere in it, at up to its loudness."""
    noise = noises[int(rng.integers(len(noises)))]
    start = int(rng.integers(0, max(1, len(noise) - RATE)))
    return to_int16(_second(noise[start:]).astype(np.float64) * rng.uniform(0, 1))


def _as_arrays(*parts: Iterable[tuple[Floats, int]]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        arrays, labels = zip(*part, strict=True)
        found[f"{name}_features"] = np.stack(arrays)
        found[f"{name}_labels"] = np.array(labels, np.int64)
    return found


def _as_parts(arrays: Mapping[str, NDArray[Any]]) -> tuple[Part, Part]:
    train, test = (Part(arrays[f"{n}_features"], arrays[f"{n}_labels"]) for n in ("train", "test"))
    return train, test


def _cached(
    name: str, depends: Sequence[Any], compute: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """Return arrays from the cache, or compute and store them; a damaged file is made anew."""
    digest = hashlib.sha256(repr(list(depends)).encode()).hexdigest()[:12]
    file = cache_folder() / f"{name}-{digest}.npz"
    if file.exists():
        try:
            with reading(file), file.open("rb") as raw, np.load(raw) as stored:
                return dict(stored)
        except DataError:
            file.unlink()
    arrays = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as whole:
        np.savez(whole, **arrays)  # type: ignore[arg-type,unused-ignore]
    os.replace(partial, file)
    return arrays
