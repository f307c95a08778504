"""What a stage wrote for the user is the stage's, whatever ran in the folder since."""

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
    for k in (8, 4, 8):
        sections = {
            "cluster": {"n_clusters": k},
            "export": {"calibration_samples": 8},
            "vela": {},
            "pack": {"mantissa_bits": 4},
        }
        report = run_recipe(parse_recipe(RECIPE | sections), tmp_path, resume=True, progress=False)
        assert report["bytes"]["int8_tflite"] == (tmp_path / "int8.tflite").stat().st_size
        assert report["bytes"]["packed"] == packed_size(tmp_path / "model.packed").bytes
        files = {name: (tmp_path / name).read_bytes() for name in names}
        assert files == written.setdefault(k, files)
    assert all(written[8][name] != written[4][name] for name in names)


@pytest.mark.slow
def test_a_stage_runs_again_only_for_what_it_depends_on(tmp_path: Path) -> None:
    def said(**sections: Any) -> list[str]:
        lines: list[str] = []
        recipe = parse_recipe(RECIPE | sections)
        run_recipe(recipe, tmp_path, resume=True, say=lines.append, progress=False)
        return [line for line in lines if line.endswith("...") or line.startswith("  int8")]

    sections = {"cluster": {"n_clusters": 8}, "export": {"calibration_samples": 8}}
    assert "export ..." in said(**sections)
    assert said(**sections) == []
    assert said(**sections, pack={"mantissa_bits": 4}) == ["pack ..."]
    assert said(**sections, vela={}) == ["vela ...", "  int8.tflite for ethos-u55-128"]
    # Not clustered any more: the int8 file of before stays where it is, and nobody compiles it.
    del sections["cluster"]
    again = said(**sections, vela={})
    assert again == ["export ...", "vela ..."]
    assert (tmp_path / "int8.tflite").exists()
