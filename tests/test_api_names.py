"""The public names and signatures are the contract's, and what goes beyond it is listed with why.

The contract is a page that lies beside a development checkout (``../shared/API.md``). Users do not
have it, so its names stand here too, and where the page is there, it is compared with them.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest

import torchclust
from torchclust.cli import parser as cli

PAGE = Path(__file__).parents[2] / "shared/API.md"

SIGNATURES = {
    "torchclust": """
        fit_codebook(values, n_clusters, *, init="optimal", max_iter=300, importance=None,
                     preserve_sparsity=False, rate=0.0, seed=0)
        cluster_(model, rules=16, *, importance=None, inputs=None, strict=True, seed=0, **options)
        named_clusterings(model)
        is_clustered(module, tensor_name=None)
        strip_(model, *, validate=True)
        refit_(model)
        restore_(model, state_dict)
        fisher_information(model, batches, loss_fn)
        distill_(model, teacher, batches, *, steps, lr, progress=True)
        summary(model)
        save_packed(model, path)
        load_packed_(model, path)
    """,
    "torchclust.lightning": """
        WeightClustering(rules=16, *, lr_scale=0.1, start_epoch=0, strip=True,
                         log_histograms=False, **options)
    """,
    "torchclust.export": """
        to_tflite(model, example_inputs, path, *, calibration, channels_last=True, float=False)
        inspect_tflite(path)
        vela(path, *, accelerator="ethos-u55-128", ...)
        verify_compiled(compiled, original)
        to_pte(model, example_inputs, path, *, calibration, target="ethos-u55-128", ...)
        tflm(path, output, *, ...)
        board_kit(path, folder)
    """,
}
CLASSES = {
    "torchclust": {"Codebook", "ClusterConfig", "Clustering", "Summary", "PackedSize",
                   "PackedFileError"},
    "torchclust.lightning": {"WeightClustering"},
    "torchclust.export": {"TFLiteExport", "VelaReport", "PTEExport", "TFLMReport"},
}  # fmt: skip
ATTRIBUTES = {
    "torchclust.Codebook": ("centroids", "indices", "inertia"),
    "torchclust.ClusterConfig": ("n_clusters", "codebook_dtype", "init", "max_iter", "granularity",
                                 "group_size", "assignment", "gradient", "preserve_sparsity",
                                 "rate"),
    "torchclust.Clustering": ("config", "centroids", "indices", "scale", "n_clusters", "module",
                              "tensor_name"),
    "torchclust.Summary": ("rows", "to_dict", "plot"),
}  # fmt: skip
COMMANDS = {"run", "check", "report", "export", "vela", "new", "kit"}

# What the page promises and nobody has built yet; a line goes when its name arrives.
PENDING_NAMES: set[str] = set()
PENDING_COMMANDS: set[str] = set()
PENDING_PARAMETERS: tuple[str, ...] = ()

BEYOND_NAMES = {
    "torchclust": {
        "charge_": "the price of bits in a training loop of one's own",
        "round_mantissas_": "biases and norms at the precision that a packed file needs",
    },
    "torchclust.lightning": {
        "Options": "the typed `**options`, so that LightningCLI reads them from YAML",
    },
    "torchclust.export": {
        "ExportError": "what `to_tflite` raises: to catch it, one must name it",
        "VelaError": "what `vela` raises",
        "CompiledFileError": "what `verify_compiled` and `vela` raise",
        "NotVerifiedError": "what `verify_compiled` raises where it cannot follow the compiler",
        "CompiledInspection": "what `verify_compiled` returns: its rows and the accelerator",
        "CompiledRow": "a row of it",
        "Inspection": "what `inspect_tflite` returns: its rows, operators, inputs and outputs",
        "WeightRow": "a row of it",
        "Port": "an input or output of it",
        "TensorRow": "a row of TFLiteExport.tensors",
        "OperatorRow": "a row of TFLiteExport.float_operators and PTEExport.cpu_operators",
        "VelaLayer": "a row of VelaReport.layers",
        "CpuOperator": "a row of VelaReport.cpu_operators",
        "TableRow": "a row of TFLMReport.rows",
        "BoardKit": "what `board_kit` returns",
    },
}
BEYOND_PARAMETERS = {
    ("refit_", "seed"): "of the random inits, as `cluster_` has it",
    ("distill_", "blocks"): "names the blocks of a model whose own cannot be found",
    ("distill_", "checkpoint"): "a file that an interrupted run goes on from",
    ("distill_", "seed"): "of the order of the batches",
    ("to_tflite", "ranges"): "how activation ranges are measured, min-max by default",
    ("to_tflite", "input_dtype"): "uint8 where a camera fills the input",
    ("board_kit", "inputs"): "for the test vectors, else random",
    ("board_kit", "labels"): "of the classes",
    ("board_kit", "accelerator"): "compiles for an Ethos-U first",
    ("board_kit", "overwrite"): "replaces an earlier kit's files",
    ("WeightClustering", "freeze"): "parameters that stay as they are while clustered",
    ("WeightClustering", "save_stripped"): "a file for the stripped weights, from YAML too",
    ("WeightClustering", "quantize_activations"): "trains with rounded activations, see recipes",
}
DEFAULTS_BEYOND = {("distill_", "steps"), ("distill_", "lr")}  # the contract leaves them open
BEYOND_COMMANDS = {"sweep": "run for several values of some keys"}


def contract(module: str) -> dict[str, tuple[inspect.Signature, bool]]:
    """Name -> signature as the contract has it, and whether it ends in an ellipsis."""
    text = re.sub(r"\s+", " ", SIGNATURES[module])
    found = {}
    for line in re.findall(r"\w+\(.*?\)", text):
        name, _, arguments = line[:-1].partition("(")
        is_open = arguments.endswith("...")
        scope: dict = {}
        named = arguments.removesuffix(", ...").removesuffix(", *")
        exec(f"def {name}({named}): ...", scope)
        found[name] = (inspect.signature(scope[name]), is_open)
    return found


def parameters(signature: inspect.Signature) -> dict[str, tuple]:
    return {p.name: (p.kind, p.default) for p in signature.parameters.values()}


@pytest.mark.parametrize("module", SIGNATURES)
def test_public_names_are_the_contract_s(module: str) -> None:
    imported = importlib.import_module(module)
    public = getattr(imported, "__all__", None) or {
        name
        for name, value in vars(imported).items()
        if getattr(value, "__module__", None) == module and not name.startswith("_")
    }
    expected = {*contract(module), *CLASSES[module]}
    assert set(public) == expected | set(BEYOND_NAMES[module])
    assert expected.isdisjoint(BEYOND_NAMES[module])


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in SIGNATURES for name in contract(module)]
)
def test_signatures_are_the_contract_s(module: str, name: str) -> None:
    expected, is_open = contract(module)[name]
    found = parameters(inspect.signature(getattr(importlib.import_module(module), name)))
    for parameter, (kind, default) in parameters(expected).items():
        if (name, parameter) in DEFAULTS_BEYOND:
            default = found[parameter][1]
        assert found[parameter] == (kind, default), parameter
    more = {(name, parameter) for parameter in set(found) - set(expected.parameters)}
    assert all(found[parameter][0] is inspect.Parameter.KEYWORD_ONLY for _, parameter in more)
    if not is_open:
        assert more == {key for key in BEYOND_PARAMETERS if key[0] == name}
    positional = [p for p, (kind, _) in found.items() if kind is not kind.KEYWORD_ONLY]
    assert positional == [
        p for p, (kind, _) in parameters(expected).items() if kind is not kind.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes_are_there_and_documented(path: str) -> None:
    owner = reduce(getattr, path.split(".")[1:], torchclust)
    fields = {field.name for field in dataclasses.fields(owner)} if isinstance(owner, type) else ()
    for name in ATTRIBUTES[path]:
        assert name in fields or hasattr(owner, name), name
        assert name in (owner.__doc__ or "") or getattr(owner, name).__doc__, name
    if path == "torchclust.ClusterConfig":
        assert fields == set(ATTRIBUTES[path])


def test_every_public_name_is_documented() -> None:
    for module in SIGNATURES:
        imported = importlib.import_module(module)
        for name in {*contract(module), *CLASSES[module], *BEYOND_NAMES[module]}:
            assert getattr(imported, name).__doc__, (module, name)


def test_commands_are_the_contract_s() -> None:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == COMMANDS | set(BEYOND_COMMANDS)


page = pytest.mark.skipif(not PAGE.exists(), reason="the contract comes with development checkouts")


def page_text() -> str:
    text = PAGE.read_text()
    for parameter in PENDING_PARAMETERS:
        assert parameter in text
        text = text.replace(parameter, "")
    return text


@page
def test_what_stands_here_is_what_the_page_says() -> None:
    text = re.sub(r"\s+", " ", page_text())
    for module in SIGNATURES:
        for line in re.findall(r"\w+\(.*?\)", re.sub(r"\s+", " ", SIGNATURES[module])):
            assert line in text, line
    for names in ATTRIBUTES.values():
        for name in names:
            assert re.search(rf"`\.?{name}(\(\))?`|`init`, `{name}`", text), name


@page
def test_what_the_page_says_stands_here() -> None:
    text = page_text()
    known = {name for module in SIGNATURES for name in contract(module)}
    called = re.findall(r"^(?:\| `|```python\n)(\w+)\(", text, re.MULTILINE)
    headed = re.findall(r"`torchclust\.(?:lightning\.|export\.)?(\w+)`", text)
    assert {*called, *headed} - {"export", "lightning"} - PENDING_NAMES == known
    classes = {name for names in CLASSES.values() for name in names}
    capitalised = set(re.findall(r"`([A-Z][a-z]*[A-Z]\w+|Codebook|Summary|Clustering)`", text))
    foreign = {"TypeError", "ValueError"}
    assert capitalised - foreign - PENDING_NAMES == classes - {"WeightClustering"}
    assert set(re.findall(r"`torchclust (\w+)", text)) - PENDING_COMMANDS == COMMANDS | set(
        BEYOND_COMMANDS
    )


@page
def test_what_is_pending_is_not_there_yet() -> None:
    assert PENDING_NAMES.isdisjoint(dir(torchclust.export))
    assert set(re.findall(r"\w+", PAGE.read_text())) >= PENDING_NAMES
    assert PENDING_COMMANDS.isdisjoint(COMMANDS | set(BEYOND_COMMANDS))
