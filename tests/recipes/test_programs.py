"""A recipe's ExecuTorch programs; all but the refusals need `make test-executorch`."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fake_data

from torchclust import cluster_
from torchclust.cli.parser import main
from torchclust.recipes import prepare as preparing
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.prepare import build_model
from torchclust.recipes.report import gains
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "mnist5k", "batch_size": 8},
    "model": "arm_mlp",
    "train": {"epochs": 0},
    "cluster": {"n_clusters": 8, "codebook_dtype": "int8"},
    "executorch": {"target": "ethos-u85-256"},
}
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="make test-executorch"
)


@pytest.fixture(autouse=True)
def _noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    monkeypatch.chdir(tmp_path)


@pytest.mark.executorch
@needs_executorch
def test_a_run_writes_both_programs_and_reports_them() -> None:
    recipe, said = parse_recipe(RECIPE), []
    report = run_recipe(recipe, Path("out"), progress=False)
    found = report["executorch"]
    assert found["bytes"] == Path("out/model.pte").stat().st_size
    assert found["baseline_bytes"] == Path("out/baseline.pte").stat().st_size
    assert found["encoded_weight_bytes"] < 0.6 * found["baseline_encoded_weight_bytes"]
    assert set(found["codes"].values()) == {7}
    assert found["cpu_operators"] == []
    assert found["target"] == "ethos-u85-256"
    assert 0 <= found["accuracy"] <= 100
    assert {"ExecuTorch program (.pte)", "ExecuTorch program's accuracy"} <= {
        row[0] for row in gains(report)
    }
    again = run_recipe(recipe, Path("out"), resume=True, say=said.append, progress=False)
    assert again["executorch"] == found
    assert "executorch: done before" in said


@pytest.mark.executorch
@needs_executorch
def test_the_command_writes_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    data = fake_data(preparing.DataSection(name="mnist5k"))
    model = build_model(preparing.ModelSection(name="arm_mlp"), data, 0)
    torch.save(cluster_(model, 4, codebook_dtype="int8").state_dict(), "c.pt")
    assert main(["export", "r.yaml", "c.pt", "m.pte"]) == 0
    shown = capsys.readouterr().out
    assert "3 codes" in shown
    assert "ethos-u85-256" in shown
    assert main(["export", "r.yaml", "c.pt", "m.pte", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size_bytes"] == Path("m.pte").stat().st_size
    assert [row["int8_codes"] for row in found["tensors"]] == [3] * 3
    assert found["compiled"][0]["accelerator"] == "ethos-u85-256"


def test_a_float_program_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "r.yaml", "c.pt", "m.pte", "--float"]) == 2
    assert "m.pte is a program for an int8 NPU: leave --float out" in capsys.readouterr().err


def test_an_unknown_target_is_found_before_anything_runs() -> None:
    recipe = parse_recipe({**RECIPE, "executorch": {"target": "ethos-u85-255"}})
    with pytest.raises(RecipeError, match=r"executorch.target: no 'ethos-u85-255'; did you mean"):
        run_recipe(recipe, Path("out"))


def test_a_missing_extra_is_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"'executorch', which is not installed"):
        run_recipe(parse_recipe(RECIPE), Path("out"))
    assert not Path("out").exists()
    Path("r.yaml").write_text(json.dumps(RECIPE))
    assert main(["check", "r.yaml"]) == 2
