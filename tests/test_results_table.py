"""README's table is what the script makes of the committed results, and of nothing else."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from torchclust.recipes.load import load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "results_table.py"
    spec = importlib.util.spec_from_file_location("results_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["results_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_readme_has_the_table(script: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.inserted(readme) == readme, "python benchmarks/results_table.py --write"


def test_every_result_is_in_the_table(script: ModuleType) -> None:
    used = {name for row in script.ROWS for name in (row.run, row.sizes)}
    files = {path.name.split(".")[0] for path in script.RESULTS.glob("*.[0-9]*.json")}
    assert files - used == set()
    collected = json.loads((script.RESULTS / "deep_compression.json").read_text())
    assert {found["run"] for found in collected} - used == {"arm_mlp_pruned"}


def test_every_run_is_a_row_and_a_valid_recipe(script: ModuleType) -> None:
    assert set(script.RUNS) <= {row.run for row in script.ROWS}
    for name, (recipe, settings) in script.RUNS.items():
        found = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", settings)
        assert found.cluster is not None, name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.[0-9]*.json")))
def test_results_are_their_recipes(script: ModuleType, path: Path) -> None:
    """A committed report is of the recipe, settings and seed that its name stands for."""
    report = json.loads(path.read_text())
    name, seed, _ = path.name.split(".")
    if name.endswith("_full"):
        assert "accuracy" not in report
        return
    recipe, settings = script.RUNS[name]
    expected = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*settings, f"seed={seed}"])
    assert parse_recipe(report["recipe"]) == expected  # keys that came later have their default
    assert report["vela"]["cpu_ops"] == 0


def report(before: float, after: float, zipped: int) -> dict:
    return {
        "accuracy": {"control": before, "clustered": after, "baseline_int8": None, "int8": None},
        "bytes": {"float_tflite_zip": 1_000_000, "clustered_float_tflite_zip": zipped},
        "vela": {"baseline_encoded_weight_bytes": None, "encoded_weight_bytes": None},
    }


def test_figures_are_means_over_seeds(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for seed, found in enumerate([report(90, 89, 100_000), report(92, 92, 300_000)]):
        (tmp_path / f"kws_k8.{seed}.json").write_text(json.dumps(found))
    lines = script.table().splitlines()
    (line,) = [line for line in lines if line.startswith("| DS-CNN")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2] == "1,460 → 270 kB (5.4x)"
    assert cells[3:] == [
        "12 synthetic keywords (2 seeds)", "91.00 → 90.50", "1,000 → 200 kB (5.0x)", "", ""
    ]  # fmt: skip
    assert len([line for line in lines if line.startswith("| ")]) == 2  # the head, and this row


def test_the_second_comment_may_be_missing_and_nothing_else_changes(script: ModuleType) -> None:
    once = script.inserted("a\n<!-- results -->\n\nb\n")
    assert script.inserted(once) == once
    assert once.startswith("a\n<!-- results -->\n")
    assert once.endswith("\n<!-- /results -->\n\nb\n")
    with pytest.raises(ValueError, match="no line <!-- results -->"):
        script.inserted("nothing")
