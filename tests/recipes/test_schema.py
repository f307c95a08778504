"""Recipes: what is accepted, what is refused and in which words, and every one that is shipped."""

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from fake_data import fake_data
from safetensors.torch import save_file

from torchclust import ClusterConfig, named_clusterings
from torchclust.cli.parser import parser
from torchclust.recipes import prepare as preparing
from torchclust.recipes.kept import Stages
from torchclust.recipes.load import load_recipe, override, parse_recipe
from torchclust.recipes.prepare import clustered_copy, load_checkpoint_, prepare
from torchclust.recipes.schema import ClusterSection, Recipe, RecipeError
from torchclust.recipes.stages import train_networks

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/mlperf_tiny/*.yaml")])
SHIPPED = {
    *("mnist_cnn", "mnist_convnet", "fashion_cnn", "lenet_300_100", "lenet_5", "arm_mlp"),
    *("kws_ds_cnn_l", "mobilenet_v1", "mobilenet_v1_fashion", "mobilenet_v2"),
    *("mobilenet_v2_fashion", "kws", "kws_fine_tuned", "vww", "ic"),
    *("ic_label_free", "ad", "sww", "mnist_cnn_small", "fashion_cnn_pruned"),
}
OF_MODULES = {"ad"}  # with a data set of their own: test_toy_car.py
BASE = """
name: test
data: {name: mnist5k, batch_size: 32}
model: {name: seed_cnn, batch_norm: false}
train: {epochs: 1, lr: 1e-3}
cluster: {n_clusters: 16, rules: {"conv1.weight": null, Linear: {n_clusters: 4}}}
finetune: {epochs: 1}
export: {calibration_samples: 20}
vela: {accelerator: ethos-u55-128}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(BASE)
    return path


def test_every_field_arrives(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.train.lr == 1e-3
    assert recipe.model.arguments == {"batch_norm": False}
    assert recipe.cluster.all_rules == {
        "*": 16,
        "conv1.weight": None,
        "Linear": {"n_clusters": 4},
    }
    assert recipe.prune is None
    assert recipe.finetune.lr_scale == 0.1
    assert parse_recipe(recipe.to_dict()) == recipe


def test_a_report_is_a_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    report = tmp_path / "report.json"
    report.write_text(yaml.safe_dump({"accuracy": {}, "recipe": recipe.to_dict()}))
    assert load_recipe(report) == recipe


def test_cluster_section_is_cluster_config() -> None:
    """The section repeats ClusterConfig's fields for the reference; they must not drift apart."""
    fields = {f.name: f.default for f in dataclasses.fields(ClusterConfig)}
    section = {name: f.default for name, f in ClusterSection.model_fields.items()}
    for key in ("rules", "budget", "max_accuracy_drop", "inputs"):
        section.pop(key)
    assert section == fields
    annotations = {f.name: f.type for f in dataclasses.fields(ClusterConfig)}
    assert set(annotations) == set(section)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clster.n_clusters=8", r"test\.yaml: unknown key clster; did you mean 'cluster'\?"),
        ("cluster.n_cluster=8", "unknown key cluster.n_cluster; did you mean 'n_clusters'"),
        ("export.xyz=8", "unknown key export.xyz; valid: calibration_samples"),
        ("cluster.n_clusters=1", "cluster: n_clusters must be between 2 and 256, got 1"),
        ("cluster.n_clusters=8.5", "cluster.n_clusters: should be a valid integer, got 8.5"),
        ("train.epochs=six", "train.epochs: should be a valid integer, got 'six'"),
        ("train.epochs='6'", "train.epochs: should be a valid integer, got '6'"),
        ("train.epochs=true", "train.epochs: should be a valid integer, got True"),
        ("train.lr=-1", "train.lr: should be greater than 0, got -1"),
        ("train.lr=0", "train.lr: should be greater than 0"),
        ("prune.sparsity=1", "prune.sparsity: should be less than 1, got 1"),
        ("cluster.init=linaer", "cluster.init: should be 'optimal', 'linear'.*got 'linaer'"),
        ("cluster.rules=8", "cluster.rules: should be a mapping.*got 8"),
        ("cluster.rules={a: b}", "rule 'a' is a number of clusters, a mapping or null, got 'b'"),
        ("cluster.rules={a: true}", "rule 'a' is a number of clusters"),
        ("cluster.rules={a: 1}", "rule 'a': n_clusters must be between 2 and 256, got 1"),
        ("cluster.rules={a: {inti: 1}}", r"unknown key rules\.a\.inti; did you mean 'init'"),
        ("vela=ethos-u55-128", r"vela: should be a mapping, as in vela: \{key: value\}"),
        ("tflm={max_arena: 0}", "tflm.max_arena: should be greater than or equal to 1, got 0"),
        ("export=null", "vela needs the section export, which is absent"),
        ("cluster=null", "finetune needs the section cluster, which is absent"),
        ("train=null", r"nothing trains the model: add train: \{epochs: 6\}"),
        ("model.target=a.B", "give either name .* or target"),
        ("name=a/b", "name: should match pattern"),
        ("name=null", "the key name is missing"),
        ("data=null", "the key data is missing"),
        ("data=[]", "data: should be a mapping"),
        ("train.epochs=null", "the key train.epochs is missing"),
        ("seed=-1", "seed: should be greater than or equal to 0"),
        ("nothing", "--set nothing: expected key=value"),
        ("=8", "--set =8: expected key=value"),
        ("train..epochs=8", "expected key=value"),
        ("train.epochs.x=8", "--set train.epochs.x=8: epochs is 1, which has no keys"),
        ("cluster.rules={a: [}", "--set cluster.rules=.*: line 1, column"),
        ("prune={sparsity: .5}", "prune needs cluster.preserve_sparsity: true"),
        ("finetune.distillation_weight=2", "distillation_weight: should be less than or equal"),
        ("finetune={distillation_weight: .5, labels: false}", "goes with labels: without them"),
    ],
)
def test_refused_with_one_line(file: Path, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(file, [setting])
    assert "\n" not in str(raised.value)


def test_null_is_the_default(file: Path) -> None:
    keys = ("train.lr", "finetune.lr_scale", "seed", "trainer", "data.root", "cluster.rate")
    assert load_recipe(file, [f"{key}=null" for key in keys]) == load_recipe(file)
    told = load_recipe(file, ["model.width=null"])  # of an argument it is a value like others
    assert told.model.arguments == {"batch_norm": False, "width": None}
    assert parse_recipe(told.to_dict()) == told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a recipe: it holds no 'key: value' lines"),
        ("- a", "is not a recipe"),
        ("a: [1", "is not a YAML file: line 1, column"),
        ("name: a\nname: b", "line 2, column 1: the key 'name' is there twice"),
        ("name: a", "the key data is missing"),
        ("\0", "is not a YAML file"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)
    with pytest.raises(RecipeError, match=r"cannot read /.*none: No such file"):
        load_recipe(tmp_path / "none")
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="is not a YAML file"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data=b", {"data": {"name": "b", "root": "r"}, "model": "m"}),
        ("data.name=b", {"data": {"name": "b", "root": "r"}, "model": "m"}),
        ("data={name: b}", {"data": {"name": "b"}, "model": "m"}),
        ("model=b", {"data": {"name": "a", "root": "r"}, "model": "b"}),
        ("model.width=0.5", {"data": {"name": "a", "root": "r"},
                             "model": {"name": "m", "width": 0.5}}),
        ("train.lr=1e-4", {"data": {"name": "a", "root": "r"}, "model": "m",
                           "train": {"lr": 1e-4}}),
        ("data=null", {"data": None, "model": "m"}),
    ],
)  # fmt: skip
def test_override(setting: str, expected: dict) -> None:
    content = {"data": {"name": "a", "root": "r"}, "model": "m"}
    override(content, setting)
    assert content == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model=seed_cn", "model.name: no network 'seed_cn'; did you mean 'seed_cnn'"),
        ("model.batchnorm=true", "unknown key model.batchnorm: seed_cnn takes no such argument; "
                                 "did you mean 'batch_norm'"),
        ("model=arm_mlp", "unknown key model.batch_norm: arm_mlp takes no arguments"),
        ("data=mnist4k", "data.name: no data set 'mnist4k'; did you mean"),
        ("data.root=/tmp", "unknown key data.root: mnist5k takes no arguments"),
        ("vela.accelerator=u55", "vela.accelerator: no 'u55'"),
        ("vela.config=none.ini", "vela.config: cannot read /.*/none.ini: No such file"),
        ("vela.memory_mode=Sram_only", "vela: .* no 'Sram_only': .*; did you mean 'Sram_Only'"),
        ("vela.system_config=Ethos_U55_Deep", "vela: .* did you mean 'Ethos_U55_Deep_Embedded'"),
        ("executorch={memory_mode: Sram_only}", "executorch: .* did you mean 'Sram_Only'"),
        ("cluster.rules={stem.*: 3}", r"cluster: rule 'stem\.\*' matches no parameter"),
        ("cluster.rules={conv1.bias: 64}", "cluster: cannot cluster 'conv1.bias'"),
        ("model={target: nowhere.Net}", "model.target: cannot import 'nowhere.Net'"),
        ("model={target: torch.nn.Nothing}", "cannot import 'torch.nn.Nothing'"),
        ("model={target: Net}", "cannot import 'Net'"),
        ("model={target: torch.pi}", "torch.pi is 3.14.*, which can not be called"),
        ("model={target: os.getcwd}", "os.getcwd makes '.*', which is no torch.nn.Module"),
        ("model={target: torch.nn.Linear}", "torch.nn.Linear needs model.in_features:  --set"),
        ("model={target: torch.nn.Conv2d, in_channels: 1, out_channels: 1, kernel_size: 0, "
         "padding: same, stride: 2}", "torch.nn.Conv2d can not be built: .*strided"),
        ("data=image_folder", "image_folder needs data.root:  --set data.root="),
        ("model={target: torch.nn.Linear, in_feature: 3}", "unknown key model.in_feature: .*"
                                                           "did you mean 'in_features'"),
        ("model={target: torch.nn.Linear, in_features: 28, out_features: 10}",
         r"maps \(1, 1, 28, 28\) to \(1, 1, 28, 10\); the data need \(1, 10\) logits"),
        ("model={target: torch.nn.Linear, in_features: 20, out_features: 10}",
         r"torch.nn.Linear does not take images of \(1, 1, 28, 28\)"),
        ("model.checkpoint=/nowhere.pt", "model.checkpoint: cannot read /nowhere.pt"),
    ],
)  # fmt: skip
def test_prepare_refuses(file: Path, setting: str, message: str, monkeypatch) -> None:
    if "data" not in setting:
        monkeypatch.setattr(preparing, "load_data", fake_data)
    with pytest.raises(RecipeError, match=message) as raised:
        prepare(load_recipe(file, [setting]))
    assert "\n" not in str(raised.value)


def test_prepare_is_seeded_and_checks_on_a_copy(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    first, again = (prepare(load_recipe(file)).model for _ in range(2))
    other = prepare(load_recipe(file, ["seed=1"])).model
    assert list(named_clusterings(first)) == []
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_the_check_leaves_every_module_its_mode(file: Path, monkeypatch) -> None:
    """A norm that the user froze is not one that trains."""
    monkeypatch.setattr(preparing, "load_data", fake_data)

    class Frozen(torch.nn.Sequential):
        def __init__(self) -> None:
            norm = torch.nn.BatchNorm2d(1).eval()
            super().__init__(norm, torch.nn.Flatten(), torch.nn.Linear(784, 10))

    monkeypatch.setattr(torch.nn, "Frozen", Frozen, raising=False)
    settings = ["model={target: torch.nn.Frozen}", "cluster={n_clusters: 4}", "train={epochs: 1}"]
    model = prepare(load_recipe(file, settings)).model
    assert [layer.training for layer in model] == [False, True, True]


@pytest.mark.parametrize("kind", ["plain", "clustered", "lightning"])
def test_checkpoints(file: Path, tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    recipe = load_recipe(file)
    saved = prepare(load_recipe(file, ["seed=1"])).model
    if kind == "clustered":
        saved = clustered_copy(recipe, saved)
    state = saved.state_dict()
    if kind == "lightning":
        state = {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "c.pt")
    loaded = prepare(load_recipe(file, [f"model.checkpoint={tmp_path / 'c.pt'}", "cluster=null",
                                        "finetune=null", "train=null"])).model  # fmt: skip
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded.eval()(x), saved.eval()(x))


def test_checkpoints_may_be_safetensors(tmp_path: Path) -> None:
    saved, file = torch.nn.Linear(3, 2), tmp_path / "net.safetensors"
    save_file(saved.state_dict(), file)
    assert torch.equal(load_checkpoint_(torch.nn.Linear(3, 2), file).weight, saved.weight)
    file.write_bytes(b"damaged")
    with pytest.raises(RecipeError, match=r"checkpoint: cannot read .*net\.safetensors"):
        load_checkpoint_(torch.nn.Linear(3, 2), file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0.weight": torch.zeros(3)}, "does not fit the model: "),
        ([1, 2], "holds a list, no state dict"),
        (
            torch.nn.Linear(2, 2),
            r"c\.pt is no checkpoint that loads without running code; write one with torch\.save\(",
        ),
    ],
)
def test_checkpoints_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(RecipeError, match=message) as raised:
        load_checkpoint_(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "c.pt")
    assert not {"\n", "\033"} & set(str(raised.value))


def test_names_of_tensors_have_dots_and_settings_too(file: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"in braces: +--set 'cluster\.rules={net\.1\.weight: 32}'"
    ):
        load_recipe(file, ["cluster.rules.net.1.weight=32"])
    assert load_recipe(file, ["cluster.rules.Linear=8"]).cluster.rules["Linear"] == 8
    nested = load_recipe(file, ["cluster.rules.Linear.n_clusters=8"]).cluster.rules
    assert nested["Linear"] == {"n_clusters": 8}
    braces = load_recipe(file, ["cluster.rules={net.1.weight: 32}"]).cluster.rules
    assert braces == {"net.1.weight": 32}


def test_every_recipe_is_known() -> None:
    assert {path.stem for path in RECIPES} == SHIPPED


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem not in OF_MODULES], ids=lambda path: path.stem
)
def test_shipped_recipes_run(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Every recipe loads, says how to run it, and takes a few training steps on noise."""
    monkeypatch.setattr(preparing, "load_data", fake_data)
    header = path.read_text().partition("\nname:")[0]
    assert f"torchclust run {path.relative_to(ROOT)}" in header
    assert all(line.startswith("#") for line in header.splitlines())
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    content = recipe.to_dict()
    for section in ("train", "finetune", "prune"):
        if section in content:
            content[section]["epochs"] = min(1, content[section]["epochs"])
    if "image_size" in content["data"]:  # for ImageNet: narrow networks on small images
        content["data"]["image_size"] = 32
        content["model"]["width"] = 0.25
    if content["model"].pop("checkpoint", None):
        content["train"] = {"epochs": 0}
    networks = train_networks(prepare(parse_recipe(content)), Stages(tmp_path, progress=False))
    if recipe.cluster is not None:
        clusterings = dict(named_clusterings(networks.compressed))
        assert clusterings
        for name, clustering in clusterings.items():
            assert len(clustering.indices.unique()) <= clustering.n_clusters, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_commands_in_headers_are_valid(path: Path, monkeypatch) -> None:
    """What a header says to type is what the command line takes, and its settings fit."""
    monkeypatch.chdir(ROOT)
    text = path.read_text().partition("\nname:")[0].replace("\\\n#", "")
    lines = [line.lstrip("# ").partition("    ")[0] for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("torchclust ")]
    assert commands
    for _, *words in commands:
        arguments = parser().parse_args(words)
        if arguments.command == "run":
            load_recipe(arguments.recipe, arguments.settings)
        elif arguments.command == "sweep":
            load_recipe(arguments.recipe)


def test_recipe_reference_describes_every_key() -> None:
    """docs are generated from the schema, so every key has a description."""
    for section in Recipe.model_fields.values():
        for candidate in getattr(section.annotation, "__args__", (section.annotation,)):
            for name, field in getattr(candidate, "model_fields", {}).items():
                assert field.description, f"{candidate.__name__}.{name}"
