"""recipes/mlperf_tiny/ad.yaml: recordings to inputs, errors to an area, and a run to the chip."""

from __future__ import annotations

import importlib
import json
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchclust.cli.parser import main
from torchclust.recipes.load import load_recipe
from torchclust.recipes.prepare import prepare
from torchclust.recipes.schema import RecipeError
from torchclust.zoo import mlperf_ad
from torchclust.zoo.mel_energies import machine_energies

FOLDER = Path(__file__).parents[2] / "recipes/mlperf_tiny"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("toy_car")
    del sys.modules["toy_car"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cars: a hum in noise; an anomaly whistles."""
    folder = tmp_path_factory.mktemp("ToyCar")
    random, time = np.random.default_rng(0), np.arange(5 * 16000) / 16000
    names = [f"train/normal_id_0{car}_{number:08}" for car in (1, 2) for number in range(3)]
    names += [
        f"test/{kind}_id_0{car}_{number:08}"
        for kind in ("normal", "anomaly")
        for car in (1, 2)
        for number in range(2)
    ]
    for name in names:
        sound = np.sin(2 * np.pi * 120 * time) + 0.2 * random.normal(size=len(time))
        sound += 2 * np.sin(2 * np.pi * 3000 * time) * ("anomaly" in name)
        file = folder / f"{name}.wav"
        file.parent.mkdir(exist_ok=True)
        with wave.open(str(file), "wb") as written:
            written.setparams((1, 2, 16000, 0, "NONE", ""))
            written.writeframes((4000 * sound).astype(np.int16).tobytes())
    return folder


def test_inputs_are_five_frames(script: ModuleType, root: Path) -> None:
    found = script.loaders(str(root), train=4)
    assert len(list(found["train"])) == 4
    inputs, is_bad, car = next(iter(found["test"]))
    first = sorted((root / "test").glob("*.wav"))[0]
    with wave.open(str(first)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
    energies = machine_energies(samples)[49:249]
    assert (bool(is_bad), int(car)) == (True, 1)
    assert inputs.shape == (len(energies) - 4, 640)
    np.testing.assert_array_equal(inputs[7], energies[7:12].ravel())


def test_area_is_the_mean_of_the_cars(script: ModuleType) -> None:
    """Car 1 is told apart in three of four pairs, car 2 in none."""
    errors = {1: [(1.0, False), (3.0, False), (2.0, True), (4.0, True)],
              2: [(5.0, False), (1.0, True)]}  # fmt: skip
    clips = [
        (torch.full((2, 3), error**0.5), torch.tensor(bad), torch.tensor(car))
        for car, pairs in errors.items()
        for error, bad in pairs
    ]
    module = nn.Module()
    module.fc = nn.Linear(3, 3)
    nn.init.zeros_(module.fc.weight)
    nn.init.zeros_(module.fc.bias)
    assert script.auc(module, clips) == pytest.approx((3 / 4 + 0) / 2)


def test_missing_recordings_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    settings = [f"data.root={tmp_path}", "module.checkpoint=null"]
    with pytest.raises(RecipeError, match=r"no normal_id_01_00000000\.wav and the like in .*train"):
        prepare(load_recipe(FOLDER / "ad.yaml", settings))


@pytest.mark.slow
def test_the_recipe_runs(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(mlperf_ad().state_dict(), tmp_path / "ad.safetensors")
    settings = [f"data.root={root}", f"module.checkpoint={tmp_path / 'ad.safetensors'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["run", str(FOLDER / "ad.yaml"), "--output", str(tmp_path / "run"), "--quiet"]
    assert main([*command, *words]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metric"]["name"] == "AUC"
    assert report["accuracy"]["int8"] == pytest.approx(report["accuracy"]["baseline_int8"], abs=0.3)
    assert report["vela"]["cpu_ops"] == 0
    assert report["vela"]["encoded_weight_bytes"] < report["vela"]["baseline_encoded_weight_bytes"]
