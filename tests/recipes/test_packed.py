"""The section `pack`: model.packed with biases and norms at the precision that the outputs need."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchclust import load_packed_, round_mantissas_
from torchclust.distillation.tasks import relative_distance
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.packed import LOST, mantissa_bits_for
from torchclust.recipes.prepare import prepare
from torchclust.recipes.report import markdown
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError
from torchclust.recipes.stages import train_networks
from torchclust.zoo import arm_mlp, resnet8

RECIPE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "mnist5k", "batch_size": 100},
    "model": {"name": "resnet8"},
    "train": {"epochs": 1},
    "cluster": {"n_clusters": 8},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs here train once."""
    return tmp_path_factory.mktemp("stages")


def read(folder: Path) -> torch.nn.Module:
    return load_packed_(resnet8((1, 28, 28)), folder / "model.packed").eval()


@pytest.fixture
def run(stages: Path) -> Callable[..., dict[str, Any]]:
    def run(folder: Path, **sections: Any) -> dict[str, Any]:
        recipe = parse_recipe(RECIPE | sections)
        return run_recipe(recipe, folder, stage_folder=stages, progress=False)

    return run


def test_a_run_rounds_as_far_as_the_outputs_bear(tmp_path: Path, run: Callable) -> None:
    plain, rounded = run(tmp_path / "plain"), run(tmp_path / "rounded", pack={})
    bits = rounded["pack"]["mantissa_bits"]
    assert 2 < bits < 9
    assert rounded["bytes"]["packed"] == (tmp_path / "rounded/model.packed").stat().st_size
    assert rounded["bytes"]["packed"] < plain["bytes"]["packed"] - 100
    whole, short = read(tmp_path / "plain"), read(tmp_path / "rounded")
    for name, value in round_mantissas_(copy.deepcopy(whole), bits).state_dict().items():
        assert torch.equal(short.state_dict()[name], value), name
    assert plain["pack"]["mantissa_bits"] is None
    assert plain["accuracy"]["packed"] is None
    assert abs(rounded["accuracy"]["packed"] - plain["accuracy"]["clustered"]) < 0.5
    assert "biases and norms rounded" in markdown(rounded)
    assert "biases and norms rounded" not in markdown(plain)


def test_the_metric_is_that_of_the_file(tmp_path: Path, run: Callable, stages: Path) -> None:
    """At two bits it is another one than the unrounded network's."""
    report = run(tmp_path, pack={"mantissa_bits": 2})
    recipe = parse_recipe(RECIPE)
    networks = train_networks(prepare(recipe), Stages(stages, progress=False))
    module = copy.deepcopy(networks.modules["trained"])
    load_packed_(networks.task.network(module), tmp_path / "model.packed")
    assert report["accuracy"]["packed"] == networks.task.score(module)
    assert report["accuracy"]["packed"] != report["accuracy"]["clustered"]


def test_bits_are_the_fewest_whose_error_is_lost_in_int8s() -> None:
    torch.manual_seed(0)
    network, x = arm_mlp().eval(), torch.rand(50, 1, 28, 28)
    bits = mantissa_bits_for(network, (x,))

    def error(kept: int) -> float:
        with torch.no_grad():
            rounded = round_mantissas_(copy.deepcopy(network), kept)(x)
            return float(relative_distance(rounded, network(x)))

    assert error(bits) <= LOST < error(bits - 1)


def test_what_is_masked_does_not_count() -> None:
    class Masked(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)

    torch.manual_seed(0)
    x = torch.randn(5, 8)
    assert 2 < mantissa_bits_for(Masked(8, 5), (x,)) < 12


def test_whole_numbers_do_not_tell() -> None:
    class Largest(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(RecipeError, match=r"whole numbers.*pack: \{mantissa_bits: 8\}"):
        mantissa_bits_for(Largest(8, 5), (torch.randn(5, 8),))


def test_where_any_rounding_shows_all_bits_are_kept() -> None:
    class Sharp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.tensor([1 + 2**-23]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.bias == 1 + 2**-23)

    assert mantissa_bits_for(Sharp(), (torch.randn(4, 1),)) == 24


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(RecipeError, match="pack needs the section cluster or prune"):
        parse_recipe({k: v for k, v in RECIPE.items() if k != "cluster"} | {"pack": {}})
