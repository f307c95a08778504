"""Every request counts: what is not clustered yet gets clustered, what contradicts raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_runs import Batches, Evaluated, Net, trainer
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

import torchclust
from torchclust.lightning import WeightClustering

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # A checkpoint is read without the callbacks that wrote it: what some of these tests are about.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Look(pl.Callback):
    """Clusters per tensor and the first group's rate, at every step."""

    def __init__(self) -> None:
        self.clusters: list[dict[str, int]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        found = torchclust.named_clusterings(pl_module)
        self.clusters.append({name: c.n_clusters for name, c in found})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def evaluation() -> DataLoader[Any]:
    batches = Batches(8)
    return DataLoader(TensorDataset(batches.x, batches.y), 32)


@pytest.mark.parametrize("start", [0, 1])
def test_two_callbacks_for_different_layers(start: int) -> None:
    look = Look()
    callbacks = [
        WeightClustering({"net.0.weight": 4}),
        WeightClustering({"net.6.weight": 8}, start_epoch=start),
    ]
    module = Net()
    trainer(*callbacks, look, max_epochs=2).fit(module, Batches())
    assert look.clusters[-1] == {"net.0.weight": 4, "net.6.weight": 8}
    assert look.rates == pytest.approx([1e-3] * len(look.rates)), "lowered once"
    assert len(module.net[0].weight.unique()) <= 4
    assert len(module.net[6].weight.unique()) <= 8


@pytest.mark.parametrize("start", [0, 1])
def test_one_layer_by_hand_and_the_callback_for_the_rest(start: int) -> None:
    module, look = Net(), Look()
    torchclust.cluster_(module, {"net.0.weight": 8})
    trainer(WeightClustering(4, start_epoch=start), look, max_epochs=2).fit(module, Batches())
    assert look.clusters[-1] == {"net.0.weight": 8, "net.4.weight": 4, "net.6.weight": 4}
    assert look.rates == pytest.approx([1e-3] * len(look.rates))


@pytest.mark.parametrize(
    ("rules", "options", "field"),
    [
        (4, {}, "n_clusters=16"),
        ({"net.0.weight": 4}, {}, "n_clusters=16"),
        (torchclust.ClusterConfig(16, assignment="nearest"), {}, "assignment='fixed'"),
        (16, {"codebook_dtype": "int8"}, "codebook_dtype='float32'"),
    ],
)
def test_a_clustered_module_and_another_request(
    rules: Any, options: dict[str, Any], field: str
) -> None:
    module = torchclust.cluster_(Net(), 16)
    with pytest.raises(ValueError, match=rf"clustered already, with {field}, and WeightClustering"):
        trainer(WeightClustering(rules, **options)).fit(module, Batches())


def test_no_request_contradicts_nothing() -> None:
    module, look = torchclust.cluster_(Net(), 4), Look()
    trainer(WeightClustering(), look, max_epochs=1).fit(module, Batches())
    assert set(look.clusters[-1].values()) == {4}


def test_resuming_with_another_number(tmp_path: Path) -> None:
    first = trainer(WeightClustering(8, strip=False), max_epochs=1)
    first.fit(Net(), Batches())
    first.save_checkpoint(tmp_path / "eight.ckpt")
    again = trainer(WeightClustering(4), max_epochs=2)
    with pytest.raises(ValueError, match="n_clusters=8, and WeightClustering asks for 4"):
        again.fit(Net(), Batches(), ckpt_path=tmp_path / "eight.ckpt")


# Afterwards


@pytest.mark.parametrize(
    "make",
    [
        WeightAveraging,
        lambda: EMAWeightAveraging(decay=0.9999),  # 0.999 gives most integers back
        lambda: StochasticWeightAveraging(1e-2, 1),
    ],
)
@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_averaging_keeps_indices_and_validates_afterwards(make: Any, codebook_dtype: str) -> None:
    class Indices(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[list[torch.Tensor]] = []

        def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found = [
                module.indices.clone() for module in pl_module.modules() if hasattr(module, "seal")
            ]
            self.seen += [found] if found else []

        on_train_start = on_validation_epoch_start = on_train_end = look

    module, indices = Evaluated(), Indices()
    clustering = WeightClustering(16, codebook_dtype=codebook_dtype)
    fit = trainer(clustering, make(), indices)
    fit.fit(module, Batches(), evaluation())
    for found in indices.seen[1:]:
        for got, want in zip(found, indices.seen[1], strict=True):
            assert torch.equal(got, want)
    (metrics,) = fit.validate(module, evaluation(), verbose=False)
    assert metrics == trainer().validate(module, evaluation(), verbose=False)[0]


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("options", [{}, {"assignment": "nearest"}, {"codebook_dtype": "int8"}])
def test_a_checkpoint_saved_after_the_fit_resumes(
    options: dict[str, Any], strip: bool, tmp_path: Path
) -> None:
    first = trainer(WeightClustering(4, strip=strip, **options), max_epochs=1)
    first.fit(Net(), Batches())
    first.save_checkpoint(tmp_path / "after.ckpt")
    module, look = Net(), Look()
    again = trainer(WeightClustering(4, strip=strip, **options), look, max_epochs=2)
    again.fit(module, Batches(), ckpt_path=tmp_path / "after.ckpt")
    assert look.rates == pytest.approx([1e-3] * len(look.rates))
    assert set(look.clusters[-1].values()) == {4}


def test_a_rate_found_while_clustered_is_not_lowered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module, look = Net(lambda m: torch.optim.Adam(m.parameters(), lr=m.lr)), Look()
    module.lr = 1e-2
    fit = trainer(WeightClustering(4), max_epochs=1)
    Tuner(fit).lr_find(module, Batches(40), num_training=30)
    fit.callbacks.append(look)
    fit.fit(module, Batches())
    assert set(look.rates) == {module.lr}


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_double_precision_with_nearest(codebook_dtype: str) -> None:
    clustering = WeightClustering(4, assignment="nearest", codebook_dtype=codebook_dtype)
    module = Net()
    trainer(clustering, precision="64-true", max_epochs=1).fit(module, Batches())
    assert module.net[6].weight.dtype == torch.float64


def test_a_fit_that_diverged_says_so() -> None:
    module = Net(lambda m: torch.optim.SGD(m.parameters(), lr=1e30))
    with pytest.raises(ValueError, match="holds NaN or infinity: the training diverged"):
        trainer(WeightClustering(4), max_epochs=2).fit(module, Batches())
