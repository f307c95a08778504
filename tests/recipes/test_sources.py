"""What of the user's code a stage depends on: the target's file, and what that imports."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchclust.recipes import prepare as preparing
from torchclust.recipes.kept import origin
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.prepare import prepare
from torchclust.recipes.targets import digest_of

NAMES = ("target_of_mine", "helping", "lazily", "numbers_only", "kit_of_mine", "unused")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose target imports in every way that there is."""
    (tmp_path / "kit_of_mine").mkdir()
    texts = {
        "target_of_mine.py": "import os, torch, helping\nfrom numbers_only import WIDTH\n"
        "from kit_of_mine import part\n\ndef build(**given):\n    import lazily\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n",
        "helping.py": "def help(): return 1\n",
        "numbers_only.py": "WIDTH = 3\n",
        "lazily.py": "VALUE = 1\n",
        "unused.py": "VALUE = 1\n",
        "kit_of_mine/__init__.py": "",
        "kit_of_mine/part.py": "from . import deeper\n",
        "kit_of_mine/deeper.py": "DEPTH = 1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


def forget() -> None:
    for name in set(sys.modules):
        if name.partition(".")[0] in NAMES:
            del sys.modules[name]
    importlib.invalidate_caches()


def digest() -> str:
    """As in a process of its own."""
    forget()
    build = importlib.import_module("target_of_mine").build
    build()
    importlib.import_module("unused")
    return digest_of(build)


@pytest.mark.parametrize(
    "name",
    ["target_of_mine", "helping", "numbers_only", "lazily", "kit_of_mine/part",
     "kit_of_mine/deeper", "kit_of_mine/__init__"],
)  # fmt: skip
def test_another_source_is_another_digest(folder: Path, name: str) -> None:
    before = digest()
    assert digest() == before
    file = folder / f"{name}.py"
    file.write_text(file.read_text() + "# changed, with another length\n")
    assert digest() != before


def test_what_is_not_imported_does_not_matter(folder: Path) -> None:
    before = digest()
    (folder / "unused.py").write_text("VALUE = 22\n")
    assert digest() == before


def test_code_is_that_which_was_imported(folder: Path) -> None:
    """Edited while a sweep runs, a file does not change what its processes compute."""
    before = digest()
    (folder / "helping.py").write_text("def help(): return 22\n")
    assert digest_of(sys.modules["target_of_mine"].build) == before
    assert digest() != before


def test_a_models_target_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_data import fake_data

    monkeypatch.setattr(preparing, "load_data", fake_data)
    content: dict[str, Any] = {
        "name": "mine",
        "folder": str(folder),
        "data": "mnist5k",
        "model": {"target": "target_of_mine.build"},
        "train": {"epochs": 1},
    }

    def found() -> Any:
        forget()
        return origin(prepare(parse_recipe(content)))

    before = found()
    assert found() == before
    (folder / "helping.py").write_text("def help(): return 22\n")
    assert found() != before
