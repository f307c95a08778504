"""A budget that chooses the price of a bit: what is tried, what is hit, and that it repeats."""

import json
import math
from pathlib import Path

import pytest
import torch
from fake_data import fake_data

from torchclust.recipes import prepare as preparing
from torchclust.recipes.load import load_recipe, parse_recipe
from torchclust.recipes.price import MOST_TRIES, within_budget
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError

SMALL = {
    "name": "small",
    "data": {"name": "mnist5k", "batch_size": 8},
    "model": "arm_mlp",
    "train": {"epochs": 2},
    "cluster": {"budget": 20.0, "n_clusters": 31, "assignment": "nearest"},
    "finetune": {"epochs": 2, "lr_scale": 1.0},
}


@pytest.fixture(autouse=True)
def _noise(monkeypatch) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)


CURVES = {
    "a power": lambda rate: round(300 / rate**0.4),
    "steep": lambda rate: round(3e5 * math.exp(-9 * rate**0.5)),
    "with a floor": lambda rate: round(200 + 50000 / (1 + rate / 0.01)),
    "in steps": lambda rate: 40 * round(20 / rate**0.5),
    "noisy": lambda rate: round(300 / rate**0.4 * (1 + 0.005 * math.sin(1e4 * rate))),
}


@pytest.mark.parametrize("start", [0.005, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("curve", CURVES)
def test_the_budget_is_met_within_two_per_cent(curve: str, start: float) -> None:
    for wanted in (0.004, 0.03, 0.2):
        tried: list[float] = []

        def count(rate: float, tried: list[float] = tried) -> int:
            tried.append(rate)
            return CURVES[curve](rate)

        budget = 1.01 * CURVES[curve](wanted)
        rate = within_budget(budget, count, start)
        assert 0.98 * budget <= CURVES[curve](rate) <= budget
        assert len(set(tried)) == len(tried) <= MOST_TRIES


def test_more_bytes_than_needed_ask_for_no_price_to_speak_of() -> None:
    assert within_budget(10**9, CURVES["a power"], 0.1) <= 1e-4


def test_too_few_bytes_name_the_least() -> None:
    with pytest.raises(RecipeError, match=r"do not hold .* was 2\.0:  --set cluster\.budget=3"):
        within_budget(1024, lambda rate: 2048 + round(10 / rate), 0.1)


@pytest.mark.parametrize("labels", [True, False])
def test_a_price_is_chosen_and_runs_again(tmp_path: Path, labels: bool) -> None:
    finetune = {"epochs": 2, "lr_scale": 1.0} if labels else {"epochs": 0, "labels": False}
    content = {**SMALL, "finetune": finetune}
    report = run_recipe(parse_recipe(content), tmp_path / "a", progress=False)
    chosen = report["chosen"]
    assert chosen["rate"] > 0
    assert 0.9 * 20 * 1024 <= chosen["encoded_bytes"] <= 20 * 1024
    again = load_recipe(tmp_path / "a" / "chosen.yaml")
    assert (again.cluster.rate, again.cluster.n_clusters) == (chosen["rate"], 31)
    said: list[str] = []
    stages = tmp_path / "a" / "stages"
    repeated = run_recipe(
        again, tmp_path / "b", stage_folder=stages, say=said.append, progress=False
    )
    assert all(line.endswith(": done before") for line in said)
    assert repeated["bytes"] == report["bytes"]
    text = (tmp_path / "a" / "report.md").read_text()
    assert "## Price of a bit that was chosen" in text
    assert f"`rate: {chosen['rate']:.4g}`" in text
    assert json.loads((tmp_path / "a" / "report.json").read_text())["chosen"] == chosen


def test_the_compilers_own_figure_counts(tmp_path: Path) -> None:
    pytest.importorskip("ethosu.vela")
    torch.manual_seed(0)
    content = {**SMALL, "finetune": {"epochs": 0, "labels": False}, "export": {}, "vela": {}}
    content["cluster"] = {"budget": 30, "n_clusters": 31, "codebook_dtype": "int8"}
    report = run_recipe(parse_recipe(content), tmp_path, progress=False)
    encoded = report["vela"]["encoded_weight_bytes"]
    assert abs(encoded - report["chosen"]["encoded_bytes"]) <= 3  # of rounding
    assert encoded <= 30 * 1024 + 3
