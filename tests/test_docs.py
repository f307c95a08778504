"""README.md and docs/ do what they say: every snippet is run as printed, or checked, or fails here.

A block is a fence that names its language: ``python`` is run, ``yaml`` is a recipe, every line of
``sh`` is a command that is run or whose arguments are checked, and ``text`` is no code. In a
document Python shares one namespace, and everything one scratch folder, from top to bottom.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_data import fake_data
from markdown_it import MarkdownIt
from markdown_it.token import Token

import torchclust
from torchclust import export
from torchclust.cli.parser import main, parser
from torchclust.recipes import prepare as preparing
from torchclust.recipes.load import load_recipe, parse_recipe, parse_yaml
from torchclust.recipes.sweep import plan
from torchclust.zoo import data as data_sets

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A run for the files that later lines read: as printed, but without training or compiling.
SHORT = ("train.epochs=0", "finetune.epochs=0", "export.calibration_samples=2", "vela=null")
MODULE = re.compile(r"torchclust/([\w/]+\.py)")


def name_of(path: Path) -> str:
    return path.name


def tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").parse(document.read_text(encoding="utf-8"))


def fences(document: Path) -> list[Token]:
    return [token for token in tokens(document) if token.type == "fence"]


def lines_of(fence: Token) -> list[str]:
    """A shell block's commands: without comments and empty lines, continued lines joined."""
    joined = fence.content.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout, with noise for data, and none to be downloaded."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparing, "load_data", fake_data)
    return tmp_path


def run_python(code: str, namespace: dict[str, object], place: str) -> None:
    exec(compile(code, place, "exec"), namespace)


def check_yaml(text: str, place: str) -> None:
    """A recipe, or sections to put into one."""
    shown = parse_yaml(text, source=place)
    others = load_recipe(ROOT / "recipes/mnist_cnn.yaml").to_dict()
    if "module" in shown:
        del others["model"]
    parse_recipe({**others, **shown}, source=place)


def run_torchclust(words: list[str], later: str) -> None:
    """Run a command that is quick, or whose files later lines read; check the others' arguments."""
    args = parser().parse_args(words)
    if args.command == "sweep":
        assert len(plan(args.recipe, args.settings)) > 1
    elif args.command == "run" and str(args.output or f"runs/{args.recipe.stem}") not in later:
        settings = [word for setting in args.settings for word in ("--set", setting)]
        assert main(["check", str(args.recipe), *settings, "--quiet"]) == 0
    else:
        short = [word for setting in SHORT for word in ("--set", setting)]
        assert main([*words, *(short if args.command == "run" else []), "--quiet"]) == 0


def check_make(words: list[str], later: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words)


def check_pip(words: list[str], later: str) -> None:
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words[1:]:
        # Not by its name: the package index has another project by that.
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        assert found, word
        for extra in (found[1] or "all").split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def check_script(words: list[str], later: str) -> None:
    """A script that takes long: it is there, and has the options that are given to it."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    ast.parse(text)
    assert all(f'"{word}"' in text for word in words[1:] if word.startswith("--"))


def check_apt(words: list[str], later: str) -> None:
    errors = Path(data_sets.__file__).read_text(encoding="utf-8")
    assert f"apt-get {' '.join(words)}" in errors


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "torchclust": run_torchclust,
    "make": check_make,
    "pip": check_pip,
    "python": check_script,
    "apt-get": check_apt,
}


def run_shell(fence: Token, later: str, place: str) -> None:
    lines = lines_of(fence)
    for number, line in enumerate(lines):
        words = shlex.split(line, comments=True)
        assert words[0] in COMMANDS, f"{place}: {line!r} is neither run nor checked"
        COMMANDS[words[0]](words[1:], "\n".join([*lines[number + 1 :], later]))


needs_executorch = (
    pytest.mark.executorch,
    pytest.mark.skipif(
        importlib.util.find_spec("executorch") is None, reason="make test-executorch"
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(page, marks=needs_executorch if page.stem == "executorch" else ())
        for page in DOCUMENTS
    ],
    ids=name_of,
)
def test_snippets_do_what_is_printed(document: Path, scratch: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = fences(document)
    actions: dict[str, Callable[[str, str, Token], object]] = {
        "python": lambda later, place, fence: run_python(fence.content, namespace, place),
        "yaml": lambda later, place, fence: check_yaml(fence.content, place),
        "sh": lambda later, place, fence: run_shell(fence, later, place),
        "text": lambda later, place, fence: None,
    }
    for number, fence in enumerate(found):
        place = f"{name_of(document)}:{(fence.map or [0])[0] + 1}"
        assert fence.info in actions, f"{place}: {fence.info!r} is neither run nor checked"
        later = "\n".join(after.content for after in found[number + 1 :] if after.info == "sh")
        actions[fence.info](later, place, fence)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_is_fenced(document: Path) -> None:
    """So that its language is named: an indented block could be anything, and is not run."""
    indented = [token.map for token in tokens(document) if token.type == "code_block"]
    assert not indented
    for fence in fences(document):
        if fence.info == "text":
            first = fence.content.split()[0]
            assert first not in COMMANDS, f"{first} is a command: say ```sh"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if re.match(r"https?:", target):
            continue
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        if heading:
            lines = path.read_text(encoding="utf-8").splitlines()
            assert heading in {anchor(line) for line in lines if line.startswith("#")}, target


def test_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [*DOCUMENTS[1:], *(ROOT / "notebooks").glob("*.ipynb")]
    assert [page.name for page in pages if f"({page.relative_to(ROOT)})" not in text] == []


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_how_it_works_names_every_module() -> None:
    named = set(MODULE.findall((ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")))
    package = ROOT / "torchclust"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert named == {path for path in there if not path.endswith("__.py")}


def test_the_recipe_reference_is_the_schemas() -> None:
    page = runpy.run_path(str(ROOT / "docs/recipe_reference.py"))["page"]()
    kept = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert kept == page, "write it anew:  python docs/recipe_reference.py"


def test_every_public_function_has_an_example() -> None:
    """In its own docstring, or in that of its package; pytest runs them all as doctests."""
    for module in (torchclust, export):
        for name in module.__all__:
            documented = getattr(module, name)
            pages = (documented.__doc__ or "", module.__doc__ or "")
            examples = re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", "\n".join(pages), re.MULTILINE)
            if inspect.isfunction(documented):
                assert any(f"{name}(" in line for line in examples), name


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```sh\nrm -rf runs\n```", "neither run nor checked"),
        ("```bash\nmake demo\n```", "neither run nor checked"),
        ("```sh\nmake nonsense\n```", "assert"),
        ("```sh\npip install '.[nonsense]'\n```", "nonsense"),
        ("```sh\npip install torchclust[all]\n```", "torchclust"),
        ("```sh\ntorchclust check recipes/mnist_cnn.yaml --set nonsense=1\n```", "assert 2 == 0"),
        ("```sh\ntorchclust run recipes/mnist_cnn.yaml --set nonsense=1\n```", "assert 2 == 0"),
        ("```python\nassert 1 == 2\n```", "^$"),
    ],
)
def test_a_snippet_that_does_not_work_is_noticed(block: str, message: str, scratch: Path) -> None:
    page = scratch / "page.md"
    page.write_text(block)
    with pytest.raises(AssertionError, match=message):
        test_snippets_do_what_is_printed(page, scratch)
