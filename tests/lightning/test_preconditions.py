"""What would fail or be lost after epochs is said before the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_runs import Batches, Net, trainer
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from torchclust import cluster_
from torchclust.lightning import WeightClustering
from torchclust.lightning.distributed import on_every_rank

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class NeverSteps(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("a step was taken")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
@pytest.mark.parametrize("options", [{"strip": False}, {"quantize_activations": True}])
def test_processes_that_bring_back_only_what_was_there(
    strategy: str, options: dict[str, Any]
) -> None:
    spawning = trainer(strategy=strategy, devices=2)
    with pytest.raises(ValueError, match=r"ddp_spawn, ddp_notebook\) brings back only tensors"):
        WeightClustering(4, **options).setup(spawning, Net(), "fit")
    with pytest.raises(ValueError, match="strip=False with a clustered one"):
        WeightClustering(4).setup(spawning, cluster_(Net(), 4), "fit")


FORKED = """
import torch
from lightning_runs import Batches, Net, trainer
from torchclust import cluster_, is_clustered
from torchclust.lightning import WeightClustering
module = cluster_(Net(), 4)
before = module.net[6].weight.detach().clone()
options = {"strategy": "ddp_fork", "use_distributed_sampler": False}
trainer(WeightClustering(4, strip=False), max_epochs=1, **options).fit(module, Batches())
after = module.net[6].weight.detach()
assert is_clustered(module)
assert not torch.equal(before, after)
assert len(after.unique()) <= 4
"""


@pytest.mark.slow
def test_forked_processes_bring_back_a_module_that_was_clustered() -> None:
    """In a process of its own: forks of a test's process would go on with its tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_spawned_processes_bring_back_a_stripped_module() -> None:
    module = Net()
    before = module.net[6].weight.detach().clone()
    options = {"strategy": "ddp_spawn", "use_distributed_sampler": False}
    trainer(WeightClustering(4), max_epochs=1, **options).fit(module, Batches())
    after = module.net[6].weight.detach()
    assert not torch.equal(before, after)
    assert len(after.unique()) <= 4


@pytest.mark.parametrize("order", [1, -1])
def test_pruning_beside_clustering(order: int) -> None:
    callbacks = [WeightClustering(4), ModelPruning("l1_unstructured", amount=0.5)]
    with pytest.raises(ValueError, match="ModelPruning and WeightClustering both take the place"):
        trainer(*callbacks[::order]).fit(NeverSteps(), Batches())


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module` and is already saved")
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_network_among_the_hyperparameters(start_epoch: int, tmp_path: Path) -> None:
    class Holds(NeverSteps):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net=net)
            self.save_hyperparameters()

    callbacks = [WeightClustering(4, start_epoch=start_epoch), ModelCheckpoint(tmp_path)]
    with pytest.raises(ValueError, match=r"self\.save_hyperparameters\(ignore=\['net'\]\)"):
        trainer(*callbacks).fit(Holds(Net().net), Batches())


def by_name(module: pl.LightningModule) -> Any:
    named = list(module.named_parameters())
    weights = [p for n, p in named if n.endswith("weight")]
    others = [p for n, p in named if not n.endswith("weight")]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )


def by_dimensions(module: pl.LightningModule) -> Any:
    matrices = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )


def by_bias(module: pl.LightningModule) -> Any:
    named = list(module.named_parameters())
    biases = [p for n, p in named if n.endswith("bias")]
    others = [p for n, p in named if not n.endswith("bias")]
    return torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    )


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(
    ("build", "rules"), [(by_name, 4), (by_dimensions, {"net.4.weight": 4, "net.6.weight": 4})]
)
def test_weight_decay_that_clustering_loses(build: Any, rules: Any, start_epoch: int) -> None:
    fit = trainer(WeightClustering(rules, start_epoch=start_epoch), max_epochs=2)
    with pytest.warns(UserWarning, match=r"weight_decay is 0 for 'net\.\d\.weight' and every oth"):
        fit.fit(Net(build), Batches())


def test_weight_decay_that_it_does_not() -> None:
    trainer(WeightClustering(4), max_epochs=1).fit(Net(by_bias), Batches())


def test_an_error_of_one_rank_is_every_rank_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange by itself: what another rank raised, this one raises too."""

    def other_failed(outcomes: list[Any], own: Any) -> None:
        outcomes[:] = [own, ("ValueError", "no such parameter")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", other_failed)
    with pytest.raises(RuntimeError, match="rank 1 could not cluster its module: ValueError: no s"):
        on_every_rank(lambda: None, 2)

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        on_every_rank(fail, 2)
    on_every_rank(lambda: None, 1)
