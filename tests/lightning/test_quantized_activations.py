"""Quantization-aware fine-tuning from the callback and from a recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fake_data import fake_data
from lightning_runs import STEPS, Batches, Net, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from torchclust import is_clustered, restore_, strip_
from torchclust.activations.quantized import activation_ranges, quantized_modules
from torchclust.lightning import WeightClustering
from torchclust.recipes import prepare as preparing
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.prepare import prepare
from torchclust.recipes.stages import train_networks

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # A run resumed without the ModelCheckpoint that wrote its checkpoint, Lightning 2.6.6, 2026-11.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]


class Whole(Net):
    """Calls itself in its step, as many modules do."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Watch(pl.Callback):
    """Notes, after each step, whether the module is clustered and what is quantized in it."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, list[str]]] = []

    def on_train_batch_end(self, _: Any, pl_module: pl.LightningModule, *__: Any) -> None:
        paths = [path for path, _ in quantized_modules(pl_module)]
        self.seen.append((is_clustered(pl_module), paths))


def callback(**options: Any) -> WeightClustering:
    return WeightClustering(8, codebook_dtype="int8", quantize_activations=True, **options)


@pytest.mark.parametrize("kind", [Net, Whole])
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_quantized_from_the_first_clustered_step_on(kind: type[Net], start_epoch: int) -> None:
    pl.seed_everything(0, verbose=False)
    module, watch = kind(), Watch()
    trainer(callback(start_epoch=start_epoch), watch).fit(module, Batches())
    plain = start_epoch * STEPS
    assert watch.seen[:plain] == [(False, [])] * plain
    assert watch.seen[plain:] == [(True, ["net"])] * (len(watch.seen) - plain)
    assert not is_clustered(module)
    assert activation_ranges(module)  # for the exporter
    assert not activation_ranges(strip_(module))
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_without_the_option_nothing_is_quantized() -> None:
    module, watch = Net(), Watch()
    trainer(WeightClustering(8), watch).fit(module, Batches())
    assert not any(paths for _, paths in watch.seen)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_resumed_run_ends_as_the_straight_one(tmp_path: Path, start_epoch: int) -> None:
    options = {"strip": False, "start_epoch": start_epoch, "assignment": "nearest"}
    pl.seed_everything(0, verbose=False)
    straight = Net()
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step:03d}", save_top_k=-1, every_n_train_steps=1
    )
    trainer(callback(**options), checkpoints).fit(straight, Batches())
    for step in (1, 4, 7):
        pl.seed_everything(step, verbose=False)
        resumed = Net()
        path = tmp_path / f"step={step:03d}.ckpt"
        trainer(callback(**options)).fit(resumed, Batches(), ckpt_path=str(path))
        want = straight.state_dict()
        assert list(resumed.state_dict()) == list(want)
        assert all(torch.equal(want[k], v) for k, v in resumed.state_dict().items()), step
        assert activation_ranges(resumed) == activation_ranges(straight)


def test_the_stripped_checkpoint_holds_no_ranges(tmp_path: Path) -> None:
    module = Net()
    path = tmp_path / "plain.ckpt"
    trainer(callback(save_stripped=str(path))).fit(module, Batches())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state.keys() == Net().state_dict().keys()
    assert activation_ranges(module)


def test_zeros_survive_with_preserve_sparsity() -> None:
    module = Net()
    weight = module.net[6].weight  # type: ignore[index]
    with torch.no_grad():
        weight[torch.rand_like(weight) < 0.6] = 0
    zeros = weight.detach() == 0
    trainer(callback(preserve_sparsity=True, assignment="nearest")).fit(module, Batches())
    trained = module.net[6].weight.detach()  # type: ignore[index]
    assert bool((trained[zeros] == 0).all())
    assert len(trained.unique()) > 1


@pytest.mark.parametrize("quantize", [False, True])
def test_a_recipe_says_whether(
    quantize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    recipe = parse_recipe(
        {
            "name": "small",
            "data": {"name": "mnist5k", "batch_size": 8},
            "model": "arm_mlp",
            "train": {"epochs": 1},
            "cluster": {"n_clusters": 4, "codebook_dtype": "int8"},
            "finetune": {"epochs": 1, "quantize_activations": quantize},
        }
    )
    networks = train_networks(prepare(recipe), Stages(tmp_path, progress=False))
    assert networks.compressed is not None
    assert bool(activation_ranges(networks.compressed)) == quantize
    assert not activation_ranges(networks.control)
    state = copy.deepcopy(networks.compressed.state_dict())
    again = restore_(prepare(recipe).model, state)
    assert activation_ranges(again) == activation_ranges(networks.compressed)
