"""The callback's arguments: refused early and in words; every one writable in YAML."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_runs import Batches, Net, trainer
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

import torchclust
from torchclust import ClusterConfig, cluster_
from torchclust.lightning import Options, WeightClustering
from torchclust.model.clustering import count_distinct

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
EXAMPLE = Path(__file__).parents[2] / "recipes" / "lightning_cli"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr_scale": 0}, ValueError, "lr_scale must be positive, got 0"),
        ({"lr_scale": float("nan")}, ValueError, "lr_scale must be positive, got nan"),
        ({"lr_scale": float("inf")}, ValueError, "lr_scale must be positive, got inf"),
        ({"start_epoch": -1}, ValueError, "start_epoch must be at least 0, got -1"),
        ({"start_epoch": 0.5}, TypeError, "start_epoch must be an int, got 0.5"),
        ({"start_epoch": True}, TypeError, "start_epoch must be an int, got True"),
        ({"save_stripped": "a", "strip": False}, ValueError, "save_stripped='a' needs strip=True"),
    ],
)
def test_refused_when_constructed(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        WeightClustering(**arguments)


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"head.weight": 4}}, "rule 'head.weight' matches no parameter"),
        ({"rules": 4, "freeze": "stem.*"}, "rule 'stem.*' matches no parameter"),
        ({"rules": 1}, "n_clusters must be between 2 and 256, got 1"),
        ({"rules": {"*": None}}, r"finds nothing to cluster; print\(torchclust.summary"),
        ({"rules": 4, "freeze": ["net.*"]}, r"freeze=\['net.\*'\]\) finds nothing to cluster"),
    ],
)
def test_refused_before_anything_is_trained(arguments: Any, message: str, start_epoch: int) -> None:
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(WeightClustering(**arguments, start_epoch=start_epoch)).fit(module, Batches())
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def test_pattern_to_freeze_of_a_clustered_model() -> None:
    module = cluster_(Net(), 4)
    with pytest.raises(ValueError, match=r"freeze pattern 'stem.\*' matches no parameter"):
        trainer(WeightClustering(freeze="stem.*")).fit(module, Batches())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr_scal", r"did you mean 'lr_scale'\?"),
        ("asignment", r"did you mean 'assignment'\?"),
        ("qqq", "valid: rules, lr_scale, .*, codebook_dtype, "),
    ],
)
def test_option_that_does_not_exist(name: str, hint: str) -> None:
    match = rf"unknown option '{name}' in WeightClustering\(\.\.\., {name}\); {hint}"
    with pytest.raises(TypeError, match=match):
        WeightClustering(4, **{name: 0.1})


def test_number_of_clusters_as_an_option_has_its_place_named() -> None:
    with pytest.raises(TypeError, match="n_clusters is the second argument"):
        trainer(WeightClustering(n_clusters=4)).fit(Net(), Batches())  # type: ignore[call-arg]


def test_epoch_that_is_never_reached() -> None:
    with pytest.warns(UserWarning, match="start_epoch=3, but the trainer stops after max_epochs=3"):
        trainer(WeightClustering(start_epoch=3)).fit(Net(), Batches())


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 9}])
def test_epoch_that_steps_do_not_reach(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="never clustered: start_epoch=2, but the run ended"):
        trainer(WeightClustering(start_epoch=2), max_steps=4, **options).fit(Net(), Batches())


def test_freeze_outweighs_a_rule_whatever_their_order() -> None:
    module = Net()
    rules = {"net.0.weight": 4, "Conv2d": 4, "net.6.weight": 4}
    callback = WeightClustering(rules, freeze="net.0.weight", strip=False)
    trainer(callback, max_epochs=1).fit(module, Batches())
    assert [name for name, _ in torchclust.named_clusterings(module)] == ["net.6.weight"]


def test_options_are_those_of_cluster_() -> None:
    """Typed one by one, for LightningCLI; a new one must not be forgotten."""
    fields = {field.name for field in dataclasses.fields(ClusterConfig)} - {"n_clusters"}
    arguments = set(inspect.signature(cluster_).parameters) - {"model", "rules", "options"}
    assert set(Options.__annotations__) == fields | arguments


YAML = """
rules: {"*": 16, head.weight: {n_clusters: 64, init: density}, "stem.*": null}
lr_scale: 0.05
start_epoch: 2
strip: false
log_histograms: true
freeze: [stem.*, BatchNorm2d]
save_stripped: null
quantize_activations: true
codebook_dtype: int8
init: kmeans++
max_iter: 3
granularity: group
group_size: 8
assignment: nearest
gradient: mean
preserve_sparsity: true
rate: 0.05
strict: false
seed: 1
"""


def _parse(arguments: dict[str, Any]) -> WeightClustering:
    parser = LightningArgumentParser()
    parser.add_class_arguments(WeightClustering, "clustering")
    parsed = parser.parse_object({"clustering": arguments})
    callback = parser.instantiate(parsed).clustering
    assert isinstance(callback, WeightClustering)
    return callback


def test_every_argument_is_writable_in_yaml() -> None:
    given = yaml.safe_load(YAML)
    callback = _parse(given)
    named = set(inspect.signature(WeightClustering.__init__).parameters) - {"self", "options"}
    assert set(given) == named | set(Options.__annotations__) - {"importance", "inputs"}
    assert callback.freeze == ("stem.*", "BatchNorm2d")
    for name in named - {"freeze"}:
        assert getattr(callback, name) == given[name]
    assert callback.options == {name: given[name] for name in set(given) - named}


@pytest.mark.parametrize("rules", [8, {"*": 8}, {"n_clusters": 8, "init": "linear"}])
def test_rules_in_yaml_cluster(rules: Any) -> None:
    """A count, a mapping from patterns, a config."""
    module = Net()
    trainer(_parse({"rules": rules, "freeze": "net.0.*"}), max_epochs=1).fit(module, Batches())
    assert count_distinct(module.net[6].weight) <= 8
    assert count_distinct(module.net[0].weight) == 54


@pytest.mark.slow
def test_example_runs_and_resumes(tmp_path: Path) -> None:
    """As its header says, with less data; its stripped file is an ordinary checkpoint."""
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    for extra in (["--trainer.max_epochs=5"], ["--ckpt_path=last"]):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(EXAMPLE / "main.py"), "fit", "--config",
             str(EXAMPLE / "digits.yaml"), *short, *extra],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert "Restored all states" in done.stderr
    assert {"last.ckpt", "stripped.ckpt"} < {file.name for file in (tmp_path / "digits").iterdir()}
    from torchclust.zoo.networks import seed_cnn

    net: nn.Module = seed_cnn()
    stripped = torch.load(tmp_path / "digits" / "stripped.ckpt")["state_dict"]
    net.load_state_dict({name.removeprefix("net."): v for name, v in stripped.items()})
    for layer, most in (("conv1", 15), ("conv2", 15), ("dense1", 15), ("dense2", 31)):
        for channel in net.get_parameter(f"{layer}.weight"):
            assert count_distinct(channel) <= most
