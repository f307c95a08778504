"""recipes/yours and `torchclust new`: every example runs, its file judged by its own metric."""

import importlib
import json
import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from torchclust.cli.parser import main
from torchclust.recipes.load import load_recipe
from torchclust.recipes.new import TEMPLATE, new_project
from torchclust.recipes.prepare import prepare
from torchclust.recipes.schema import RecipeError

FOLDER = Path(__file__).parents[2] / "recipes/yours"
RECIPES = sorted(FOLDER.glob("*.yaml"))
FEWER = {
    "accelerometer": ["data.train=200"],
    "autoencoder": ["data.train=400"],
    "detection": ["data.train=64", "data.test=20"],
    "digits": [],
    "segmentation": ["data.train=40", "data.test=10"],
}
SHORT = ["train.epochs=1", "finetune.epochs=1", "export.calibration_samples=20"]


@pytest.fixture(autouse=True)
def _path() -> Iterator[None]:
    """Targets are imported as a script's neighbours are; not for the tests that follow."""
    before, known = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if name in {path.stem for path in (*FOLDER.glob("*.py"), *TEMPLATE.glob("*.py"))}:
            del sys.modules[name]


def tones(folder: Path) -> str:
    """Recordings named as the spoken digits are: a tone for each, of several lengths."""
    for digit in range(10):
        for number in range(7):
            time = np.arange(3000 + 900 * number) / 8000
            tone = np.sin(2 * np.pi * (300 + 200 * digit) * time) * 12000
            with wave.open(str(folder / f"{digit}_made_{number}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(tone.astype(np.int16).tobytes())
    return f"data.root={folder}"


def run(recipe: Path, output: Path, *settings: str) -> dict:
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["run", str(recipe), "--output", str(output), "--quiet", *words]) == 0
    return json.loads((output / "report.json").read_text())


def test_every_example_is_known() -> None:
    assert [path.stem for path in RECIPES] == sorted(FEWER)
    page = (FOLDER.parents[1] / "docs/your-project.md").read_text()
    for path in RECIPES:
        assert f"`{path.name}`" in page
        assert f"torchclust run recipes/yours/{path.name}" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_examples_run_to_a_compiled_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "wav").mkdir()
    settings = [*SHORT, *FEWER[path.stem]]
    settings += [tones(tmp_path / "wav")] if path.stem == "digits" else []
    report = run(path, tmp_path / "run", *settings)
    metric = load_recipe(path).metric
    assert report["metric"]["name"] == metric.name != "accuracy"
    assert None not in report["accuracy"].values() or report["accuracy"]["pruned"] is None
    for which in ("int8", "baseline_int8"):
        assert isinstance(report["accuracy"][which], float)
    for row in report["tensors"]:
        assert row["n_clusters"] is None or row["int8_codes"] <= row["n_clusters"]
    assert report["vela"]["encoded_weight_bytes"] < report["vela"]["baseline_encoded_weight_bytes"]
    assert metric.name in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif("FSDD" not in os.environ, reason="FSDD=folder of the spoken digits' wav files")
def test_spoken_digits_are_recognised(tmp_path: Path) -> None:
    report = run(FOLDER / "digits.yaml", tmp_path, f"data.root={os.environ['FSDD']}")
    assert report["accuracy"]["int8"] > 90


def test_recordings_are_read_as_they_are(tmp_path: Path) -> None:
    setting = tones(tmp_path)
    prepare(load_recipe(FOLDER / "digits.yaml", [setting]))
    digits = importlib.import_module("digits")
    data = digits.Digits(str(tmp_path))
    data.setup("fit")
    energies, labels = data.test.tensors
    assert energies.shape == (50, 24, 48)  # numbers 0 to 4
    assert len(data.train) == 20
    loudest = [energies[labels == digit].mean((0, 2)).argmax() for digit in range(10)]
    assert loudest == sorted(loudest)
    with pytest.raises(RecipeError, match=r"no DIGIT_SPEAKER_NUMBER\.wav in .*digits\.py, line"):
        prepare(load_recipe(FOLDER / "digits.yaml", ["data.root=/nowhere"]))


def test_a_new_project_is_checked_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "mine"
    assert main(["new", str(folder)]) == 0
    assert f"cd {folder} && torchclust run recipe.yaml" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "my_module.py", "recipe.yaml",
    ]  # fmt: skip
    assert len((folder / "README.md").read_text().splitlines()) == 5
    assert main(["check", str(folder / "recipe.yaml"), "--quiet"]) == 0
    assert main(["new", str(folder)]) == 2
    assert f"{folder} is there already; name a new folder" in capsys.readouterr().err


def test_a_new_project_imports_the_lightning_that_is_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torchclust.recipes.new.find_spec", lambda name: None)
    new_project(tmp_path / "mine")
    text = (tmp_path / "mine/my_module.py").read_text()
    assert "import lightning.pytorch as pl\n" in text
    assert "pytorch_lightning" not in text


@pytest.mark.slow
def test_a_new_project_runs_on_two_devices(tmp_path: Path) -> None:
    """In a process of its own: forks of a test's process would go on with its tests."""
    new_project(tmp_path / "mine")
    recipe, short = tmp_path / "mine/recipe.yaml", [*SHORT, "vela=null"]
    two = "trainer={accelerator: cpu, devices: 2, strategy: ddp}"
    words = [word for setting in (*short, two) for word in ("--set", setting)]
    command = [sys.executable, "-W", "ignore", "-m", "torchclust", "run", str(recipe), *words]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "ddp"), "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "ddp/report.json").read_text())
    one = run(recipe, tmp_path / "one", *short)
    assert report.keys() == one.keys()
    assert report["accuracy"].keys() == one["accuracy"].keys()
    assert all(row["distinct_weights"] <= 16 for row in report["tensors"] if row["n_clusters"])


@pytest.mark.slow
def test_a_sweep_in_two_processes_equals_one_in_one(tmp_path: Path) -> None:
    """Processes import the user's module themselves, from the folder of the recipe."""
    new_project(tmp_path / "mine")
    recipe, short = tmp_path / "mine/recipe.yaml", [*SHORT, "vela=null"]
    words = ["sweep", str(recipe), "--set", "cluster.n_clusters=4,8", "--quiet"]
    words += [word for setting in (*short, "export=null") for word in ("--set", setting)]
    for jobs in ("1", "2"):
        assert main([*words, "--jobs", jobs, "--output", str(tmp_path / jobs)]) == 0
    assert (tmp_path / "1/sweep.json").read_text() == (tmp_path / "2/sweep.json").read_text()
    assert len(list((tmp_path / "2/stages").glob("train-*.pt"))) == 1


def test_at_least_one_process(tmp_path: Path) -> None:
    new_project(tmp_path / "mine")
    from torchclust.recipes.sweep import run_sweep

    with pytest.raises(RecipeError, match="--jobs 0: at least 1 process is needed"):
        run_sweep(tmp_path / "mine/recipe.yaml", ["seed=1,2"], tmp_path / "s", jobs=0)
