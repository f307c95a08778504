"""`WeightClustering` under every way of training that Lightning has, on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_runs import EPOCHS, STEPS, Batches, Net, network, schedule, trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler

import torchclust
from torchclust.lightning import WeightClustering
from torchclust.model.clustering import count_distinct

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
TOTAL = EPOCHS * STEPS


def test_fit_clusters_and_strips() -> None:
    module = Net()
    trainer(WeightClustering(4)).fit(module, Batches())
    for name in ("0.weight", "4.weight", "6.weight"):
        assert count_distinct(module.net.get_parameter(name)) <= 4
    assert not torchclust.is_clustered(module)
    assert type(module) is Net


# Learning rates


def adam_one_cycle(module: nn.Module) -> Any:
    optimizer = Adam(module.parameters(), lr=1e-2)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=TOTAL + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def by_epoch(make: Callable[[Any], Any], **config: Any) -> Callable[[nn.Module], Any]:
    def optimizers(module: nn.Module) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        scheduler = {"scheduler": make(optimizer), "monitor": "constant", **config}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return optimizers


def by_step(make: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    return by_epoch(make, interval="step")


def warm_up_then_cosine(optimizer: Any) -> Any:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, TOTAL, eta_min=0.02)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[2])


def chained(optimizer: Any) -> Any:
    constant = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4)
    return lr_scheduler.ChainedScheduler([constant, lr_scheduler.ExponentialLR(optimizer, 0.9)])


SCHEDULES: dict[str, Callable[[nn.Module], Any]] = {
    "adam": lambda m: Adam(m.parameters(), lr=1e-3),
    "adam_one_cycle": adam_one_cycle,
    "adamw_groups_one_cycle": schedule,
    "sgd_cosine": by_epoch(lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, eta_min=0.03)),
    "sgd_cosine_steps": by_step(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.03)),
    "restarts": by_step(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01)),
    "cyclic": by_step(lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2)),
    "lambda": by_epoch(lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch))),
    "step": by_epoch(lambda o: lr_scheduler.StepLR(o, 1)),
    "polynomial": by_step(lambda o: lr_scheduler.PolynomialLR(o, TOTAL)),
    "plateau": by_epoch(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.2, patience=0, min_lr=0.01)
    ),
    "sequential": by_step(warm_up_then_cosine),
    "chained": by_step(chained),
}


class Rates(pl.Callback):
    """Every group's rate at every step, and what the schedulers believe it is."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.log("constant", 1.0)
        rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        self.rates.append(rates)
        believed = [c.scheduler.get_last_lr() for c in trainer.lr_scheduler_configs]
        if trainer.global_step == 0 or believed:
            assert list(itertools.chain(*believed)) in ([], rates)


class TwoOptimizers(Net):
    """Manual optimization: one optimizer for convolutions, one for the rest, own schedules."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        first = Adam(self.net[:4].parameters(), lr=1e-2)
        second = SGD(self.net[4:].parameters(), lr=1e-1, momentum=0.9)
        return [first, second], [
            lr_scheduler.StepLR(first, 4),
            lr_scheduler.CosineAnnealingLR(second, TOTAL),
        ]


def _module(name: str) -> Net:
    return TwoOptimizers() if name == "two_optimizers" else Net(SCHEDULES[name])


def _rates(name: str, *callbacks: pl.Callback) -> Tensor:
    rates = Rates()
    trainer(*callbacks, rates).fit(_module(name), Batches())
    return torch.tensor(rates.rates, dtype=torch.float64)


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize("name", [*SCHEDULES, "two_optimizers"])
def test_rates_are_the_schedule_s_then_a_fraction_of_it(name: str, start_epoch: int) -> None:
    plain = _rates(name)
    lowered = _rates(name, WeightClustering(lr_scale=0.25, start_epoch=start_epoch))
    before = start_epoch * STEPS
    assert plain.shape == lowered.shape == (TOTAL, plain.shape[1])
    torch.testing.assert_close(lowered[:before], plain[:before], rtol=0, atol=0)
    torch.testing.assert_close(lowered[before:], 0.25 * plain[before:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adam_one_cycle", "sgd_cosine", "two_optimizers"])
def test_rates_are_whole_again_afterwards(name: str) -> None:
    plain, rates, module = _rates(name), Rates(), _module(name)
    trainer(WeightClustering()).fit(module, Batches())
    trainer(rates).fit(module, Batches())
    torch.testing.assert_close(torch.tensor(rates.rates, dtype=torch.float64), plain)


def test_rates_are_lowered_once_however_often_it_is_fitted() -> None:
    module = Net()
    for _ in range(3):
        rates = Rates()
        trainer(WeightClustering(strip=False), rates, max_epochs=1).fit(module, Batches())
        assert rates.rates == [[pytest.approx(1e-3)]] * STEPS


# What the optimizer holds


class AtEpoch(pl.Callback):
    """Calls a function at the start of an epoch."""

    def __init__(self, epoch: int, call: Callable[[pl.Trainer, Any], None]) -> None:
        self.epoch, self.call, self.called = epoch, call, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.call(trainer, pl_module)
            self.called = True


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_later_clustering_keeps_the_state_of_all_but_codebooks(
    assignment: str, codebook_dtype: str
) -> None:
    old: dict[str, dict[str, Tensor]] = {}

    def remember(trainer: pl.Trainer, module: Net) -> None:
        for name, parameter in module.named_parameters():
            old[name] = {k: v.clone() for k, v in trainer.optimizers[0].state[parameter].items()}

    def compare(trainer: pl.Trainer, module: Net) -> None:
        (optimizer,) = trainer.optimizers
        held = [p for group in optimizer.param_groups for p in group["params"]]
        built = [p for group in schedule(module)["optimizer"].param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in built]
        assert {id(p) for p in held} == {id(p) for p in module.parameters()}
        for name, parameter in module.named_parameters():
            plain_name = name.replace("parametrizations.weight.original", "weight")
            if (name.endswith("original") and assignment == "fixed") or ".0." in name[4:]:
                assert parameter not in optimizer.state, name
            else:
                assert old[plain_name]["step"] == STEPS
                for key, value in old[plain_name].items():
                    assert torch.equal(optimizer.state[parameter][key], value)

    callback = WeightClustering(start_epoch=1, assignment=assignment, codebook_dtype=codebook_dtype)
    first, then = AtEpoch(1, remember), AtEpoch(1, compare)
    trainer(first, callback, then, max_epochs=2).fit(Net(schedule), Batches())
    assert first.called
    assert then.called


def test_groups_that_clustering_changes_cannot_be_carried_over() -> None:
    def by_shape(module: nn.Module) -> Any:
        groups = [[p for p in module.parameters() if p.dim() == d] for d in (1, 2, 3, 4)]
        return SGD([{"params": group} for group in groups if group], lr=0.1)

    with pytest.raises(ValueError, match=r"built parameter groups \[.*\] before clustering and "):
        trainer(WeightClustering(start_epoch=1)).fit(Net(by_shape), Batches())


def test_lbfgs_starts_afresh() -> None:
    """Its state is one vector over all parameters, of the wrong length after clustering."""
    module = Net(lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2))
    callback = WeightClustering({"net.6.weight": 16}, start_epoch=1)
    trainer(callback, max_epochs=2).fit(module, Batches())
    assert count_distinct(module.net[6].weight) <= 16


# Ways of training


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.flatten(1, 2))[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(x.flatten(1, 2)).mean(1))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x.flatten(1)).relu()))
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": network,
    "lstm": Recurrent,
    "attention": Attention,
    "tied": Tied,
}
CLUSTERINGS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "nearest": {"assignment": "nearest"},
    "int8": {"codebook_dtype": "int8"},
    "nearest_int8": {"codebook_dtype": "int8", "assignment": "nearest"},
    "channel": {"granularity": "channel", "gradient": "mean"},
    "sparse": {"preserve_sparsity": True, "assignment": "nearest"},
}


class KeepWhatWasClustered(pl.Callback):
    """The clusterings at the end of training, before they are stripped."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = {
            name: (clustering.config, clustering.channel_dim)
            for name, clustering in torchclust.named_clusterings(pl_module)
        }


def _assert_stripped(module: pl.LightningModule, was: KeepWhatWasClustered) -> None:
    """At most k values per codebook; an int8 one has k in every channel."""
    assert was.found
    assert not torchclust.is_clustered(module)
    assert not any(hasattr(m, "parametrizations") for m in module.modules())
    for name, (config, channel_dim) in was.found.items():
        weight = module.get_parameter(name).detach()
        per_tensor = config.granularity == "tensor" and config.codebook_dtype == "float32"
        for part in [weight] if per_tensor else weight.unbind(channel_dim):
            assert count_distinct(part) <= config.n_clusters, name


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize("clustering", CLUSTERINGS)
@pytest.mark.parametrize("net", NETWORKS)
def test_every_network_reaches_strip(net: str, clustering: str, start_epoch: int) -> None:
    torch.manual_seed(0)
    module, was = Net(net=NETWORKS[net]()), KeepWhatWasClustered()
    callback = WeightClustering(5, start_epoch=start_epoch, **CLUSTERINGS[clustering])
    fit = trainer(callback, was, max_epochs=2)
    fit.fit(module, Batches(2))
    _assert_stripped(module, was)
    assert fit.global_step == 4


class InSetup(Net):
    """Layers that come after the callbacks' setup."""

    def __init__(self) -> None:
        super().__init__(schedule, nn.Identity())

    def setup(self, stage: str) -> None:
        self.net = network()


class InConfigureModel(InSetup):
    setup = pl.LightningModule.setup

    def configure_model(self) -> None:
        self.net = network()


class CompiledInside(Net):
    """Submodules compiled by the user: one wrapped, one in place."""

    def __init__(self) -> None:
        super().__init__(schedule)
        self.net[0] = torch.compile(self.net[0], backend="aot_eager")
        self.net[6].compile(backend="aot_eager")


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"precision": "bf16-mixed"}, Net),
        ({"precision": "bf16-true"}, Net),
        ({"precision": "64-true"}, Net),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, lambda: Net(schedule)),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, Net),
        ({"barebones": True, "logger": None}, Net),
        ({}, TwoOptimizers),
        ({}, InSetup),
        ({}, InConfigureModel),
        pytest.param({}, CompiledInside, marks=pytest.mark.slow),
    ],
)
def test_every_way_of_training_reaches_strip(
    options: dict[str, Any], make: Callable[[], Net], start_epoch: int
) -> None:
    module, was = make(), KeepWhatWasClustered()
    clustering = WeightClustering(8, start_epoch=start_epoch)
    if options.get("barebones"):  # these may not even be given
        options = {**options, "enable_checkpointing": None, "enable_progress_bar": None}
        options["enable_model_summary"] = None
    trainer(clustering, was, **options).fit(module, Batches())
    _assert_stripped(module, was)
    assert len(was.found) == 3
