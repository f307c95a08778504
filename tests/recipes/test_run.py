"""Running recipes: the control, resuming, what is written where, and the whole way once."""

import copy
import json
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fake_data import fake_data
from torch.utils.data import DataLoader, TensorDataset

import torchclust
from torchclust import named_clusterings
from torchclust.recipes import prepare as preparing
from torchclust.recipes import stages
from torchclust.recipes.artifacts import zipped_size
from torchclust.recipes.classifier import Classifier
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import load_recipe, parse_recipe
from torchclust.recipes.loaders import of_loaders
from torchclust.recipes.metric import Metric
from torchclust.recipes.prepare import prepare
from torchclust.recipes.pruning import GradualPruning, SparseDropout, prunable
from torchclust.recipes.report import gains, markdown
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError
from torchclust.recipes.stages import train_networks
from torchclust.recipes.sweep import _plot, front, plan, run_sweep
from torchclust.recipes.sweep import markdown as markdown_of_sweep
from torchclust.recipes.training import FrozenNorms, fit

PERCENT = Metric("accuracy", "max", "%")
RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "name": "small",
    "data": {"name": "mnist5k", "batch_size": 8},
    "model": "arm_mlp",
    "train": {"epochs": 2},
    "cluster": {"n_clusters": 8},
    "finetune": {"epochs": 1, "lr_scale": 0.5},
}

# API.md, section 6: the keys that scripts rely on.
CONTRACT = {
    "accuracy": {"float", "clustered", "int8", "baseline_int8"},
    "bytes": {
        "float_tflite", "float_tflite_zip", "clustered_float_tflite_zip", "int8_tflite",
        "int8_tflite_zip", "baseline_int8_tflite_zip", "packed", "packed_entropy_bound",
    },
    "vela": {
        "accelerator", "encoded_weight_bytes", "flash_bytes", "sram_bytes", "cycles", "cpu_ops",
        "baseline_encoded_weight_bytes", "baseline_flash_bytes", "baseline_cycles",
    },
}  # fmt: skip
TENSOR_KEYS = {
    "name", "shape", "n_clusters", "distinct_weights", "int8_codes", "entropy_bits",
    "baseline_entropy_bits", "skipped",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _noise(monkeypatch) -> None:
    """Train on noise; a test that wants real data undoes it."""
    monkeypatch.setattr(preparing, "load_data", fake_data)


def trained(model: torch.nn.Module, batches: DataLoader, callbacks: list) -> None:
    """One epoch with Adam at 0.01."""
    data = of_loaders(pl, train=batches)
    fit(Classifier(model, 1e-2), data, epochs=1, seed=0, callbacks=callbacks, progress=False)


def without_times(report: dict) -> dict:
    return {key: value for key, value in report.items() if key != "seconds"}


def test_the_control_trains_as_long_from_the_same_start(tmp_path: Path) -> None:
    prepared = prepare(parse_recipe(SMALL))
    networks = train_networks(prepared, Stages(tmp_path, progress=False))
    expected = Classifier(copy.deepcopy(networks.trained), 0.5 * 1e-3)
    fit(expected, prepared.task.make_data(), epochs=1, seed=0, progress=False)
    for name, value in networks.control.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[name])
        assert not torch.equal(value, networks.trained.state_dict()[name])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rates_and_epochs_of_every_stage(tmp_path: Path, monkeypatch, schedule: str) -> None:
    fits, rates = [], []

    def spy(module, data, *, epochs, callbacks=(), **rest):
        module = fit(module, data, epochs=epochs, callbacks=[*callbacks, Rates()], **rest)
        fits.append((epochs, rates.pop()))
        return module

    class Rates(pl.Callback):
        def on_train_end(self, trainer, *_) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    monkeypatch.setattr(stages, "fit", spy)
    content = {**SMALL, "prune": {"sparsity": 0.5, "epochs": 3}, "train": {"epochs": 2, "lr": 0.01}}
    content["cluster"] = {"preserve_sparsity": True}
    content["prune"] |= {"lr_scale": 0.3, "schedule": schedule}
    train_networks(prepare(parse_recipe(content)), Stages(tmp_path, progress=False))
    pruned = (3, 0.003 if schedule == "constant" else 0.0)
    expected = [(2, 0.01), pruned, (1, 0.005), pruned, (1, 0.005)]
    assert fits == expected  # train, then the control's two, then prune and finetune


@pytest.mark.parametrize("quantize", [False, True])
def test_without_labels_none_is_read(tmp_path: Path, monkeypatch, quantize: bool) -> None:
    """Labels that are shuffled after training change the accuracies but no parameter."""
    content = {**SMALL, "finetune": {"labels": False, "quantize_activations": quantize}}
    content["cluster"] = {"n_clusters": 4, "assignment": "nearest"}
    monkeypatch.setattr(stages, "STEPS_PER_EPOCH", 40)
    prepared = prepare(parse_recipe(content))
    networks = train_networks(prepared, Stages(tmp_path, progress=False))
    for name, value in networks.control.state_dict().items():
        assert torch.equal(value, networks.trained.state_dict()[name])
    for stage in ("cluster", "distill"):
        next(tmp_path.glob(f"{stage}-*")).unlink()
    monkeypatch.setattr(stages, "fit", None)
    train = prepared.task.make_data().train_dataloader().dataset
    train.labels[:] = 0
    again = train_networks(prepared, Stages(tmp_path, progress=False))
    images = train[list(range(40))][0]
    with torch.no_grad():
        outputs = [net(images) for net in (networks.trained, networks.compressed, again.compressed)]
        clustered = preparing.clustered_copy(prepared.recipe, networks.trained).eval()(images)
    assert torch.equal(outputs[1], outputs[2])
    error, before = ((outputs[0] - y).square().mean() for y in (outputs[1], clustered))
    assert error < 0.5 * before


def test_norms_are_frozen_in_the_phases_that_say_so(tmp_path: Path, monkeypatch) -> None:
    frozen = []

    def spy(module, data, *, callbacks=(), **rest):
        frozen.append(any(isinstance(callback, FrozenNorms) for callback in callbacks))
        return fit(module, data, callbacks=callbacks, **rest)

    monkeypatch.setattr(stages, "fit", spy)
    content = {**SMALL, "prune": {"sparsity": 0.5}, "cluster": {"preserve_sparsity": True}}
    content["finetune"] = {"freeze_batch_norm": True}
    train_networks(prepare(parse_recipe(content)), Stages(tmp_path, progress=False))
    # train; the control's pruning and fine-tuning; prune; finetune
    assert frozen == [False, False, True, False, True]


def test_the_control_teaches_and_is_not_taught(tmp_path: Path, monkeypatch) -> None:
    teachers = []

    def spy(module, data, **rest):
        teachers.append(module.distillation)
        return fit(module, data, **rest)

    monkeypatch.setattr(stages, "fit", spy)
    states = []
    for weight in (0.0, 0.9):
        content = {**SMALL, "finetune": {"lr_scale": 0.5, "distillation_weight": weight}}
        networks = train_networks(prepare(parse_recipe(content)), Stages(tmp_path, progress=False))
        states.append(networks.compressed.state_dict())
    # Trained once, and controlled once: neither depends on the weight.
    assert [teacher.weight if teacher else None for teacher in teachers] == [None, None, 0.0, 0.9]
    for name, value in teachers[-1].teacher.state_dict().items():
        assert torch.equal(value, networks.control.state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))


def test_clustering_may_see_inputs_where_there_are_labels_too(tmp_path: Path) -> None:
    """It starts closer to the trained model, and is then fine-tuned with labels."""
    before, after = {}, {}
    for inputs in (0, 200):
        content = {**SMALL, "cluster": {"n_clusters": 3, "inputs": inputs}}
        prepared = prepare(parse_recipe(content))
        networks = train_networks(prepared, Stages(tmp_path, progress=False))
        before[inputs] = networks.accuracy["before_finetune"]
        after[inputs] = networks.accuracy["clustered"]
    assert before[200] > before[0] + 1
    assert after[200] != before[200]


def test_without_labels_there_must_be_inputs() -> None:
    content = {**SMALL, "cluster": {"inputs": 0}, "finetune": {"labels": False}}
    with pytest.raises(RecipeError, match=r"cluster.inputs: 0 leaves nothing to see where"):
        parse_recipe(content)


def test_pruned_zeros_stay_through_clustering_and_finetuning(tmp_path: Path) -> None:
    content = {**SMALL, "prune": {"sparsity": 0.8, "epochs": 2}}
    content["cluster"] = {"n_clusters": 8, "preserve_sparsity": True, "assignment": "nearest"}
    networks = train_networks(prepare(parse_recipe(content)), Stages(tmp_path, progress=False))
    model = torchclust.strip_(networks.compressed)
    weights = torch.cat([getattr(m, n).flatten() for m, n in prunable(model)])
    assert int((weights == 0).sum()) >= round(0.8 * len(weights))
    assert networks.accuracy["pruned"] is not None


def test_pruning_rises_to_its_share_and_leaves_plain_parameters() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Flatten(), torch.nn.Linear(64, 10)
    )
    names = set(model.state_dict())
    shares = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest) -> None:
            shares.append((model[2].weight == 0).float().mean().item())

    images = TensorDataset(torch.randn(160, 4, 6, 6), torch.arange(160) % 10)
    callbacks = [GradualPruning(0.75), Watch()]
    trained(model, DataLoader(images, batch_size=4), callbacks)
    assert set(model.state_dict()) == names
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[30] == shares[-1] == pytest.approx(0.75, abs=0.01)
    assert (model[0].weight != 0).all()  # depthwise


def test_dropout_falls_with_the_share_of_weights_left() -> None:
    """Han et al. (2015), equation 2; afterwards the rates are as they were."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 60), torch.nn.Dropout(0.4), torch.nn.Linear(60, 10)
    )
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest) -> None:
            zeros = sum(int((m.weight == 0).sum()) for m in (model[1], model[3]))
            left = 1 - zeros / (60 * 64 + 60 * 10)
            rates.append((model[2].p, 0.4 * left**0.5))

    images = TensorDataset(torch.randn(160, 1, 8, 8), torch.arange(160) % 10)
    trained(model, DataLoader(images, batch_size=4), [GradualPruning(0.75), Watch()])
    found, expected = zip(*rates, strict=True)
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[-1] == pytest.approx(0.2)
    assert model[2].p == 0.4
    trained(model, DataLoader(images, batch_size=4), [SparseDropout(0.91), Watch()])
    assert rates[-1][0] == pytest.approx(0.12)
    assert model[2].p == 0.4


def test_whatever_drops_out_falls_along() -> None:
    """Of attention and recurrent layers too, which have a rate and no module for it."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.3)
            self.lstm = torch.nn.LSTM(8, 8, 2, dropout=0.2)
            self.drop = torch.nn.FeatureAlphaDropout(0.4)

    module = pl.LightningModule()
    module.net = net = Net()

    def rates() -> list[float]:
        return [net.attention.dropout, net.lstm.dropout, net.drop.p]

    callback = SparseDropout(0.75, "net")
    callback.on_fit_start(None, module)
    assert rates() == pytest.approx([0.15, 0.1, 0.2])
    callback.on_fit_end(None, module)
    assert rates() == pytest.approx([0.3, 0.2, 0.4])


# Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pruning_by_steps_comes_to_its_end_and_says_where_it_does_not() -> None:
    images = TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 10)

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
            trainer.should_stop = trainer.global_step >= 20

    def zeros(*callbacks: pl.Callback, **options: int) -> float:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        module = Classifier(model)
        trainer = pl.Trainer(
            callbacks=[GradualPruning(0.8), *callbacks], logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(images, batch_size=4))
        return float((model[1].weight == 0).float().mean())

    assert zeros(max_epochs=8) == pytest.approx(0.8, abs=0.01)
    assert zeros(max_epochs=8, max_steps=20) == pytest.approx(0.8, abs=0.01)
    with pytest.warns(
        UserWarning, match=r"pruning came to \d+% zeros of 80%: the run ended before"
    ):
        assert zeros(Early(), max_epochs=8) < 0.79


def test_pruning_needs_the_length_of_a_pass() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator:
            return iter([(torch.zeros(1, 8, 8), 0)] * 8)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(RecipeError, match=r"prune: .*trainer: \{limit_train_batches: 500\}"):
        trained(model, DataLoader(Endless(), batch_size=4), [GradualPruning(0.75)])


def test_the_sparse_network_drops_out_less_and_the_control_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**SMALL, "model": "seed_cnn", "prune": {"sparsity": 0.84, "epochs": 1}}
    fine = {"n_clusters": 8, "preserve_sparsity": True, "assignment": "nearest"}
    recipe = parse_recipe({**content, "cluster": fine})
    seen: list[list[float]] = []
    fit_as_it_is = stages.fit

    def watching(module: pl.LightningModule, *rest, **options) -> pl.LightningModule:
        rates: set[float] = set()
        dropout = next(m for m in module.modules() if isinstance(m, torch.nn.Dropout))
        hook = dropout.register_forward_pre_hook(lambda m, _: rates.add(round(m.p, 4)))
        fit_as_it_is(module, *rest, **options)
        hook.remove()
        seen.append(sorted(rates))
        return module

    monkeypatch.setattr(stages, "fit", watching)
    train_networks(prepare(recipe), Stages(tmp_path, progress=False))
    assert [0.1] in seen, "fine-tuned"
    assert [0.25] in seen, "the control"
    assert any(len(rates) > 1 and rates[0] == 0.1 for rates in seen), "while pruning"


def test_pruned_zeros_are_all_of_one_kind(tmp_path: Path) -> None:
    """A mask times a negative weight is -0.0: left so, the same zeros cost a packed file more."""
    images = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 100))
    trained(model, DataLoader(images, 4), [GradualPruning(0.9)])
    weight = model[1].weight
    zeros = weight == 0
    assert zeros.float().mean() == pytest.approx(0.9, abs=0.01)
    assert not weight[zeros].signbit().any()
    size = torchclust.save_packed(model, tmp_path / "one_kind.packed").bytes
    with torch.no_grad():
        weight[zeros] = torch.randn(int(zeros.sum())).sign() * 0.0
    two_kinds = torchclust.save_packed(model, tmp_path / "two_kinds.packed").bytes
    assert two_kinds > size + 0.9 * weight.numel() * 0.8 / 8


@pytest.mark.parametrize("when", range(1, 4))
def test_interrupted_then_resumed_equals_the_straight_run(
    tmp_path: Path, monkeypatch, when: int
) -> None:
    """Ctrl-C during the n-th training; what was done is not done again, and the end is the same."""
    recipe = parse_recipe({**SMALL, "seed": 3})
    straight = run_recipe(recipe, tmp_path / "straight", progress=False)
    fits = []

    def interrupting(*args, **kwargs):
        fits.append(1)
        if len(fits) == when:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(stages, "fit", interrupting)
    output = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, output, progress=False)
    assert not (output / "report.json").exists()
    resumed = run_recipe(recipe, output, resume=True, progress=False)
    assert len(fits) == 3 + 1  # each of train, control, finetune once, and the interrupted one
    assert without_times(resumed) == without_times(straight)
    states = [sorted((tmp_path / f / "stages").glob("finetune*"))[0] for f in
              ("straight", "interrupted")]  # fmt: skip
    one, other = (torch.load(path, weights_only=True)["state"] for path in states)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_another_recipe_reuses_what_it_shares(tmp_path: Path) -> None:
    said = []
    run_recipe(parse_recipe(SMALL), tmp_path, progress=False)
    changed = parse_recipe({**SMALL, "cluster": {"n_clusters": 4}})
    report = run_recipe(changed, tmp_path, resume=True, say=said.append, progress=False)
    assert said == ["train: done before", "control: done before", "cluster ...", "finetune ..."]
    assert {row["n_clusters"] for row in report["tensors"]} == {4, None}
    said.clear()
    other = parse_recipe({**SMALL, "seed": 1})
    run_recipe(other, tmp_path, resume=True, say=said.append, progress=False)
    assert said == ["train ...", "control ...", "cluster ...", "finetune ..."]


def test_resuming_after_the_network_changed_trains_the_new_one(tmp_path: Path, monkeypatch) -> None:
    """The recipe still says `arm_mlp`, but that is another network now."""
    run_recipe(parse_recipe(SMALL), tmp_path, progress=False)
    monkeypatch.setitem(preparing.MODELS, "arm_mlp", preparing.MODELS["lenet_300_100"])
    said = []
    run_recipe(parse_recipe(SMALL), tmp_path, resume=True, say=said.append, progress=False)
    assert said == ["train ...", "control ...", "cluster ...", "finetune ..."]


def test_a_run_repeats_from_its_report(tmp_path: Path) -> None:
    first = run_recipe(parse_recipe(SMALL), tmp_path / "a", progress=False)
    again = load_recipe(tmp_path / "a" / "report.json")
    assert again == load_recipe(tmp_path / "a" / "recipe.yaml") == parse_recipe(SMALL)
    second = run_recipe(again, tmp_path / "b", progress=False)
    assert without_times(first) == without_times(second)
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == first


def test_folders_that_hold_something(tmp_path: Path) -> None:
    recipe = parse_recipe({**SMALL, "cluster": None, "finetune": None})
    mine = tmp_path / "mine.txt"
    mine.write_text("keep me")
    with pytest.raises(RecipeError, match=r"is not empty: add --resume .*, --overwrite"):
        run_recipe(recipe, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(RecipeError, match=r"mine\.txt is a file; name a folder"):
        run_recipe(recipe, mine, progress=False)
    run_recipe(recipe, tmp_path, overwrite=True, progress=False)
    (tmp_path / "stages" / "stray").write_text("")
    run_recipe(recipe, tmp_path, overwrite=True, progress=False)
    assert mine.read_text() == "keep me"
    assert not (tmp_path / "stages" / "stray").exists()


def test_a_recipe_that_can_not_run_leaves_nothing(tmp_path: Path) -> None:
    nothing = parse_recipe({**SMALL, "cluster": {"rules": {"*": None}}})
    with pytest.raises(RecipeError, match="cluster: the rules leave every tensor alone"):
        run_recipe(nothing, tmp_path / "new", progress=False)
    recipe = parse_recipe({**SMALL, "cluster": {"rules": {"stem.*": 4}}})
    with pytest.raises(RecipeError, match="matches no parameter"):
        run_recipe(recipe, tmp_path / "new", progress=False)
    assert list(tmp_path.iterdir()) == []
    run_recipe(parse_recipe(SMALL), tmp_path / "old", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    with pytest.raises(RecipeError, match="matches no parameter"):
        run_recipe(recipe, tmp_path / "old", overwrite=True, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    said = []
    first = run_recipe(parse_recipe(SMALL), tmp_path, progress=False)
    stage = next((tmp_path / "stages").glob("finetune*"))
    stage.write_bytes(stage.read_bytes()[:-50])
    again = run_recipe(parse_recipe(SMALL), tmp_path, resume=True, say=said.append, progress=False)
    assert said[-1] == "finetune ..."
    assert without_times(first) == without_times(again)


def test_without_export_its_keys_are_null(tmp_path: Path) -> None:
    report = run_recipe(parse_recipe(SMALL), tmp_path, progress=False)
    check_contract(report)
    assert {value for key, value in report["bytes"].items() if "packed" not in key} == {None}
    assert report["bytes"]["packed"] == (tmp_path / "model.packed").stat().st_size
    assert gains(report) == []
    assert "## What was gained" not in markdown(report)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_inside_lightning_is_a_keyboard_interrupt() -> None:
    class Press(pl.Callback):
        def on_train_batch_start(self, *_) -> None:
            signal.raise_signal(signal.SIGINT)

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, if started in the background
    before = signal.getsignal(signal.SIGINT)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    batches = DataLoader(TensorDataset(torch.randn(2, 1, 2, 2), torch.arange(2)))
    with pytest.raises(KeyboardInterrupt):
        trained(model, batches, [Press()])
    assert signal.getsignal(signal.SIGINT) is before


def test_sweep_shares_stages_and_compares(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(SMALL))
    said = []
    settings = ["cluster.n_clusters=4,8", "cluster.init=linear,optimal", "seed=1"]
    rows = run_sweep(file, settings, tmp_path / "s", say=said.append, progress=False)
    assert [row["label"] for row in rows] == [
        "n_clusters=4, init=linear", "n_clusters=4, init=optimal",
        "n_clusters=8, init=linear", "n_clusters=8, init=optimal",
    ]  # fmt: skip
    assert said.count("train ...") == said.count("control ...") == 1
    assert said.count("finetune ...") == 4
    report = json.loads((tmp_path / "s" / "n_clusters=4_init=linear" / "report.json").read_text())
    assert report["recipe"]["cluster"]["n_clusters"] == 4
    assert report["seed"] == 1
    assert json.loads((tmp_path / "s" / "sweep.json").read_text()) == rows
    # Nothing is exported: compared is what there is, the float network and the packed file.
    assert rows[0]["float accuracy, %"] == report["accuracy"]["clustered"]
    assert rows[0]["packed, bytes"] == report["bytes"]["packed"] < rows[2]["packed, bytes"]
    header = (tmp_path / "s" / "sweep.md").read_text().partition("\n")[0]
    assert header == "|  | float accuracy, % | packed, bytes |"
    with pytest.raises(RecipeError, match="is not empty"):
        run_sweep(file, settings, tmp_path / "s")
    said.clear()
    run_sweep(file, settings, tmp_path / "s", resume=True, say=said.append, progress=False)
    assert not any(line.endswith("...") for line in said)


def test_one_run_that_fails_leaves_the_comparison_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    content = {**SMALL, "train": {"epochs": 0}, "cluster": {}}
    del content["finetune"]
    file.write_text(json.dumps(content))
    settings = ["cluster.budget=0.05,20,30"]
    message = (
        r"1 of 3 runs failed, the others are compared in .*sweep\.md. budget=0\.05: .* 0\.05 KiB"
    )
    with pytest.raises(RecipeError, match=message):
        run_sweep(file, settings, tmp_path / "s", jobs=2, progress=False)
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [row["label"] for row in rows] == ["budget=20", "budget=30"]


def test_sweep_needs_values_and_valid_recipes(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(SMALL))
    with pytest.raises(RecipeError, match=r"no key has several values: .*n_clusters=4,8"):
        plan(file, ["seed=1"])
    with pytest.raises(RecipeError, match="n_clusters must be between 2 and 256, got 1"):
        plan(file, ["cluster.n_clusters=1,2"])
    assert [p.folder for p in plan(file, ["finetune.lr_scale=0.1,1e-2"])] == [
        "lr_scale=0.1", "lr_scale=0.01",
    ]  # fmt: skip
    assert [p.label for p in plan(file, ["model=arm_mlp,lenet_300_100"])] == [
        "model=arm_mlp", "model=lenet_300_100",
    ]  # fmt: skip


def test_sweep_plots_what_was_measured(tmp_path: Path) -> None:
    def row(label: str, zipped: int, flash: int | None = None, tables: int | None = None) -> dict:
        sizes = {"flash, bytes": flash, "encoded weights, bytes": flash, "int8 zip, bytes": zipped}
        sizes["tflite-micro's flash, bytes"] = tables
        baseline = {f"baseline {name}": 9000 for name in sizes}
        rest = {"float zip, bytes": 1, "cycles": None, "not clustered, %": 90.0}
        return {"label": label, "int8 accuracy, %": 89.0, **sizes, **baseline, **rest}

    for number, chip in enumerate(({"flash": 3000}, {}, {"flash": 0}, {"tables": 4000})):
        path = tmp_path / f"{number}.png"
        _plot([row("a", 2000, **chip), row("b", 1000, **chip)], path, PERCENT)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "cycles" not in markdown_of_sweep([row("a", 2000, 3000)])
    assert "| a | 89.00 |" in markdown_of_sweep([row("a", 2000, 3000)])
    assert "4,000" in markdown_of_sweep([row("a", 2000, tables=4000)])


def test_pareto_front() -> None:
    points = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (4.0, 90.0), (2.5, 85.0)]
    assert front(points) == [1, 4, 0]


def test_zipped_size_is_a_deflated_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 16, 10_000, dtype=np.uint8).tobytes())
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "a.bin")
    assert zipped_size(file) == (tmp_path / "a.zip").stat().st_size


def check_contract(report: dict) -> None:
    """Compare a report's keys with API.md, section 6."""
    for section, keys in CONTRACT.items():
        assert keys <= set(report[section]), section
    assert report["tensors"]
    for row in report["tensors"]:
        assert set(row) == TENSOR_KEYS
    json.dumps(report)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_demo_end_to_end_on_real_digits(tmp_path: Path, monkeypatch, batch_norm: bool) -> None:
    """recipes/mnist_cnn.yaml with fewer epochs: everything the demo promises, in its report."""
    monkeypatch.undo()
    epochs = 1 if batch_norm else 3  # what reaches 85 %
    settings = [f"train.epochs={epochs}", "finetune.epochs=1", "export.calibration_samples=50"]
    settings += ["tflm={}"]
    norm = f"model.batch_norm={str(batch_norm).lower()}"
    recipe = load_recipe(RECIPES / "mnist_cnn.yaml", [*settings, norm])
    report = run_recipe(recipe, tmp_path, progress=False)
    check_contract(report)
    accuracy, size, vela = report["accuracy"], report["bytes"], report["vela"]
    assert accuracy["float"] > 85
    assert accuracy["int8"] >= accuracy["baseline_int8"] - 2  # 0.5 after the demo's epochs
    assert vela["cpu_ops"] == 0
    assert vela["encoded_weight_bytes"] <= 0.60 * vela["baseline_encoded_weight_bytes"]
    tables = report["tflm"]
    assert tables["flash_bytes"] == (tmp_path / "tflm.tflite").stat().st_size
    assert tables["flash_bytes"] <= 0.62 * tables["baseline_flash_bytes"]
    assert tables["compared"] == 132
    assert size["clustered_float_tflite_zip"] * 5 <= size["float_tflite_zip"]
    clustered = [row for row in report["tensors"] if row["n_clusters"]]
    assert len(clustered) == 4
    for row in clustered:
        assert row["int8_codes"] <= row["n_clusters"]
        assert row["distinct_weights"] <= row["n_clusters"]
    assert size["int8_tflite"] == (tmp_path / "int8.tflite").stat().st_size
    for name in ("report.md", "report.png", "float.tflite", "baseline_int8.tflite",
                 "vela/int8_vela.tflite", "vela/baseline_int8_vela.tflite"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0
    text = (tmp_path / "report.md").read_text()
    for cells in gains(report):
        assert "| " + " | ".join(cells) + " |" in text
    resumed = run_recipe(recipe, tmp_path, resume=True, progress=False)
    assert resumed == report
    clusterings = dict(named_clusterings(train_networks(
        prepare(recipe), Stages(tmp_path / "stages", progress=False)).compressed))  # fmt: skip
    assert set(clusterings) == {row["name"] for row in clustered}
