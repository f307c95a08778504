"""What a stage wrote for the user is the stage's, whatever ran in the folder since."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchclust.packing.size import packed_size
from torchclust.recipes.kept import Result, Stages, digest_of_networks
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.run import run_recipe

RECIPE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "mnist5k", "batch_size": 32},
    "model": "arm_mlp",
    "train": {"epochs": 0},
}


def staged(folder: Path, recipe: str, name: str = "file") -> Result:
    """Run a stage that writes its recipe into a file."""

    def compute() -> Result:
        (folder / name).write_text(recipe)
        return {"files": [name], "said": recipe}

    return Stages(folder / "stages").result("stage", recipe, compute, folder=folder)


def test_a_file_of_another_recipe_is_written_anew(tmp_path: Path) -> None:
    for recipe in ("one", "other", "one", "one", "other"):
        assert staged(tmp_path, recipe)["said"] == recipe
        assert (tmp_path / "file").read_text() == recipe


def test_a_file_that_is_gone_or_damaged_is_written_anew(tmp_path: Path) -> None:
    staged(tmp_path, "one")
    (tmp_path / "file").write_text("on")
    staged(tmp_path, "one")
    assert (tmp_path / "file").read_text() == "one"
    (tmp_path / "file").unlink()
    staged(tmp_path, "one")
    assert (tmp_path / "file").read_text() == "one"


def test_networks_differ_in_any_bit() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    first, other = net(), net()
    assert digest_of_networks([first]) == digest_of_networks([other])
    other[1].running_mean[2] = -0.0
    assert digest_of_networks([first]) != digest_of_networks([other])
    assert digest_of_networks([first, net()]) != digest_of_networks([first])


@pytest.mark.slow
def test_a_folder_holds_what_its_report_says(tmp_path: Path) -> None:
    """One setting, another and the first again: TFLite, Vela's and the packed file follow."""
    written: dict[int, dict[str, bytes]] = {}
    names = ("int8.tflite", "clustered_float.tflite", "model.packed", "vela/int8_vela.tflite")
    sections: dict[str, Any] = {"export": {"calibration_samples": 8}, "vela": {}}
    sections["pack"] = {"mantissa_bits": 4}

    def run(**changed: Any) -> tuple[dict[str, Any], list[str]]:
        """Also which stages of files ran."""
        lines: list[str] = []
        recipe = parse_recipe(RECIPE | sections | changed)
        report = run_recipe(recipe, tmp_path, resume=True, say=lines.append, progress=False)
        ran = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
        return report, [stage for stage in ran if stage in ("export", "vela", "pack")]

    for k in (8, 4, 8):
        report, ran = run(cluster={"n_clusters": k})
        assert ran == ["export", "vela", "pack"]
        assert report["bytes"]["int8_tflite"] == (tmp_path / "int8.tflite").stat().st_size
        assert report["bytes"]["packed"] == packed_size(tmp_path / "model.packed").bytes
        files = {name: (tmp_path / name).read_bytes() for name in names}
        assert files == written.setdefault(k, files)
    assert all(written[8][name] != written[4][name] for name in names)
    # A stage runs again only for what it depends on; Vela's own file is none of the folder's.
    assert run(cluster={"n_clusters": 8})[1] == []
    assert run(cluster={"n_clusters": 8}, pack={"mantissa_bits": 5})[1] == ["pack"]
    vela = {"config": "Arm/vela.ini", "system_config": "Ethos_U55_High_End_Embedded"}
    vela["memory_mode"] = "Shared_Sram"
    assert run(cluster={"n_clusters": 8}, pack={"mantissa_bits": 5}, vela=vela)[1] == ["vela"]
    # Not clustered any more: the files of before stay, named as such, and nobody compiles them.
    report, ran = run(pack=None, export={"calibration_samples": 9})
    assert ran == ["export", "vela"]
    stale = ["clustered_float.tflite", "int8.tflite", "vela/int8_vela.tflite", "model.packed"]
    assert report["left_over"] == stale
    assert all((tmp_path / name).exists() for name in stale)


def test_a_run_that_dies_leaves_no_report_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(parse_recipe(RECIPE | {"cluster": {"n_clusters": 8}}), tmp_path, progress=False)
    assert json.loads((tmp_path / "report.json").read_text())["left_over"] == []

    def dying(*rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchclust.recipes.run.train_networks", dying)
    recipe = parse_recipe(RECIPE | {"cluster": {"n_clusters": 4}})
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, resume=True, progress=False)
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "model.packed").exists()


def test_two_processes_for_one_stage_and_two_folders(tmp_path: Path) -> None:
    """A stage that is done, and not in either folder: they take turns, and each gets its file."""
    folders = [tmp_path / "a", tmp_path / "b"]
    running = []

    def compute(folder: Path) -> Result:
        running.append(folder)
        time.sleep(0.2)
        assert len(running) == 1
        (folder / "file").write_text("one")
        running.remove(folder)
        return {"files": ["file"]}

    def stage(folder: Path) -> Result:
        folder.mkdir(exist_ok=True)
        stages = Stages(tmp_path / "stages")
        return stages.result("stage", "one", lambda: compute(folder), folder=folder)

    stage(tmp_path / "first")
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(stage, folders))) == 2
    assert [(folder / "file").read_text() for folder in folders] == ["one", "one"]


def test_extra_state_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    module = Extra(2, 2)
    module.seen = 1
    before = digest_of_networks([module])
    module.seen = 2
    assert digest_of_networks([module]) != before
