"""distill_: nearer to a teacher that stays as it is, and interruptions do not show."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fake_data
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import torchclust
from torchclust.data_aware.batches import Call
from torchclust.data_aware.blocks import find_blocks
from torchclust.distillation import steps
from torchclust.distillation.price import Price
from torchclust.recipes import kept, prepare, stages
from torchclust.recipes.load import parse_recipe
from torchclust.zoo.networks import Residual


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8),
    )
    stem = [nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5)]
    model = nn.Sequential(*stem, Residual(body), *head)
    x = inputs()
    for _ in range(30):
        model(x)
    return model.eval()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(96, 1, 10, 10, generator=generator).abs()


def gap(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        wanted = teacher.eval()(inputs())
        return float((model.eval()(inputs()) - wanted).square().mean() / wanted.var())


RATE = 0.1
CASES = {
    "int8 nearest": {"codebook_dtype": "int8", "assignment": "nearest"},
    "int8 fixed": {"codebook_dtype": "int8"},
    "float nearest": {"assignment": "nearest"},
    "float fixed": {},
    "sparse": {"preserve_sparsity": True, "assignment": "nearest"},
    "priced": {"rate": 1e-3, "assignment": "nearest"},
}


@pytest.mark.parametrize("case", CASES)
def test_comes_nearer_and_keeps_the_contract(case: str) -> None:
    model = network()
    if case == "sparse":
        with torch.no_grad():
            model[0].weight[model[0].weight.abs() < 0.05] = 0
    teacher = copy.deepcopy(model).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    zeros = model[0].weight == 0
    torchclust.cluster_(model, 5, **CASES[case])
    start = gap(model, copy.deepcopy(teacher))
    model[0].train()
    modes = [module.training for module in model.modules()]
    assert torchclust.distill_(model, teacher, inputs(), steps=30, lr=5e-3) is model
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert gap(model, teacher) < 0.7 * start
    assert not model[0].weight[zeros].any()
    torchclust.strip_(model)  # validates the number of distinct values


def test_labels_are_not_read() -> None:
    x = inputs().split(32)
    batches: list[Any] = [list(x), [(part, torch.full((32,), torch.nan)) for part in x]]
    states = []
    for form in batches:
        model = network()
        teacher = copy.deepcopy(model)
        torchclust.cluster_(model, 5)
        states.append(torchclust.distill_(model, teacher, form, steps=3).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Killed(Exception):
    """Stands for a kill at some step."""


WAYS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "nearest": {"assignment": "nearest"},
    "priced": {"assignment": "nearest", "rate": 0.01},
}


@pytest.mark.parametrize(
    ("way", "kill"),
    [
        *itertools.product(["fixed", "nearest"], [1, 4, 7, 13, 16, 19]),
        ("priced", 7),
        ("priced", 16),
    ],
)
def test_an_interrupted_call_goes_on(
    kill: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at a step of any stage, then called again in a new model: bit-equal to one call."""
    monkeypatch.setattr(steps, "_SAVED_EVERY", 2)
    file = tmp_path / "state.pt"

    def fresh() -> tuple[nn.Module, nn.Module]:
        model = network()
        teacher = copy.deepcopy(model)
        return torchclust.cluster_(model, 7, codebook_dtype="int8", **WAYS[way]), teacher

    straight = torchclust.distill_(*fresh(), inputs(), steps=6)
    count = 0

    def step_or_die(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == kill:
            raise Killed

    handle = register_optimizer_step_post_hook(step_or_die)
    model, teacher = fresh()
    teacher.train()
    with pytest.raises(Killed):
        torchclust.distill_(model, teacher, inputs(), steps=6, checkpoint=file)
    handle.remove()
    assert all(module.training for module in teacher.modules())
    assert file.exists() == (kill > 2)
    resumed = torchclust.distill_(*fresh(), inputs(), steps=6, checkpoint=file)
    assert not file.exists()
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in straight.state_dict().items())


def bits(model: nn.Module) -> float:
    """Bits that the entropies of all indices come to, per weight."""
    spent, weights = 0.0, 0
    for _, clustering in torchclust.named_clusterings(model):
        counts = clustering.indices.flatten().int().bincount().double()
        spent -= float((counts * (counts / counts.sum()).clamp_min(1e-9).log2()).sum())
        weights += clustering.indices.numel()
    return spent / weights


def test_weights_pay_for_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error and bits at their price end lower than without the price's gradient, and fell."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 48, generator=generator)

    def objective(model: nn.Module, teacher: nn.Module) -> float:
        with torch.no_grad():
            wanted = teacher(x)
            error = float((model(x) - wanted).square().mean() / wanted.var())
        return error + RATE * bits(model)

    def distilled() -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 16))
        teacher = copy.deepcopy(model)
        options: dict[str, Any] = {"codebook_dtype": "int8", "assignment": "nearest"}
        torchclust.cluster_(model, 15, rate=RATE, **options)
        start = objective(model, teacher)
        torchclust.distill_(model, teacher, x, steps=100, lr=0.02)
        return start, objective(model, teacher)

    start, end = distilled()
    monkeypatch.setattr(Price, "charge_", lambda self: None)
    _, end_unpriced = distilled()
    assert end < end_unpriced - 0.005
    assert end < start


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_price_is_of_the_counts_that_are_there(dtype: str) -> None:
    """Running counts catch up with what training did: that alone must not look like a saving."""
    model = network()
    torchclust.cluster_(model, 15, assignment="nearest", rate=1e-3, codebook_dtype=dtype)
    price = Price.of(model, list(model.parameters()))
    for weight, _, _ in price.weights:
        weight.get_buffer("price_share").zero_()  # or other counts would assign otherwise
    due = price.due()
    for weight, _, _ in price.weights:
        weight.get_buffer("members").add_(torch.rand(()) * 1000)
    assert price.due() == due
    spent, total = 0.0, 0
    for weight, latent, _ in price.weights:
        counts = weight.indices_of(latent).flatten().int().bincount().double()
        spent -= float((counts * (counts / counts.sum()).clamp_min(1e-9).log2()).sum())
        total += latent.numel()
    assert due == pytest.approx(1e-3 * spent / total, rel=0.05)  # half a member more each


@pytest.mark.parametrize("options", [{}, {"assignment": "nearest", "rate": 1e-3}])
def test_frozen_blocks_stay_and_the_others_learn(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 4, **options)
    children = [child for child in model.children() if list(child.parameters())]
    for child in children[:-1]:
        child.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    start = gap(model, teacher)
    torchclust.distill_(model, teacher, inputs(), steps=30)
    assert gap(model, teacher) < start
    last = {id(p) for p in children[-1].parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in last:
            assert torch.equal(parameter, before[name]), name


def test_a_frozen_model_is_refused() -> None:
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter .* frozen.*requires_grad_\(True\)"):
        torchclust.distill_(model, teacher, inputs(), steps=3)


def test_a_stage_in_vain_leaves_the_price_as_it_was() -> None:
    """At a rate of learning that only does harm every stage is undone, the counts too."""
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 15, assignment="nearest", rate=1e-3)
    before = copy.deepcopy(model.state_dict())
    torchclust.distill_(model, teacher, inputs(), steps=3, lr=1e3)
    after = model.state_dict()
    priced = [key for key in before if "parametrizations" in key]
    assert any(key.endswith("members") for key in priced)
    assert all(torch.equal(before[key], after[key]) for key in priced)


def test_a_checkpoint_of_another_call_is_refused(tmp_path: Path) -> None:
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 5)
    file = tmp_path / "state.pt"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"is not one of distill_"):
        torchclust.distill_(model, teacher, inputs(), steps=1, checkpoint=file)
    torch.save({"arguments": "[1]"}, file)
    with pytest.raises(ValueError, match=r"was left by another call: it has \[1\]"):
        torchclust.distill_(model, teacher, inputs(), steps=1, checkpoint=file)


class Branched(nn.Module):
    """Functional steps between modules, one of them in place, and a module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.fourth = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.first(x)))
        z = self.third(y)
        z.relu_()
        return self.fourth(z)


def test_blocks_follow_the_data() -> None:
    model = network()
    convs = [model[0], model[3].body[0], model[3].body[6], model[7]]
    found = find_blocks(model, Call((inputs(),)), convs)
    assert [block.paths for block in found] == [("0", "1", "2"), ("3", "4", "5", "6"), ("7",)]
    assert [block.chained for block in found] == [False, True, True]
    branched = Branched()
    found = find_blocks(branched, Call((torch.randn(4, 6),)), list(branched.children()))
    assert [(block.paths, block.chained) for block in found] == [
        (("first",), False),
        (("third",), False),
        (("fourth",), False),
    ]


class Listed(nn.Module):
    """Layers in lists, which hold them and are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.up = nn.ModuleDict({"0": nn.Linear(4, 6), "1": nn.Linear(4, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for number, down in enumerate(self.down):
            x = x + self.up[str(number)](down(x).relu())
        return x


def test_items_of_lists_are_blocks() -> None:
    model = Listed()
    holders = [*model.down, *model.up.values()]
    found = find_blocks(model, Call((torch.randn(4, 6),)), holders)
    assert [block.paths for block in found] == [("down.0",), ("up.0",), ("down.1",), ("up.1",)]


def test_a_block_alone_gives_what_it_gives_in_the_model() -> None:
    model, call = Branched().eval(), Call((torch.randn(4, 6),))
    seen: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out.clone()}))
    with torch.no_grad():
        model(*call.args)
        kept = dict(seen)
        for block in find_blocks(model, call, list(model.children())):
            inside = block.input_of(model, call)
            assert torch.equal(block.run(model, inside), kept[block.paths[-1]])


def test_named_blocks() -> None:
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 5)
    start = gap(model, teacher)
    torchclust.distill_(model, teacher, inputs(), steps=20, lr=5e-3, blocks=["0", "3"])
    assert gap(model, teacher) < start
    with pytest.raises(ValueError, match=r"no module '33'; did you mean '3'"):
        torchclust.distill_(model, teacher, inputs(), steps=1, blocks=["33"])
    branched = Branched()
    teacher_of_branched = copy.deepcopy(branched)
    torchclust.cluster_(branched, 5)
    with pytest.raises(ValueError, match=r"'twice' runs 2 times in a forward pass"):
        torchclust.distill_(
            branched, teacher_of_branched, torch.randn(4, 6), steps=1, blocks=["twice"]
        )


def test_progress_is_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchclust.progress._PATIENCE", -1.0)
    teacher = network()
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown, raising=False)
        for progress in (True, False):
            model = torchclust.cluster_(copy.deepcopy(teacher), 5)
            torchclust.distill_(model, teacher, inputs(), steps=1, progress=progress)
            shown = "distilling" in capsys.readouterr().err.lower()
            assert shown == (terminal and progress)


def test_a_block_without_floating_point_outputs_is_refused() -> None:
    class Signs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0).long()

    teacher = nn.Sequential(nn.Linear(6, 40), nn.Sequential(nn.Linear(40, 40), Signs()))
    model = torchclust.cluster_(copy.deepcopy(teacher), 5)
    with pytest.raises(ValueError, match=r"gives no floating-point tensor; name other blocks"):
        torchclust.distill_(model, teacher, torch.randn(4, 6), steps=1, blocks=["1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": True}, "steps must be an int, got True"),
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"batches": []}, "there is no batch of inputs"),
        ({"teacher": nn.Linear(2, 2)}, "it has no module '0'"),
        ({"teacher": "itself"}, "the teacher shares parameters with the model"),
        ({"model": nn.Linear(2, 2)}, "nothing to distill: the model is not clustered"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    model = torchclust.cluster_(network(), 5)
    arguments = {"model": model, "teacher": network(), "batches": inputs(), **change}
    if change.get("teacher") == "itself":
        arguments["teacher"] = model
    steps, lr = arguments.pop("steps", 1), arguments.pop("lr", 1e-3)
    with pytest.raises((ValueError, TypeError), match=message):
        torchclust.distill_(*arguments.values(), steps=steps, lr=lr)


def test_rounded_activations_are_rounded_in_the_end_to_end_pass() -> None:
    activations = pytest.importorskip("torchclust.activations.quantized")
    model = network()
    teacher = copy.deepcopy(model)
    torchclust.cluster_(model, 5, codebook_dtype="int8", inputs=inputs())
    activations.quantize_activations_(model, inputs()[:8])
    start = gap(model, teacher)
    torchclust.distill_(model, teacher, inputs(), steps=30, lr=5e-3)
    assert gap(model, teacher) < 0.95 * start


def test_recipes_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune: {labels: false}` clusters to images, distills, and resumes; nothing is fitted."""
    monkeypatch.setattr(prepare, "load_data", fake_data)
    monkeypatch.setattr(stages, "STEPS_PER_EPOCH", 2)
    recipe = {
        "name": "unlabelled",
        "data": {"name": "mnist5k", "batch_size": 8},
        "model": "arm_mlp",
        "train": {"epochs": 1},
        "cluster": {"n_clusters": 8, "codebook_dtype": "int8", "assignment": "nearest"},
        "finetune": {"labels": False, "quantize_activations": True},
    }
    prepared = prepare.prepare(parse_recipe(recipe))
    calls_of = {"fit": 0, "distill_": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls_of[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(stages, "fit", counted("fit", stages.fit))
    monkeypatch.setattr(stages, "distill_", counted("distill_", stages.distill_))
    for _ in range(2):  # the second time every stage is read back
        found = stages.train_networks(prepared, kept.Stages(tmp_path, progress=False))
        assert calls_of == {"fit": 1, "distill_": 1}  # without labels the control is the model
        assert found.compressed is not None
        assert torchclust.is_clustered(found.compressed)
        assert found.accuracy["clustered"] is not None
