"""Recipes of one's own module, data and metric: what is run, judged, refused, resumed."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_project
import pytest
import torch
from torch import nn

from torchclust import named_clusterings
from torchclust.lightning.trees import TREES
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import load_recipe, override, parse_recipe
from torchclust.recipes.metric import Metric
from torchclust.recipes.prepare import prepare
from torchclust.recipes.report import gains, markdown
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError
from torchclust.recipes.stages import train_networks

OWN = {
    "name": "own",
    "module": {"target": "own_project.module", "exports": "net"},
    "data": {"target": "own_project.loaders"},
    "metric": {"name": "test_mse", "mode": "min"},
    "train": {"epochs": 2},
    "cluster": {"n_clusters": 4},
    "finetune": {"epochs": 1, "lr_scale": 0.5},
}
PRUNED = {
    "prune": {"sparsity": 0.5},
    "cluster": {"n_clusters": 8, "preserve_sparsity": True, "assignment": "nearest"},
}


def recipe_with(*settings: str, **sections: Any) -> Any:
    content = copy.deepcopy({**OWN, **sections})
    for setting in settings:
        override(content, setting)
    return parse_recipe(content)


def run(folder: Path, *settings: str, resume: bool = False, **sections: Any) -> dict[str, Any]:
    report = run_recipe(recipe_with(*settings, **sections), folder, resume=resume, progress=False)
    return {key: value for key, value in report.items() if key != "seconds"}


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted((folder / "stages").glob("*.pt"))
    found = {f.name.partition("-")[0]: torch.load(f, weights_only=True) for f in files}
    return {name: stage["state"] for name, stage in found.items() if "state" in stage}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_exports_names_is_clustered_and_the_rest_trains_along(tmp_path: Path) -> None:
    networks = train_networks(prepare(recipe_with()), Stages(tmp_path, progress=False))
    assert [name for name, _ in named_clusterings(networks.compressed)] == [
        "body.0.weight", "head.weight",
    ]  # fmt: skip
    assert networks.modules["compressed"].gain != networks.modules["trained"].gain != 1
    assert isinstance(networks.trained, own_project.Network)
    assert networks.accuracy["float"] < 2.0
    assert networks.accuracy["control"] is not None


def test_without_exports_it_is_the_modules_forward(tmp_path: Path) -> None:
    report = run(tmp_path, "module.exports=''")
    names = {row["name"] for row in report["tensors"] if row["n_clusters"]}
    assert names == {"net.body.0.weight", "net.head.weight"}


def test_the_control_trains_at_the_rates_of_the_clustered_one(tmp_path: Path, monkeypatch) -> None:
    from torchclust.recipes import stages

    rates, fit = [], stages.fit

    def spy(module: Any, data: Any, *, callbacks: Any = (), **rest: Any) -> Any:
        class Watch(callbacks_of(module)):
            def on_train_start(self, trainer: Any, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        return fit(module, data, callbacks=[*callbacks, Watch()], **rest)

    monkeypatch.setattr(stages, "fit", spy)
    train_networks(prepare(recipe_with("module.lr=0.02")), Stages(tmp_path, progress=False))
    assert rates == [0.02, 0.01, 0.01]


def callbacks_of(module: Any) -> Any:
    from torchclust.lightning.trees import tree_of

    return tree_of(module).Callback


@pytest.mark.parametrize("data", ["loaders", "data_module"])
def test_both_lightnings_give_the_same_bits(tmp_path: Path, data: str) -> None:
    found = []
    for tree in TREES:
        sections: dict[str, Any] = {"module": {**OWN["module"], "tree": tree}, **PRUNED}
        if data == "data_module":
            sections["data"] = {"target": "own_project.data_module", "tree": tree}
        report = run(tmp_path / tree, **sections)
        found.append((states(tmp_path / tree), report["accuracy"], report["bytes"]))
    (one, *figures), (other, *same) = found
    assert figures == same
    assert set(one) == {"train", "control", "prune", "cluster", "finetune"}
    assert all(equal(one[stage], other[stage]) for stage in one)


@pytest.mark.parametrize("kind", ["Manual", "Regression"])
def test_a_score_function_takes_the_place_of_a_metric(tmp_path: Path, kind: str) -> None:
    report = run(
        tmp_path, f"module.kind={kind}", "metric=null", "score=own_project.score", **PRUNED
    )
    assert report["metric"] == {"name": "score", "mode": "max", "unit": ""}
    assert report["accuracy"]["float"] < 0
    zeros = [
        state["net.head.weight"] for name, state in states(tmp_path).items() if name == "prune"
    ]
    assert (zeros[0] == 0).any()


@pytest.mark.parametrize(
    "stage", ["train", "control", "prune", "cluster", "finetune", "distill", "sensitivity"]
)
def test_killed_in_any_stage_and_resumed_equals_the_straight_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The worst moment: all is computed and nothing of it stored."""
    sections: dict[str, Any] = dict(PRUNED)
    if stage == "distill":
        monkeypatch.setattr("torchclust.recipes.stages.STEPS_PER_EPOCH", 5)
        sections["finetune"] = {"labels": False}
    if stage == "sensitivity":
        sections["cluster"] = {"budget": 0.4, "preserve_sparsity": True}
    straight = run(tmp_path / "straight", **sections)
    result = Stages.result

    def killed(
        self: Stages, name: str, depends: Any, compute: Callable[[], Any], **more: Any
    ) -> Any:
        def dying() -> Any:
            compute()
            raise KeyboardInterrupt

        return result(self, name, depends, dying if name == stage else compute, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "result", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", **sections)
    assert not list((tmp_path / "killed" / "stages").glob(f"{stage}-*.pt"))
    assert run(tmp_path / "killed", resume=True, **sections) == straight
    one, other = states(tmp_path / "straight"), states(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(equal(one[name], other[name]) for name in one)


def test_a_changed_source_trains_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is called the same, and so are its layers; only its losses are others."""
    said: list[str] = []
    run(tmp_path)
    monkeypatch.setattr("torchclust.recipes.own.digest_of", lambda target: "another")
    run_recipe(recipe_with(), tmp_path, resume=True, say=said.append, progress=False)
    assert said[0] == "train ..."


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_budget_of_the_users_metric_in_either_direction(tmp_path: Path, mode: str) -> None:
    score = {"score": "own_project.score"} if mode == "max" else {}
    name = "score" if mode == "max" else "test_mse"
    sections = {**score, "metric": {"name": name, "mode": mode}, "train": {"epochs": 8}}
    chosen = []
    for most in (0.02, 2.0):
        sections["cluster"] = {"max_accuracy_drop": most}
        report = run(tmp_path / str(most), **sections)
        chosen.append(report["chosen"]["encoded_bytes"])
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("module.kind=Silent", r"metric\.name: test_step logs no 'test_mse'; it logs nothing:  "
                               r"self\.log\('test_mse', value\)"),
        ("metric.name=val_mse", r"test_step logs no 'val_mse'; it logs test_mse"),
        ("module.kind=Nan", "the metric test_mse is nan, and a run compares models by it"),
        ("module.kind=TwoOptimizers", r"module: RuntimeError: Training with multiple optimizers"),
        ("module.kind=Wrong", r"module: \w+: .*\(own_project\.py, line \d+\)"),
        ("module.kind=Beside", "module.exports: 'net' is never called when the module is judged"),
        ("module.exports=nets", r"module\.exports: no submodule 'nets'; did you mean 'net'"),
        ("module.target=torch.nn.Identity", "makes Identity, which is no LightningModule"),
        ("module.target=own_project.modul", "module.target: cannot import 'own_project.modul'"),
        ("module.learning_rate=1", r"unknown key module\.learning_rate: own_project\.module takes"),
        ("module.kind=None", r"module: own_project\.module can not be built: KeyError: 'None'"),
        ("data.test=false", r"own_project\.loaders makes builtins\.dict with 'train'; a"),
        ("data.empty=true", "data.target: own_project.loaders has no test batches"),
        ("data={target: own_project.data_module, test: false}",
         r"own_project\.data_module has no test loader; .*def test_dataloader"),
        ("data={target: own_project.data_module, tree: lightning.pytorch}",
         "a module of pytorch_lightning takes a LightningDataModule of that package"),
        ("trainer={max_epochs: 3}", r"trainer\.max_epochs: how long to train is train\.epochs"),
        ("trainer={device: 2}", r"unknown key trainer\.device; did you mean 'devices'"),
        ("score=own_project.scores", "score: cannot import 'own_project.scores'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_anything_is_written(
    tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        run_recipe(recipe_with(setting), tmp_path / "run", progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("module=null", "give either model .* or module"),
        ("model=arm_mlp", "give either model .* or module"),
        ("metric=null", "nothing says how good the module is: add metric:"),
        ("train.lr=0.1", r"train\.lr: the module's own optimizers have their rates"),
        ("finetune.distillation_weight=0.5", "training_step has a loss of its own; let that hold"),
        ("finetune.schedule=cosine", r"finetune\.schedule: the module's configure_optimizers"),
        (
            "prune={sparsity: 0.5, schedule: cosine}",
            r"prune\.schedule: the module's configure_optimizers",
        ),
        ("metric.mode=most", "metric.mode: should be 'max' or 'min', got 'most'"),
        ("data={batch_size: 3}", "data: give either name .* or target"),
        ("data={name: mnist5k, bath_size: 3}", r"unknown key data\.bath_size; did you mean 'batch"),
    ],
)
def test_sections_fit_together(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_with(setting)


def test_metric_and_own_data_go_with_a_module() -> None:
    model = {"module": None, "model": "arm_mlp", "metric": None}
    with pytest.raises(RecipeError, match=r"data\.target goes with module: a model classifies"):
        recipe_with(**model)
    with pytest.raises(RecipeError, match="score goes with module: a model is judged by its"):
        recipe_with("data=mnist5k", score="a.b", **{**model, "data": "mnist5k"})


def test_a_checkpoint_is_loaded_or_refused(tmp_path: Path) -> None:
    module = own_project.module()
    nn.init.zeros_(module.net.head.weight)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "best.ckpt")
    file = f"module.checkpoint={tmp_path / 'best.ckpt'}"
    assert (
        prepare(recipe_with(file, "cluster=null", "finetune=null")).model.head.weight == 0
    ).all()
    torch.save({"state_dict": nn.Linear(3, 3).state_dict()}, tmp_path / "best.ckpt")
    with pytest.raises(RecipeError, match=r"module\.checkpoint: .* does not fit the module: "):
        prepare(recipe_with(file))


def test_a_training_that_ends_in_nan_stores_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the metric test_mse is (nan|inf)"):
        run(tmp_path, "module.lr=1e30")
    assert not list((tmp_path / "stages").glob("*.pt"))


def test_targets_are_found_beside_the_recipe(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "beside_the_recipe.py").write_text("from own_project import *\n")
    content = {**OWN, "module": {"target": "beside_the_recipe.module", "exports": "net"}}
    (tmp_path / "r.json").write_text(json.dumps(content))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(tmp_path / "r.json")
    assert recipe.folder == str(tmp_path)
    assert prepare(recipe).task.exports == "net"


def test_what_a_run_writes_is_a_recipe_anywhere(tmp_path: Path, monkeypatch) -> None:
    """Also of a module: nothing is in it that its user never said, and its folder is found."""
    project, output = tmp_path / "project", tmp_path / "project" / "out"
    project.mkdir()
    (project / "moved_about.py").write_text("from own_project import *\n")
    content = {**OWN, "name": "moved", "train": {"epochs": 1}, "cluster": {"budget": 0.5}}
    for section in ("module", "data"):
        target = OWN[section]["target"].replace("own_project", "moved_about")
        content[section] = {**OWN[section], "target": target}
    (project / "r.json").write_text(json.dumps(content))
    monkeypatch.chdir(project)
    recipe = load_recipe("r.json")
    run_recipe(recipe, output, progress=False)
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "report.json", "chosen.yaml"):
        monkeypatch.delitem(sys.modules, "moved_about")
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(project)])
        again = load_recipe(output / name)
        assert again.folder == str(project)
        assert (again == recipe) == (name != "chosen.yaml")
        assert prepare(again).task.exports == "net"


def test_defaults_that_are_a_targets_own_are_not_written(tmp_path: Path) -> None:
    said = recipe_with().to_dict()
    assert (said["train"], said["data"]) == ({"epochs": 2}, OWN["data"])
    assert recipe_with("data.batch_size=128").to_dict()["data"]["batch_size"] == 128
    assert recipe_with("data=mnist5k").to_dict()["data"]["batch_size"] == 128
    assert recipe_with("train.lr=null").train.lr == 1e-3
    with pytest.raises(RecipeError, match=r"train\.lr: the module's own optimizers have their"):
        recipe_with("train.lr=1e-3")


def test_a_score_that_cannot_be_imported_should_be_a_function() -> None:
    with pytest.raises(RecipeError, match=r"cannot import 'nope\.f': .*expected module\.function,"):
        prepare(recipe_with("metric=null", "score=nope.f"))


def test_a_report_speaks_of_the_users_metric(tmp_path: Path) -> None:
    report = run(tmp_path) | {"seconds": {}}
    text = markdown(report)
    assert "## test_mse on the test data" in text
    assert "accuracy" not in text.lower()
    report["accuracy"] |= {"int8": 0.5, "baseline_int8": 0.4}
    assert gains(report)[0] == ("int8 test_mse", "0.4000", "0.5000", "+0.1000")


def test_metric_words() -> None:
    assert Metric("AUC", "max").title == "AUC"
    assert Metric("accuracy", "max", "%").title == "Accuracy"
    assert Metric("delay", "min", "ms").label == "delay, ms"
    assert Metric("a", "min").loss(1, 3) == 2 == Metric("a", "max").loss(3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("exports", ["net", ""])
def test_the_file_itself_is_judged_by_test_step(tmp_path: Path, exports: str) -> None:
    """What test_step makes of the file's outputs, computed once more by hand."""
    settings = ("train.epochs=10", f"module.exports='{exports}'")
    report = run(tmp_path, *settings, export={"calibration_samples": 40})
    from torchclust.export.runner import Runner

    file = Runner((tmp_path / "int8.tflite").read_bytes(), reference=False)
    gain = states(tmp_path)["finetune"]["gain"] if exports else 1.0
    x, y = own_project.samples(40, 1).tensors
    outputs = torch.cat([torch.from_numpy(file([row])[0]) for row in x.split(1)])
    expected = nn.functional.mse_loss(gain * outputs, y)
    assert report["accuracy"]["int8"] == pytest.approx(float(expected), rel=1e-5)
    assert report["accuracy"]["int8"] != report["accuracy"]["clustered"]


@pytest.mark.slow
def test_layers_called_around_the_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"test_step calls 'body\.0' by itself|'head' by itself"):
        run(tmp_path, "module.kind=Inside", export={"calibration_samples": 10})


def test_pruning_needs_the_length_of_a_pass_and_check_says_so(tmp_path: Path) -> None:
    sections = {"data": {"target": "own_project.endless"}, **PRUNED}
    with pytest.raises(RecipeError, match=r"trainer: \{limit_train_batches: 500\}") as raised:
        prepare(recipe_with(**sections))
    assert "\n" not in str(raised.value)
    report = run(tmp_path, **sections, trainer={"limit_train_batches": 4})
    assert report["accuracy"]["pruned"] is not None


def test_tensors_that_a_module_makes_in_setup_are_found_before(tmp_path: Path) -> None:
    """What a stage has stored could not be put into the module as it is built."""
    with pytest.raises(
        RecipeError, match=r"class_weights.*in __init__, not in setup\(\)"
    ) as raised:
        prepare(recipe_with("module.kind=InSetup"))
    assert "\n" not in str(raised.value)


def test_a_limit_of_test_batches_is_none_of_calibrations() -> None:
    prepared = prepare(recipe_with(trainer={"limit_test_batches": 2}))
    (inputs,) = prepared.task.inputs(prepared.task.module, 80, 0)
    assert len(inputs) == 80
