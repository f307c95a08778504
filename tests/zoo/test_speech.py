"""Keywords: what espeak-ng says, what a folder of recordings holds, what a download must be."""

import hashlib
import http.server
import io
import os
import shutil
import sys
import tarfile
import threading
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from pymicro_features import MicroFrontend

from torchclust.cli.parser import parser
from torchclust.recipes.load import load_recipe
from torchclust.recipes.prepare import load_data
from torchclust.recipes.schema import DataSection, RecipeError
from torchclust.zoo import data, keywords, speech, voices
from torchclust.zoo.data import speech_synthetic
from torchclust.zoo.dataset import DataError

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="apt-get install espeak-ng"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "torchclust"


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(keywords.RATE * seconds)) / keywords.RATE
    return np.int16(8000 * np.sin(2 * np.pi * hertz * time))


def write_wav(file: Path, samples: np.ndarray, *, rate: int = keywords.RATE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Speech Commands in miniature: tones for words, 6 clips of each of the 35."""
    root = tmp_path / "speech"
    for number, word in enumerate((*keywords.WORDS, *keywords.OTHER_WORDS)):
        for clip in range(6):
            write_wav(root / word / f"{clip}.wav", tone(200 + 100 * number, 1 - 0.1 * clip))
    write_wav(root / "_background_noise_" / "hum.wav", tone(50, 3))
    words = (*keywords.WORDS, *keywords.OTHER_WORDS)
    (root / "testing_list.txt").write_text("".join(f"{word}/5.wav\n" for word in words))
    (root / "validation_list.txt").write_text("".join(f"{word}/4.wav\n" for word in words))
    return root


def test_features_are_the_front_ends_every_second_frame_in_cosines() -> None:
    clip = np.random.default_rng(0).integers(-9000, 9000, keywords.RATE).astype(np.int16)
    front_end, frames = MicroFrontend(), []
    for start in range(0, keywords.RATE, 160):
        found = front_end.process_samples(clip[start : start + 160].tobytes())
        frames += [found.features] if found.features else []
    assert len(frames) == 98
    expected = scipy.fft.dct(np.array(frames[::2]), norm="ortho")[:, :10]
    found = keywords.features(clip)
    assert (found.shape, found.dtype) == ((49, 10), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(keywords.features(clip), found)  # no state is left behind


@needs_espeak
def test_synthetic_clips_are_seeded_balanced_and_cached(cache: Path) -> None:
    train, test = speech.synthetic(36, 24, 3)
    assert (train.features.shape, test.features.shape) == ((36, 49, 10), (24, 49, 10))
    assert np.bincount(train.labels).tolist() == [3] * 12
    assert len(np.unique(train.features.reshape(36, -1), axis=0)) == 36
    (stored,) = cache.iterdir()
    stored.unlink()
    again, _ = speech.synthetic(36, 24, 3, threads=1)
    np.testing.assert_array_equal(again.features, train.features)
    other, _ = speech.synthetic(36, 24, 4)
    assert not np.array_equal(other.features, train.features)
    assert len(list(cache.iterdir())) == 2


@needs_espeak
def test_words_are_heard_and_silence_is_not() -> None:
    rng = np.random.default_rng(0)
    for word in ("yes", "backward"):
        sound = voices._spoken(word, voices.TEST_VARIANTS, rng)
        assert 0.1 * keywords.RATE < len(sound) < 1.5 * keywords.RATE
        assert np.abs(sound).max() > 1000
    assert voices._word(keywords.CLASSES.index("silence"), rng) is None
    assert voices._word(keywords.CLASSES.index("unknown"), rng) in keywords.OTHER_WORDS
    assert voices._word(3, rng) == "down"


def test_no_voice_is_in_both_parts() -> None:
    assert not set(voices.TRAIN_VARIANTS) & set(voices.TEST_VARIANTS)


@needs_espeak
def test_a_damaged_cache_is_made_anew(cache: Path) -> None:
    first, _ = speech.synthetic(12, 12, 0)
    (stored,) = cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:-3000])
    again, _ = speech.synthetic(12, 12, 0)
    np.testing.assert_array_equal(again.features, first.features)


def test_a_cache_of_which_zipfile_makes_nothing_is_made_anew(cache: Path) -> None:
    """A flipped byte names a compression that nobody has: a NotImplementedError of zipfile's."""
    arrays = {"a": np.arange(3)}
    speech._cached("name", [1], lambda: arrays)
    (stored,) = cache.iterdir()
    raw = bytearray(stored.read_bytes())
    raw[raw.index(b"PK\1\2") + 10] = 77
    stored.write_bytes(raw)
    assert speech._cached("name", [1], lambda: arrays) is arrays


def test_a_cache_in_use_is_never_half_a_file(cache: Path) -> None:
    """Whoever comes second finds the first one's file, not the work again."""
    calls = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(len(list(cache.iterdir())) if cache.exists() else 0)
        return {"a": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(speech._cached("name", [1], compute)["a"], np.arange(3))
    assert calls == [0]
    speech._cached("name", [2], compute)
    assert len(calls) == 2
    assert [file.suffix for file in cache.iterdir()] == [".npz"] * 2


def test_the_data_set_is_scaled_by_its_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = [
        speech.Part(rng.normal(7, 3, (n, 49, 10)).astype(np.float32), np.arange(n) % 12)
        for n in (60, 24)
    ]
    monkeypatch.setattr(speech, "synthetic", lambda *arguments: tuple(parts))
    found = speech_synthetic()
    assert (found.input_shape, found.n_classes) == ((1, 49, 10), 12)
    clips, labels = found.train[list(range(60))]
    assert clips.dtype == torch.float32
    torch.testing.assert_close(clips.mean((0, 1, 2)), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(clips.std((0, 1, 2), correction=0), torch.ones(10))
    assert labels.tolist() == parts[0].labels.tolist()
    tested, _ = found.test[[0]]
    expected = (parts[1].features[0] - parts[0].features.mean((0, 1))) / parts[0].features.std(
        (0, 1)
    )
    np.testing.assert_allclose(tested[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_recordings_follow_the_published_lists(recordings: Path) -> None:
    train, test = speech.recorded(recordings, 0)
    # Four clips of each of ten words for training, one for testing; silence and unknown as many.
    assert np.bincount(train.labels).tolist() == [4] * 12
    assert np.bincount(test.labels).tolist() == [1] * 12
    yes = keywords.features(np.pad(tone(200, 0.5), (0, keywords.RATE // 2)))
    np.testing.assert_array_equal(test.features[test.labels == 0][0], yes)
    found = speech_synthetic(recordings)
    assert (len(found.train), len(found.test), found.n_classes) == (48, 12, 12)


def test_recordings_are_read_again_once_they_change(recordings: Path, cache: Path) -> None:
    first, _ = speech.recorded(recordings, 0)
    (recordings / "up" / "._0.wav").write_bytes(b"\0\5\x16\7")  # of macOS, and no recording
    again, _ = speech.recorded(recordings, 0)
    assert len(list(cache.iterdir())) == 1
    np.testing.assert_array_equal(again.features, first.features)
    later = (recordings / "up" / "0.wav").stat().st_mtime_ns + 1
    for file, label in (("up/0.wav", 2), ("_background_noise_/hum.wav", 10)):
        write_wav(recordings / file, tone(1234, 3 if label == 10 else 1.0))  # of the same length
        os.utime(recordings / file, ns=(later, later))
        before, (again, _) = again, speech.recorded(recordings, 0)
        changed = (again.features != before.features).any((1, 2))
        assert set(again.labels[changed]) == {label}


def test_lists_may_begin_with_a_mark(recordings: Path) -> None:
    _, test = speech.recorded(recordings, 0)
    file = recordings / "testing_list.txt"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert len(speech.recorded(recordings, 0)[1].labels) == len(test.labels)


def test_a_recording_from_a_pipe_states_no_length(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(440))
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    raw[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(raw)
    np.testing.assert_array_equal(speech.read_wav(tmp_path / "a.wav"), tone(440))
    cut(tmp_path / "a.wav", 1)
    with pytest.raises(DataError, match="cut short: it holds 31,999 bytes"):
        speech.read_wav(tmp_path / "a.wav")


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "testing_list.txt").unlink(),
            r"it has no testing_list\.txt.*--download",
        ),
        (
            lambda root: (root / "testing_list.txt").write_text("up/5.wav", encoding="utf-16"),
            r"cannot read .*testing_list\.txt: .*codec.*; replace it or delete it",
        ),
        (
            lambda root: shutil.rmtree(root / "_background_noise_"),
            r"_background_noise_ holds no recordings, of which the class silence is made; unpack",
        ),
        (
            lambda root: (root / "testing_list.txt").write_text(""),
            r"\d+ clips for training and 0 for testing",
        ),
        (
            lambda root: write_wav(root / "up" / "0.wav", tone(99), rate=8000),
            r"should be one channel of 16 bits at 16,000 Hz, but has 1 of 16 bits at 8,000 Hz",
        ),
        (
            lambda root: (root / "up" / "0.wav").write_bytes(b"RIFF"),
            r"cannot read .*up/0\.wav: EOF",
        ),
        (
            lambda root: cut(root / "up" / "0.wav", 1),
            r"up/0\.wav is empty or cut short: it holds 31,999 bytes of 16,000 samples",
        ),
        (
            lambda root: cut(root / "up" / "0.wav", 12_000),
            r"it holds 20,000 bytes of 16,000 samples of 16 bits; copy it anew or delete it",
        ),
    ],
)
def test_recordings_refused(recordings: Path, spoil, message: str) -> None:
    spoil(recordings)
    with pytest.raises(DataError, match=message):
        speech.recorded(recordings, 0)


def test_espeak_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"apt-get install espeak-ng .*--set data\.root="):
        speech_synthetic()


def espeak(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program of that name in front of all others: it has a version, and otherwise does this."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "espeak-ng"
    version = '[ "$1" = --version ] && echo "eSpeak NG: 1.50  Data at: /x" && exit'
    program.write_text(f"#!/bin/sh\n{version}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo No such voice. >&2; exit 1", "No such voice"), ("exit 0", "it says nothing")],
)
def test_espeak_without_its_voices_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    espeak(tmp_path, monkeypatch, script)
    message = rf"espeak-ng --stdout -v en.* failed: {reason}; install it with all its voices:  apt-"
    with pytest.raises(DataError, match=message):
        speech_synthetic()


@pytest.mark.parametrize(
    ("module", "package"),
    [("pymicro_features", "pymicro-features"), ("scipy.signal", "scipy")],
)
def test_speech_names_the_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    espeak(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"needs the package {package}, which is not installed:  pip install .torchclust\[rec"
    with pytest.raises(DataError, match=message):
        speech_synthetic()


@pytest.fixture
def archive(recordings: Path, tmp_path: Path) -> Path:
    file = tmp_path / "archive.tar.gz"
    with tarfile.open(file, "w:gz") as content:
        for part in sorted(recordings.rglob("*")):
            content.add(part, str(part.relative_to(recordings)), recursive=False)
    return file


@pytest.fixture
def server(archive: Path) -> Iterator[str]:
    """The archive on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(archive.parent))

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def test_a_download_is_checked_unpacked_and_done_once(
    archive: Path, server: str, recordings: Path, tmp_path: Path
) -> None:
    root = tmp_path / "new" / "speech_commands"
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert speech.fetch(root, f"{server}/archive.tar.gz", sha256) == root
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == sorted(
        p.relative_to(recordings) for p in recordings.rglob("*")
    )
    assert [path.name for path in root.parent.iterdir()] == ["speech_commands"]
    assert speech.fetch(root, "http://127.0.0.1:9/nowhere", "0") == root  # it is there


def test_a_wrong_download_leaves_nothing(archive: Path, server: str, tmp_path: Path) -> None:
    root = tmp_path / "new" / "speech_commands"
    with pytest.raises(DataError, match=r"its SHA-256 is [0-9a-f]{64}, not 00ff"):
        speech.fetch(root, f"{server}/archive.tar.gz", "00ff")
    with pytest.raises(DataError, match=r"cannot download .*nothing\.gz: .*404"):
        speech.fetch(root, f"{server}/nothing.gz", "00ff")
    assert list(root.parent.iterdir()) == []


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "evil.tar.gz"
    with tarfile.open(file, "w:gz") as content:
        member = tarfile.TarInfo("../../evil.txt")
        member.size = 1
        content.addfile(member, io.BytesIO(b"x"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"cannot unpack .*outside the destination"):
        speech.fetch(tmp_path / "a" / "b", file.as_uri(), sha256)
    assert not (tmp_path / "evil.txt").exists()
    assert not (tmp_path / "a" / "b").exists()


def test_the_flag_downloads_into_the_cache(
    recordings: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(root: Path) -> Path:
        asked.append(root)
        return recordings

    monkeypatch.setattr(speech, "fetch", fetch)
    assert len(speech_synthetic(download=True).train) == 48
    assert len(speech_synthetic(recordings, download=True).train) == 48
    assert asked == [cache / "speech_commands_v0.02", recordings]
    assert data.DATASETS["speech_synthetic"] is speech_synthetic


def test_the_download_flag_is_a_key_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndata: speech_synthetic\nmodel: ds_cnn_l\ntrain: {epochs: 1}\n")
    for flags, expected in (([], None), (["--download"], True)):
        arguments = parser().parse_args(["run", str(recipe), "--set", "seed=1", *flags])
        assert load_recipe(arguments.recipe, arguments.settings).data.download is expected


def test_a_download_is_refused_where_there_is_none() -> None:
    section = DataSection(name="mnist5k", download=True)
    with pytest.raises(RecipeError, match=r"unknown key data\.download: mnist5k takes"):
        load_data(section)
