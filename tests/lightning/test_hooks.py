"""Around the training: compiled modules, checkpoints, freezing, logging, interruption."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_runs import STEPS, Batches, Evaluated, Net, schedule, trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchclust
from torchclust.lightning import WeightClustering
from torchclust.model.clustering import count_distinct

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # A checkpoint is read without the callbacks that wrote it: what some of these tests are about.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def evaluation() -> DataLoader[Any]:
    batches = Batches(8)
    return DataLoader(TensorDataset(batches.x, batches.y), 32)


def assert_same(got: nn.Module, want: nn.Module) -> None:
    assert list(got.state_dict()) == list(want.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


class Call(pl.Callback):
    """Calls a function in a hook of one epoch."""

    def __init__(self, hook: str, epoch: int, call: Callable[[Any], None]) -> None:
        def run(trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                self.called = True
                call(pl_module)

        self.called = False
        setattr(self, hook, run)


# Compiled modules


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_compiled_trains_as_eager(assignment: str) -> None:
    """Clustering in between must not leave the graph of the plain weights in use."""
    finals = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Net(schedule, perceptron())
        fitted: Any = torch.compile(module, backend="aot_eager") if compiled else module
        callback = WeightClustering(4, start_epoch=1, assignment=assignment)
        trainer(callback, max_epochs=2).fit(fitted, Batches())
        finals.append(module.net)
    for name, value in finals[0].state_dict().items():
        torch.testing.assert_close(finals[1].state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert count_distinct(finals[1][1].weight) <= 4


@pytest.mark.slow
# torch 2.13's inductor imports what torch 2.13 deprecates, 2026-11.
@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated")
def test_compiled_by_inductor() -> None:
    module = Net(schedule, perceptron())
    trainer(WeightClustering(4, start_epoch=1), max_epochs=2).fit(torch.compile(module), Batches())
    assert count_distinct(module.net[1].weight) <= 4


# Checkpoints


class Restorable(Evaluated):
    """With the documented line."""

    def __init__(self) -> None:
        super().__init__(schedule, perceptron())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torchclust.restore_(self, checkpoint)


class NotRestorable(Evaluated):
    def __init__(self) -> None:
        super().__init__(schedule, perceptron())


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[Evaluated, Path, Path]:
    """A module that stays clustered, its best checkpoint and its last."""
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    module = NotRestorable()
    fit = trainer(best, WeightClustering(4, strip=False))
    fit.fit(module, Batches(), evaluation())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    return module, Path(best.best_model_path), tmp_path / "last.ckpt"


def test_best_checkpoint_loads_into_a_plain_model(fitted: tuple[Evaluated, Path, Path]) -> None:
    saved = torch.load(fitted[1])
    restored = torchclust.restore_(NotRestorable(), saved)
    assert torchclust.is_clustered(restored)
    for name, value in saved["state_dict"].items():
        assert torch.equal(restored.state_dict()[name], value)
    trainer(WeightClustering(), max_epochs=1).fit(restored, Batches(), evaluation())
    assert count_distinct(restored.net[1].weight) <= 4


def test_load_from_checkpoint(fitted: tuple[Evaluated, Path, Path]) -> None:
    module, _, last = fitted
    assert_same(Restorable.load_from_checkpoint(last), module)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*config_json"):
        NotRestorable.load_from_checkpoint(last)


@pytest.mark.parametrize(("make", "told"), [(NotRestorable, True), (Restorable, False)])
def test_says_how_its_checkpoints_are_loaded(
    make: Callable[[], Net], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit = trainer(WeightClustering(4), max_epochs=1)
        fit.fit(make(), Batches(), evaluation())
    assert "Clustered 2 of 4 tensors" in caplog.text
    assert "net.1.weight" in caplog.text
    line = "def on_load_checkpoint(self, checkpoint): torchclust.restore_(self, checkpoint)"
    assert (line in caplog.text) == told


@pytest.mark.parametrize(("make", "callbacks"), [(NotRestorable, 1), (Restorable, 0)])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_a_clustered_checkpoint(
    fitted: tuple[Evaluated, Path, Path], make: Callable[[], Net], callbacks: int, stage: str
) -> None:
    """Without a fit, and into a plain model: by the callback, or by the documented line."""
    module, _, last = fitted
    evaluate = getattr(trainer(*[WeightClustering()] * callbacks), stage)
    plain = make()
    (want,) = evaluate(module, evaluation(), verbose=False)
    (got,) = evaluate(plain, evaluation(), last, verbose=False)
    assert got == want
    assert_same(plain, module)


def test_evaluating_changes_nothing() -> None:
    module = NotRestorable()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = WeightClustering(freeze="net.1.*")
    trainer(callback).test(module, evaluation(), verbose=False)
    assert {n: v.tolist() for n, v in module.state_dict().items()} == {
        n: v.tolist() for n, v in before.items()
    }
    assert not module._load_state_dict_pre_hooks
    assert all(p.requires_grad for p in module.parameters())


def test_plain_checkpoint_of_an_earlier_training_is_clustered_on_arrival(tmp_path: Path) -> None:
    plain = trainer(max_epochs=1)
    plain.fit(Net(schedule), Batches())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module, rates = Net(schedule), []
    probe = Call(
        "on_train_batch_start", 2, lambda m: rates.append(m.optimizers().param_groups[0]["lr"])
    )
    trainer(WeightClustering(4), probe).fit(module, Batches(), ckpt_path=tmp_path / "plain.ckpt")
    assert count_distinct(module.net[6].weight) <= 4
    assert len(rates) == STEPS
    assert max(rates) < 1e-3


def test_stripped_checkpoint_needs_nothing_of_us(tmp_path: Path) -> None:
    module = NotRestorable()
    callback = WeightClustering(4, save_stripped=str(tmp_path / "deploy.ckpt"))
    trainer(callback).fit(module, Batches(), evaluation())
    loaded = NotRestorable.load_from_checkpoint(tmp_path / "deploy.ckpt")
    assert_same(loaded, module)
    assert count_distinct(loaded.net[1].weight) <= 4
    assert set(torch.load(tmp_path / "deploy.ckpt")) & {"optimizer_states", "callbacks"} == set()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    module = Net(schedule)
    callback = WeightClustering(4, save_stripped=str(tmp_path / "deploy.ckpt"))
    trainer(callback, fast_dev_run=True).fit(module, Batches())
    assert count_distinct(module.net[6].weight) <= 4
    assert list(tmp_path.iterdir()) == []


# Interruption, and several fits


def fail(_: Any) -> None:
    raise RuntimeError("out of coffee")


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "raised"), [(fail, RuntimeError), (interrupt, SystemExit)])
def test_interrupted_fit_leaves_a_module_that_trains_on(stop: Any, raised: Any) -> None:
    module = Net(schedule)
    callback = WeightClustering(4, freeze=["net.0.*", "net.1.*"])
    with pytest.raises(raised):
        trainer(callback, Call("on_train_batch_end", 1, stop)).fit(module, Batches())
    assert torchclust.is_clustered(module)
    assert not module._load_state_dict_pre_hooks
    assert all(p.requires_grad for p in module.parameters())
    assert module.net[1].training
    trainer(callback).fit(module, Batches())
    assert not torchclust.is_clustered(module)
    assert count_distinct(module.net[6].weight) <= 4


def test_same_trainer_fits_on() -> None:
    """The second fit starts plain, beyond start_epoch; it is clustered at once."""
    module = Net(schedule)
    fit = trainer(WeightClustering(4, start_epoch=1), max_epochs=2)
    fit.fit(module, Batches())
    seen: list[int] = []
    fit.callbacks.append(
        Call("on_train_batch_start", 2, lambda m: seen.append(count_distinct(m.net[6].weight)))
    )
    fit.fit_loop.max_epochs = 3
    fit.fit(module, Batches())
    assert len(seen) == STEPS
    assert max(seen) <= 4


# Beside callbacks that copy the module or load checkpoints themselves


@pytest.mark.parametrize("make", [WeightAveraging, lambda: StochasticWeightAveraging(1e-2, 1)])
@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_averaging_a_clustered_module(make: Callable[[], pl.Callback], assignment: str) -> None:
    module = Net(net=perceptron())
    trainer(WeightClustering(4, assignment=assignment), make()).fit(module, Batches())
    assert count_distinct(module.net[1].weight) <= 4


@pytest.mark.parametrize("make", [WeightAveraging, lambda: StochasticWeightAveraging(1e-2, 1)])
@pytest.mark.parametrize(("start_epoch", "first"), [(1, True), (0, False)])
def test_averaging_a_copy_that_is_not_clustered(
    make: Callable[[], pl.Callback], start_epoch: int, first: bool
) -> None:
    callbacks = [WeightClustering(4, start_epoch=start_epoch), make()]
    with pytest.raises(ValueError, match=r"list WeightClustering before it, with start_epoch=0"):
        trainer(*callbacks[:: 1 if first else -1]).fit(Net(net=perceptron()), Batches())


def test_rate_finder_leaves_the_codebooks_in_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves and loads a checkpoint once the optimizers are there."""
    monkeypatch.chdir(tmp_path)
    module, held = Net(net=perceptron()), []
    module.lr = 1e-2

    def look(m: Net) -> None:
        groups = m.optimizers().param_groups
        held.append({id(p) for p in groups[0]["params"]} == {id(p) for p in m.parameters()})

    clustering = WeightClustering(4, assignment="nearest")
    finder = LearningRateFinder(num_training_steps=30, update_attr=False)
    trainer(clustering, finder, Call("on_train_batch_start", 0, look)).fit(module, Batches(40))
    assert set(held) == {True}


# Freezing

STATISTICS = {f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
BATCH_NORM = {"net.1.weight", "net.1.bias"} | STATISTICS


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("net.0.*", {"net.0.weight", "net.0.bias"}),
        (["net.1.*"], BATCH_NORM),
        (["BatchNorm2d"], BATCH_NORM),
        (("net.1.weight", "ConvTranspose2d"), {"net.1.weight", "net.4.weight", "net.4.bias"}),
    ],
)
def test_frozen_stays_constant_and_is_not_clustered(
    freeze: Any, frozen: set[str], start_epoch: int
) -> None:
    torch.manual_seed(0)
    module = Net(schedule)
    before: dict[str, Tensor] = {}
    clustered: list[set[str]] = []

    def look(m: Net) -> None:
        clustered.append({name for name, _ in torchclust.named_clusterings(m)})

    def keep(m: Net) -> None:
        before.update({name: value.clone() for name, value in m.state_dict().items()})

    callbacks = [
        Call("on_train_epoch_start", start_epoch, keep),
        WeightClustering({"*": 4, "ConvTranspose2d": 8}, freeze=freeze, start_epoch=start_epoch),
        Call("on_train_epoch_start", start_epoch, look),
    ]
    if start_epoch == 0:
        keep(module)
        callbacks.pop(0)
    trainer(*callbacks).fit(module, Batches())
    unchanged = {n for n, v in module.state_dict().items() if torch.equal(v, before[n])}
    assert unchanged == frozen
    assert clustered == [{"net.0.weight", "net.4.weight", "net.6.weight"} - frozen]
    assert all(p.requires_grad for p in module.parameters())
    assert all(m.training for m in module.modules())


def test_what_was_frozen_before_stays_frozen() -> None:
    module = Net()
    module.net[1].requires_grad_(False)
    trainer(WeightClustering(4, freeze="net.*.bias"), max_epochs=1).fit(module, Batches())
    still = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert still == {"net.1.weight", "net.1.bias"}


def test_freezing_a_clustered_model() -> None:
    """Its codebooks then stay, whatever their parameters are called by now."""
    module = Net()
    torchclust.cluster_(module, 4, codebook_dtype="int8", assignment="nearest")
    before = {name: p.clone() for name, p in module.named_parameters()}
    callback = WeightClustering(strip=False, freeze=["net.0.weight", "Linear"])
    trainer(callback, max_epochs=1).fit(module, Batches())
    after = dict(module.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith(("net.0.par", "net.6.")), name


# Logging


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_nearest_logs_what_moved(codebook_dtype: str) -> None:
    torch.manual_seed(0)
    module = Net(schedule)
    seen: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = []

    def look(m: Net) -> None:
        seen.append({
            name: (c.indices.clone(), c.latent.clone(), c.module.weight.detach().clone())
            for name, c in torchclust.named_clusterings(m)
        })  # fmt: skip

    callback = WeightClustering(
        8, lr_scale=1.0, assignment="nearest", codebook_dtype=codebook_dtype
    )
    looks = [Call("on_train_epoch_start", 1, look), Call("on_train_epoch_end", 1, look)]
    fit = trainer(callback, *looks, max_epochs=2)
    fit.fit(module, Batches())
    (start, end), metrics = seen, fit.logged_metrics
    moved = {name: (start[name][0] != end[name][0]).float().mean() for name in end}
    assert max(moved.values()) > 0
    for name, (indices, latent, weight) in end.items():
        assert metrics[f"moved/{name}"] == pytest.approx(float(moved[name]))
        assert metrics[f"distinct_values/{name}"] == len(indices.unique())
        error = float((weight - latent).norm() / latent.norm())
        assert metrics[f"quantization_error/{name}"] == pytest.approx(error, rel=1e-5)


def test_fixed_logs_the_error_of_the_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net(schedule)
    weight = module.net[6].weight.detach().clone()
    book = torchclust.fit_codebook(weight, 4)
    logger = CSVLogger(tmp_path)
    trainer(WeightClustering(4), logger=logger, log_every_n_steps=1, max_epochs=1).fit(
        module, Batches()
    )
    error = float((weight - book.centroids[book.indices.long()]).norm() / weight.norm())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["quantization_error/net.6.weight"]) == pytest.approx(error, rel=1e-5)
    assert float(row["distinct_values/net.6.weight"]) == 4
    assert not any(name.startswith("moved/") for name in row)


def test_histograms_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.event_pb2 import Event

    logger = TensorBoardLogger(tmp_path)
    assert isinstance(logger.experiment, SummaryWriter)
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 2}
    trainer(WeightClustering(4, log_histograms=True), **options).fit(Net(schedule), Batches())
    (file,) = Path(logger.log_dir).glob("events.*")
    record, events = file.read_bytes(), []
    while record:  # length, its checksum, the event, its checksum
        size = int.from_bytes(record[:8], "little")
        events.append(Event.FromString(record[12 : 12 + size]))
        record = record[16 + size :]
    found = [
        (value.tag, event.step, value.histo.num)
        for event in events
        for value in event.summary.value
        if value.HasField("histo")
    ]
    sizes = {"weights/net.0.weight": 54, "weights/net.4.weight": 216, "weights/net.6.weight": 768}
    assert found == [(name, step, n) for step in (STEPS, 2 * STEPS) for name, n in sizes.items()]


def test_histograms_without_tensorboard_are_announced_once() -> None:
    with pytest.warns(UserWarning, match="needs a TensorBoardLogger") as caught:
        trainer(WeightClustering(4, log_histograms=True)).fit(Net(schedule), Batches())
    assert len([w for w in caught if "TensorBoardLogger" in str(w.message)]) == 1


# Stopping early


@pytest.mark.parametrize(("acc", "epochs"), [(0.0, 1), (0.55, 8), (1.2, 1)])
def test_early_stopping_on_accuracy_lost(acc: float, epochs: int) -> None:
    """The documented line: enough regained, not yet, too much lost."""
    stopping = EarlyStopping(
        "val_acc", mode="max", stopping_threshold=acc - 0.005,
        divergence_threshold=acc - 0.6, patience=100,
    )  # fmt: skip
    torch.manual_seed(0)
    fit = trainer(WeightClustering(4, lr_scale=1e-6), stopping, max_epochs=8)
    fit.fit(Evaluated(net=perceptron()), Batches(), evaluation())
    assert fit.current_epoch == epochs
