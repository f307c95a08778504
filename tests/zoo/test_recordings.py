"""MFCCs as the reference makes them, the two layouts of Speech Commands, and spoken digits."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchclust.zoo.dataset import DataError
from torchclust.zoo.keywords import CLASSES
from torchclust.zoo.mel_energies import wake_word_energies
from torchclust.zoo.mfcc import mfcc
from torchclust.zoo.recordings import LABELS, fsdd, speech_commands, wake_word


def write_wav(file: Path, samples: np.ndarray, rate: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.astype(np.int16).tobytes())


def tone(hertz: float, rate: int = 16000, seconds: float = 1.0) -> np.ndarray:
    at = np.arange(int(rate * seconds)) / rate
    return (8000 * np.sin(2 * np.pi * hertz * at)).astype(np.int16)


def test_mfcc_of_a_tone_undone_peaks_in_its_band() -> None:
    """The formulas, written out for one frame: window, spectrum, triangles, logarithm, cosines."""
    clip = tone(1000)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(480) / 480)
    spectrum = np.abs(np.fft.rfft(clip[320:800] / clip.max() * window, 512))
    mel = [1127 * np.log(1 + f / 700) for f in (20, 4000)]
    edges = [mel[0] + (mel[1] - mel[0]) * i / 41 for i in range(42)]
    bands = []
    for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
        total = 0.0
        for k in range(1, 257):
            at = 1127 * np.log(1 + k * 16000 / 512 / 700)
            total += (
                max(0, min((at - low) / (centre - low), (high - at) / (high - centre)))
                * spectrum[k]
            )
        bands.append(np.log(total + 1e-6))
    expected = [
        np.sqrt(2 / 40) * sum(b * np.cos(np.pi / 40 * (j + 0.5) * i) for j, b in enumerate(bands))
        for i in range(10)
    ]
    np.testing.assert_allclose(mfcc(clip)[1], expected, rtol=1e-4, atol=1e-4)


def test_mfcc_takes_any_length_and_loudness() -> None:
    clip = tone(440)
    np.testing.assert_allclose(mfcc(clip), mfcc(2 * clip), atol=1e-4)
    assert mfcc(clip[:5000]).shape == mfcc(np.tile(clip, 2)).shape == (49, 10)
    silent = mfcc(clip[:5000])[20:]
    none = np.broadcast_to(mfcc(np.zeros(1, np.int16))[0], (29, 10))
    np.testing.assert_allclose(silent, none, atol=1e-5)


def test_speech_commands_from_arrays(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(10, 49, 10)).astype(np.float32)
    split = np.array(list("aabbaabbab"))
    np.savez(tmp_path / "mfcc.npz", mfcc=features, label=np.arange(10), split=split)
    data = speech_commands(tmp_path)
    assert (len(data.train), len(data.test), data.n_classes) == (5, 5, 12)
    assert data.input_shape == (1, 49, 10)
    assert torch.equal(data.test[[0]][0][0, 0], torch.from_numpy(features[2]))
    assert data.test.labels.tolist() == [2, 3, 6, 7, 9]


GOOD = {"mfcc": np.ones((4, 49, 10)), "label": np.arange(4), "split": np.array([b"a", b"b"] * 2)}


def test_arrays_of_other_types_are_the_same_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "mfcc.npz", **GOOD)
    data = speech_commands(tmp_path)
    assert (len(data.train), len(data.test)) == (2, 2)
    assert data.train[[0]][0].dtype == torch.float32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: b"none",
        lambda good: good[: len(good) // 2],
        lambda good: good.replace(np.float64(1).tobytes(), np.float64(2).tobytes(), 1),  # CRC
        lambda good: good[good.index(b"\x93NUMPY") :],  # a .npy so named
    ],
)
def test_a_damaged_file_of_arrays_is_named(tmp_path: Path, spoil: Any) -> None:
    np.savez(tmp_path / "mfcc.npz", **GOOD)
    (tmp_path / "mfcc.npz").write_bytes(spoil((tmp_path / "mfcc.npz").read_bytes()))
    with pytest.raises(DataError, match=r"cannot read .*mfcc\.npz: .*; replace it or delete it"):
        speech_commands(tmp_path)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"label": np.arange(3)}, r"\(4, 49, 10\), \(3,\) and \(4,\) of \['a', 'b'\]"),
        ({"mfcc": np.ones((4, 10, 49))}, r"\(4, 10, 49\), \(4,\) and \(4,\) of .*"),
        ({"split": np.array([b"a"] * 4)}, r"of \['a'\]"),
    ],
)
def test_arrays_that_do_not_belong_together(
    tmp_path: Path, other: dict[str, np.ndarray], found: str
) -> None:
    np.savez(tmp_path / "mfcc.npz", **GOOD | other)
    message = rf"mfcc\.npz should hold mfcc \(N, 49, 10\), .* but holds .*{found}; copy it anew"
    with pytest.raises(DataError, match=message):
        speech_commands(tmp_path)


def test_speech_commands_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, testing = tmp_path / "speech", []
    for word in ("yes", "go", "marvin"):
        for number in range(3):
            write_wav(root / word / f"{number}.wav", tone(200 + 100 * number), 16000)
        testing.append(f"{word}/2.wav")
    write_wav(root / "_background_noise_" / "hum.wav", tone(50, seconds=2), 16000)
    (root / "testing_list.txt").write_text("\n".join(testing))
    (root / "validation_list.txt").write_text("yes/1.wav\n")
    data = speech_commands(root)
    names = [LABELS[i] for i in data.test.labels.tolist()]
    assert names == ["go", "yes", "unknown", "silence"]
    np.testing.assert_array_equal(data.test.features[0, 0], mfcc(tone(400)))
    assert sorted(LABELS) == sorted(CLASSES)


def test_wake_word_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "speech"
    for word in ("yes", "marvin"):
        for number in range(3):
            write_wav(root / word / f"{number}.wav", tone(200 + 100 * number), 16000)
    write_wav(root / "_background_noise_" / "hum.wav", tone(50, seconds=2), 16000)
    (root / "testing_list.txt").write_text("marvin/2.wav\nyes/2.wav\n")
    (root / "validation_list.txt").write_text("yes/1.wav\n")
    data = wake_word(root)
    assert (data.input_shape, data.n_classes) == ((40, 30, 1), 3)
    assert data.test.labels.tolist() == [0, 2, 1]  # marvin, something else, silence
    assert sorted(data.train.labels.tolist()) == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(data.test.features[0, :, :, 0], wake_word_energies(tone(400)))
    with pytest.raises(DataError, match=r"it has no testing_list\.txt.*--set data\.root="):
        wake_word(tmp_path)


def test_speech_commands_missing(tmp_path: Path) -> None:
    message = r"holds neither mfcc\.npz nor testing_list\.txt; .*--set data\.root="
    with pytest.raises(DataError, match=message):
        speech_commands(tmp_path)


def test_spoken_digits(tmp_path: Path) -> None:
    for name in ("0_ann_4", "0_ann_5", "7_ben_0", "9_ben_49"):
        write_wav(tmp_path / "recordings" / f"{name}.wav", tone(300, rate=8000, seconds=0.4), 8000)
    data = fsdd(tmp_path)
    assert data.train.labels.tolist() == [0, 9]
    assert data.test.labels.tolist() == [0, 7]
    assert (data.input_shape, data.n_classes) == ((1, 49, 10), 10)
    # The doubled recording is the same tone: the first second's features agree but for the ends.
    np.testing.assert_allclose(data.test.features[0, 0, 5], mfcc(tone(300))[5], atol=1.5)
    assert torch.equal(fsdd(tmp_path / "recordings").train.features, data.train.features)
    with pytest.raises(DataError, match=r"no DIGIT_SPEAKER_NUMBER\.wav in .*--set data\.root="):
        fsdd(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "seconds", "message"),
    [
        ("3_ann_6", 0, r"3_ann_6\.wav is empty or cut short: it holds 0 bytes of 0 samples"),
        (
            "3_ann_7 (1)",
            0.4,
            r"\(1\)\.wav is not named DIGIT_SPEAKER_NUMBER\.wav: rename it or del",
        ),
    ],
)
def test_spoken_digits_refused(tmp_path: Path, name: str, seconds: float, message: str) -> None:
    write_wav(tmp_path / "3_ann_0.wav", tone(300, rate=8000), 8000)
    with pytest.raises(DataError, match=r"in .* to train with \(5 and up\) or to test with"):
        fsdd(tmp_path)
    write_wav(tmp_path / "3_ann_5.wav", tone(300, rate=8000), 8000)
    assert len(fsdd(tmp_path).train) == 1
    write_wav(tmp_path / f"{name}.wav", tone(300, rate=8000, seconds=seconds), 8000)
    with pytest.raises(DataError, match=message):
        fsdd(tmp_path)
