"""Choosing numbers of clusters: what is measured, what is chosen, and that it repeats as rules."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from fake_data import fake_data
from torch import nn

import torchclust
from torchclust import ClusterConfig, cluster_, named_clusterings, save_packed
from torchclust.allocation.encoded_size import (
    encoded_bytes,
    entropy_bytes,
    vela_bytes,
)
from torchclust.allocation.knapsack import Choice
from torchclust.allocation.sensitivity import CANDIDATES, candidates
from torchclust.export.lookup_tables import OVERHEAD
from torchclust.recipes import prepare as preparing
from torchclust.recipes.chip import codebooks_of, measure_of, table_bytes, ways
from torchclust.recipes.choice import (
    _within_budget,
    _within_drop,
    curves_of,
    tensor_configs,
)
from torchclust.recipes.cluster_section import ClusterSection
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import load_recipe, parse_recipe
from torchclust.recipes.prepare import prepare
from torchclust.recipes.run import run_recipe
from torchclust.recipes.schema import RecipeError
from torchclust.recipes.stages import train_networks

SMALL = {
    "name": "small",
    "data": {"name": "mnist5k", "batch_size": 8},
    "model": "arm_mlp",
    "train": {"epochs": 2},
    "cluster": {"budget": 40.0, "assignment": "nearest"},
    "finetune": {"epochs": 1, "lr_scale": 0.5},
}
NAMES = ["1.weight", "3.weight", "5.weight"]


@pytest.fixture(autouse=True)
def _noise(monkeypatch) -> None:
    """Train on noise, and try fewer numbers of clusters."""
    monkeypatch.setattr(preparing, "load_data", fake_data)
    monkeypatch.setattr("torchclust.allocation.sensitivity.CANDIDATES", (2, 4, 8, 32))


def with_cluster(**section) -> dict:
    return {**SMALL, "cluster": section}


def test_what_rules_fix_is_not_free() -> None:
    rules = {"1.weight": {"init": "linear"}, "3.weight": 3, "5.weight": None}
    recipe = parse_recipe(with_cluster(budget=40.0, codebook_dtype="int8", rules=rules))
    configs, free = tensor_configs(recipe, prepare(recipe).model)
    assert free == {"1.weight"}
    assert configs["3.weight"] == ClusterConfig(3, codebook_dtype="int8")
    assert configs["1.weight"].init == "linear"
    assert set(configs) == {"1.weight", "3.weight"}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_curves_are_the_divergence_and_the_bytes_of_one_tensor_alone(dtype: str) -> None:
    rules = {"3.weight": 5, "5.weight": None}
    recipe = parse_recipe(with_cluster(budget=1.0, codebook_dtype=dtype, rules=rules))
    model = prepare(recipe).model
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(30, 1, 28, 28)
    curves = curves_of(recipe, model, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    tried = [4, 8, 32] if dtype == "int8" else [2, 4, 8, 32]
    assert [c.n_clusters for c in curves["1.weight"]] == tried
    assert [c.n_clusters for c in curves["3.weight"]] == [5]
    assert curves["5.weight"] == [Choice(None, 4 * 640, 0.0)]
    expected = nn.functional.softmax(model(images), 1)
    for name, choice in ((n, c) for n in NAMES[:2] for c in curves[n]):
        config = ClusterConfig(choice.n_clusters, codebook_dtype=dtype, assignment="fixed")
        alone = cluster_(copy.deepcopy(model), {name: config})
        found = nn.functional.softmax(alone(images), 1)
        divergence = (expected * (expected / found).log()).sum(1).mean().item()
        assert choice.loss == pytest.approx(divergence, rel=1e-2, abs=1e-6)
        (_, clustering), *_ = named_clusterings(alone)
        assert choice.n_bytes == entropy_bytes(clustering.module.weight, clustering)
    losses = [choice.loss for choice in curves["1.weight"]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("k", [3, 16, 100])
def test_entropy_bytes_are_those_of_a_packed_file(tmp_path: Path, dtype: str, k: int) -> None:
    model = cluster_(nn.Linear(300, 200), k, codebook_dtype=dtype)
    packed = save_packed(model, tmp_path / "m.packed").rows
    for row in packed:
        counted = encoded_bytes(model, entropy_bytes, [row.name])[row.name]
        least = 0.95 if row.name == "weight" else 0.75  # the highest bytes of floats deflate
        assert least * counted <= row.bytes <= 1.02 * counted + 256


def test_vela_bytes_are_those_of_the_compiler(tmp_path: Path) -> None:
    from torchclust.export import to_tflite, vela

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 36, 64),
                          nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))  # fmt: skip
    rules = {
        "0.weight": {"codebook_dtype": "int8", "n_clusters": 16},
        "3.weight": {"codebook_dtype": "int8", "n_clusters": 6},
        "5.weight": 8,
    }
    cluster_(model, rules)
    images = torch.randn(8, 16, 8, 8)
    to_tflite(model.eval(), images[:1], tmp_path / "m.tflite", calibration=[images])
    report = vela(tmp_path / "m.tflite")
    counted = encoded_bytes(model, vela_bytes, [f"{i}.weight" for i in (0, 3, 5, 7)])
    assert len(counted) == 4
    counted = sum(counted.values())
    assert counted == pytest.approx(report.encoded_weight_bytes, rel=0.03)


def test_table_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    """Fixed-width indices: what `tflm` reports of each tensor, and what the file shrinks by."""
    from torchclust.export import tflm, to_tflite

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.ReLU()).eval()
    cluster_(model, {"0.weight": 16, "2.weight": 4}, codebook_dtype="int8")
    images = torch.randn(4, 8, 7, 7)
    to_tflite(model, images[:1], tmp_path / "m.tflite", calibration=[images])
    report = tflm(tmp_path / "m.tflite", tmp_path / "t.tflite")
    counted = encoded_bytes(model, table_bytes, ["0.weight", "2.weight"])
    assert [n - OVERHEAD for n in counted.values()] == [row.bytes_after for row in report.rows]
    plain = sum(row.bytes_before for row in report.rows)
    saved = report.flash_before - report.flash_after
    assert saved >= plain - sum(counted.values()) - 64  # and the names of tensors
    assert table_bytes(torch.randn(4, 4), None) == 16
    assert table_bytes(torch.randn(400, 40), None) == 16000


def test_vela_bytes_hold_where_training_brought_two_codes_together() -> None:
    codec = pytest.importorskip("ethosu.mlw_codec")
    torch.manual_seed(0)
    model = cluster_(nn.Linear(64, 64), 32, codebook_dtype="int8", assignment="nearest")
    (_, clustering), *_ = named_clusterings(model)
    with torch.no_grad():
        clustering.centroids[1::2] = clustering.centroids[::2][: len(clustering.centroids) // 2]
    codes = (model.weight / clustering.scale[:, None]).round().int()
    assert len(clustering.codes) < 31
    assert set(codes.unique().tolist()) <= set(clustering.codes.tolist())
    expected = len(codec.encode(codes.flatten().tolist()))
    assert encoded_bytes(model, vela_bytes, ["weight"]) == {"weight": math.ceil(1.0125 * expected)}


def test_candidates_fit_the_configuration_and_the_tensor(monkeypatch) -> None:
    monkeypatch.undo()
    plain, sparse = ClusterConfig(), ClusterConfig(preserve_sparsity=True)
    assert [c.n_clusters for c in candidates(plain, 10**6)] == list(CANDIDATES)
    assert [c.n_clusters for c in candidates(plain, 12)] == [2, 4, 6, 8]
    assert [c.n_clusters for c in candidates(sparse, 12)] == [4, 6, 8]
    assert all(c.preserve_sparsity for c in candidates(sparse, 12))
    assert candidates(ClusterConfig(codebook_dtype="int8"), 4) == []


CURVES = {
    "big": [Choice(4, 70_000, 0.9), Choice(8, 100_000, 0.3), Choice(16, 140_000, 0.1)],
    "small": [Choice(4, 500, 0.8), Choice(16, 900, 0.2), Choice(64, 1_700, 0.05)],
}


class Sections:
    """Stands for a recipe's sections, and for what fine-tuning makes of the bytes."""

    def __init__(self, shrink: dict[tuple[str, int], float]) -> None:
        self.shrink, self.trained = shrink, []

    def of(self, allocation):
        return dict(allocation)

    def sizes(self, section) -> dict[str, int]:
        self.trained.append(tuple(c.n_clusters for c in section.values()))
        return {n: self.size(n, c.n_clusters) for n, c in section.items()}

    def size(self, name: str, k: int) -> int:
        bytes_of = {c.n_clusters: c.n_bytes for c in CURVES[name]}
        return round(bytes_of[k] * self.shrink.get((name, k), 1))


@pytest.mark.parametrize("ratio", [0.8, 0.9, 1.0, 1.15])
@pytest.mark.parametrize("budget", [60, 70, 75, 90, 99, 100, 110, 125, 130, 140, 200])
def test_a_budget_is_used_after_finetuning_and_never_exceeded(ratio: float, budget: int) -> None:
    """Fine-tuning changes all bytes by one ratio: the correction then finds the best choice."""
    keys = [(name, c.n_clusters) for name in CURVES for c in CURVES[name]]
    truth = Sections(dict.fromkeys(keys, ratio))
    combinations = [
        (sum(truth.size(n, c.n_clusters) for n, c in zip(CURVES, cs, strict=True)),
         sum(c.loss for c in cs))
        for cs in itertools.product(*CURVES.values())
    ]  # fmt: skip
    possible = [found for found in combinations if found[0] <= budget * 1024]
    if budget * 1024 < 70_500 or not possible:
        least = 70_500 * (ratio if budget * 1024 >= 70_500 else 1) / 1024
        with pytest.raises(RecipeError, match=rf"least possible is {least:.1f}:  --set cluster.bu"):
            _within_budget(budget, CURVES, truth.of, truth.sizes)
        assert len(truth.trained) == (budget * 1024 >= 70_500)
        return
    chosen = _within_budget(budget, CURVES, truth.of, truth.sizes)
    assert chosen.loss <= min(loss for _, loss in possible) / 0.9
    assert chosen.n_bytes == sum(truth.size(n, c.n_clusters) for n, c in chosen.allocation.items())
    assert chosen.n_bytes <= budget * 1024
    assert len(set(truth.trained)) == len(truth.trained) <= 3
    assert ratio != 1 or len(truth.trained) == (1 if budget not in (99, 100) else 2)


def test_a_budget_holds_where_tensors_shrink_differently() -> None:
    truth = Sections({("big", 8): 0.8, ("big", 16): 0.95})
    chosen = _within_budget(125, CURVES, truth.of, truth.sizes)
    assert chosen.n_bytes <= 125 * 1024
    assert len(truth.trained) > 1


@pytest.mark.parametrize("most", [0.3, 0.7, 1.2, 5.0])
def test_the_smallest_within_a_drop(most: float) -> None:
    def lost(section) -> float:
        return sum(choice.loss for choice in section.values())

    sizes = [
        sum(c.n_bytes for c in cs)
        for cs in itertools.product(*CURVES.values())
        if sum(c.loss for c in cs) <= most
    ]
    chosen = _within_drop(most, CURVES, lambda a: dict(a), lost)
    assert chosen.loss <= most
    assert chosen.n_bytes == min(sizes)


def test_a_drop_that_can_not_be_kept_names_the_least() -> None:
    with pytest.raises(RecipeError, match=r"already lose 3\.14 points .*more than 1:  .*=3\.15"):
        _within_drop(1.0, CURVES, lambda a: dict(a), lambda section: 3.1416)


@pytest.mark.parametrize(
    "section",
    [
        {"budget": 40.0, "assignment": "nearest"},
        {"budget": 30.0, "codebook_dtype": "int8", "rules": {"1.weight": {"init": "linear"}}},
        {"max_accuracy_drop": 20.0, "rules": {"5.weight": None}},
        {"budget": 20.0, "preserve_sparsity": True},
    ],
    ids=["budget", "int8", "drop", "pruned"],
)
def test_what_was_chosen_runs_again_as_rules(tmp_path: Path, section: dict) -> None:
    """chosen.yaml is the same run: it finds every stage done, and the same bytes."""
    content = with_cluster(**section)
    if "preserve_sparsity" in section:
        content["prune"] = {"sparsity": 0.8}
    report = run_recipe(parse_recipe(content), tmp_path / "a", progress=False)
    chosen = report["chosen"]
    if "budget" in section:
        assert chosen["encoded_bytes"] <= section["budget"] * 1024
        assert len({t["n_clusters"] for t in chosen["tensors"].values()}) > 1
    again = load_recipe(tmp_path / "a" / "chosen.yaml")
    assert not again.cluster.chooses
    assert again.cluster.rules == chosen["rules"]
    said = []
    repeated = run_recipe(
        again,
        tmp_path / "b",
        stage_folder=tmp_path / "a" / "stages",
        say=said.append,
        progress=False,
    )
    assert all(line.endswith(": done before") for line in said)
    assert repeated["chosen"] is None
    same = ("accuracy", "bytes", "tensors")
    assert [repeated[key] for key in same] == [report[key] for key in same]
    counted = {t["name"]: t["n_clusters"] for t in report["tensors"] if len(t["shape"]) > 1}
    assert counted == {name: t["n_clusters"] for name, t in chosen["tensors"].items()}
    text = (tmp_path / "a" / "report.md").read_text()
    assert f"rules: {json.dumps(chosen['rules'])}" in text
    assert load_recipe(tmp_path / "a" / "report.json") == parse_recipe(content)


def test_another_budget_measures_nothing_anew(tmp_path: Path) -> None:
    said = []
    for budget in (40.0, 60.0):
        recipe = parse_recipe(with_cluster(budget=budget))
        train_networks(prepare(recipe), Stages(tmp_path, said.append, progress=False))
    assert said.count("sensitivity ...") == said.count("sensitivity: done before") == 1


TABLES = {"export": {}, "tflm": {}}


def test_lookup_tables_have_both_codebooks_to_choose_from() -> None:
    """Bytes are the same but for the empty place, so that the loss alone decides between them."""
    model = prepare(parse_recipe(with_cluster(budget=30.0))).model
    recipe = parse_recipe({**with_cluster(budget=30.0, rules={"3.weight": 5}), **TABLES})
    curves = curves_of(recipe, model, torch.rand(30, 1, 28, 28))
    sizes = {(c.codebook_dtype, c.n_clusters): c.n_bytes for c in curves["1.weight"]}
    assert set(sizes) == {*itertools.product(["float32", "int8"], [4, 8, 32]), ("float32", 2)}
    assert all(abs(sizes["float32", k] - sizes["int8", k]) <= 1 for k in (4, 8, 32))
    assert [(c.n_clusters, c.codebook_dtype) for c in curves["3.weight"]] == [(5, "float32")]


def test_a_budget_for_lookup_tables_mixes_codebooks(tmp_path: Path) -> None:
    recipe = parse_recipe({**with_cluster(budget=30.0), **TABLES})
    networks = train_networks(prepare(recipe), Stages(tmp_path, progress=False))
    chosen, found = networks.chosen, dict(named_clusterings(networks.compressed))
    assert chosen.n_bytes <= 30 * 1024
    for name, one in chosen.allocation.items():
        config = found[name].config
        assert (config.n_clusters, config.codebook_dtype) == (one.n_clusters, one.codebook_dtype)
    assert {one.codebook_dtype for one in chosen.allocation.values()} == {"float32", "int8"}


def test_a_codebook_that_is_named_is_the_only_one() -> None:
    free, default = with_cluster(budget=30.0), ClusterConfig()
    named = with_cluster(budget=30.0, codebook_dtype="float32")
    ruled = with_cluster(budget=30.0, rules={"1.weight": {"codebook_dtype": "int8"}})
    kinds = [codebooks_of(parse_recipe({**c, **TABLES})) for c in (free, named, ruled)]
    assert kinds == [("float32", "int8"), ("float32",), ("float32",)]
    assert codebooks_of(parse_recipe({**free, **TABLES, "vela": {}})) == ("float32",)
    for content, config in (
        (ruled, ClusterConfig(codebook_dtype="int8")),
        (free, ClusterConfig(granularity="channel")),
    ):
        tried = ways(parse_recipe({**content, **TABLES}), config, 1000)
        assert {way.codebook_dtype for way in tried} == {config.codebook_dtype}
    assert ways(parse_recipe(free), default, 1000) == candidates(default, 1000)
    for content in (free, named):
        recipe = parse_recipe({**content, **TABLES})
        again = parse_recipe(recipe.to_dict())
        assert codebooks_of(again) == codebooks_of(recipe)


def test_a_budget_too_small_says_what_is_possible(tmp_path: Path) -> None:
    recipe = parse_recipe(with_cluster(budget=2.0))
    with pytest.raises(RecipeError, match="2 KiB do not hold the weights; the least possible is"):
        train_networks(prepare(recipe), Stages(tmp_path, progress=False))


def test_labels_are_not_read_for_a_budget(tmp_path: Path, monkeypatch) -> None:
    recipe = parse_recipe({**with_cluster(budget=40.0), "finetune": {"labels": False}})
    prepared = prepare(recipe)
    trained = Stages(tmp_path, progress=False)
    monkeypatch.setattr("torchclust.recipes.stages.STEPS_PER_EPOCH", 2)
    first = train_networks(prepared, trained).chosen
    for file in tmp_path.glob("*.pt"):
        if not file.name.startswith(("train", "control")):
            file.unlink()
    prepared.task.make_data().train_dataloader().dataset.labels[:] = 0
    assert train_networks(prepared, trained).chosen == first


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"budget": 8, "max_accuracy_drop": 1}, r"either budget \(8\) or max_accuracy_drop \(1\)"),
        (
            {"budget": 8, "n_clusters": 9, "rate": 0.1},
            r"chooses the rate where .* rate \(0.1\) out",
        ),
        ({"max_accuracy_drop": 1, "n_clusters": 4}, "max_accuracy_drop chooses n_clusters"),
        ({"budget": 0}, "cluster.budget: should be greater than 0, got 0"),
        ({"budget": "8 KiB"}, "cluster.budget: should be a valid number, got '8 KiB'"),
        ({"max_accuracy_drop": -1}, "max_accuracy_drop: should be greater than 0"),
    ],
)
def test_refused(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(with_cluster(**section))


def test_accuracies_need_labels() -> None:
    content = {**with_cluster(max_accuracy_drop=1.0), "finetune": {"labels": False}}
    with pytest.raises(RecipeError, match="max_accuracy_drop needs labels: give"):
        parse_recipe(content)


def test_n_clusters_is_taken_out_by_null(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(with_cluster(n_clusters=8)))
    recipe = load_recipe(file, ["cluster.n_clusters=null", "cluster.budget=40"])
    assert recipe.cluster.budget == 40
    assert parse_recipe(recipe.to_dict()) == recipe
    assert load_recipe(file, ["cluster.n_clusters=null"]).cluster.n_clusters == 16


def test_a_rule_of_other_fields_keeps_the_sections_number() -> None:
    rules = {"3.weight": {"init": "linear"}}
    recipe = parse_recipe(with_cluster(n_clusters=5, rules=rules))
    model = preparing.clustered_copy(recipe, prepare(recipe).model)
    found = {name: c.config for name, c in named_clusterings(model)}
    assert {config.n_clusters for config in found.values()} == {5}
    assert found["3.weight"].init == "linear"
    assert torchclust.is_clustered(model)
    assert measure_of(recipe) is entropy_bytes


def test_chosen_rules_come_after_the_users_own_whatever_their_order() -> None:
    """A key that stays in its old place would be outweighed by a pattern after it."""
    chosen = {"a.weight": {"n_clusters": 6}, "b.weight": {"n_clusters": 12}}
    for own in (
        {"a.weight": {"init": "linear"}, "Linear": {"max_iter": 10}},
        {"Linear": {"max_iter": 10}, "a.weight": {"init": "linear"}},
    ):
        section = ClusterSection(budget=1.0, rules=own).with_rules(chosen)
        assert list(section.rules) == ["Linear", "a.weight", "b.weight"]
        assert section.rules["a.weight"] == {"n_clusters": 6}
