"""What is imported when: a plain import waits for nothing, and each name finds its module."""

import subprocess
import sys
from functools import cache

import pytest

import torchclust

EXTRAS = {
    *(
        "pytorch_lightning",
        "lightning",
        "litert_torch",
        "ai_edge_litert",
        "ai_edge_quantizer",
        "flatbuffers",
    ),
    *("ethosu", "scipy", "sklearn", "matplotlib", "mlxtend", "pydantic", "yaml", "rich"),
    *("constriction", "safetensors", "shtab"),
}


@cache
def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def command(words: str) -> str:
    return (
        "from torchclust.cli import parser as cli\n"
        f"try: cli.main({words.split()!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
    )


@pytest.mark.parametrize(
    "statement",
    ["import torchclust", "import torchclust.cli.parser", "dir(__import__('torchclust'))",
     *map(command, ["--help", "run --help", "vela --help", "--version"])],
)  # fmt: skip
def test_what_computes_nothing_imports_nothing(statement: str) -> None:
    assert imported_by(statement).isdisjoint({"torch", "numpy", *EXTRAS})


def test_every_public_name_needs_torch_and_numpy_alone() -> None:
    found = imported_by("from torchclust import *")
    assert {"torch", "numpy"} <= found
    by_torch = imported_by("import torch, numpy, torch.utils.data")
    assert found.isdisjoint(EXTRAS - by_torch)


def test_these_tests_can_fail() -> None:
    assert "torch" in imported_by("import torchclust; torchclust.cluster_")
    assert {"pytorch_lightning", "yaml"} <= imported_by(
        "import torchclust, torchclust.recipes.schema; torchclust.lightning"
    )


def test_each_name_is_found_where_the_checker_is_told() -> None:
    """The imports under TYPE_CHECKING, `__all__` and the lazy table say the same."""
    import ast
    import importlib
    import inspect

    tree = ast.parse(inspect.getsource(torchclust))
    declared = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torchclust.")
        for alias in node.names
    }
    assert sorted(declared) == sorted(torchclust.__all__)
    assert declared == {name: f"torchclust.{home}" for name, home in torchclust._HOME_OF.items()}
    for name, module in declared.items():
        assert getattr(torchclust, name) is getattr(importlib.import_module(module), name), name


def test_dir_and_attribute_errors() -> None:
    assert {*torchclust.__all__, "__version__", "__doc__"} <= set(dir(torchclust))
    with pytest.raises(AttributeError, match="module 'torchclust' has no attribute 'clutser_'"):
        _ = torchclust.clutser_
    assert torchclust.export.to_tflite.__module__ == "torchclust.export.tflite"
    assert torchclust.lightning.WeightClustering.__module__ == "torchclust.lightning.callback"
