"""The package is laid out as its documents say: rooms, sizes, what imports what."""

import ast
import runpy
from pathlib import Path

import torchclust

ROOT = Path(__file__).parents[1]
PACKAGE = Path(torchclust.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 330  # lines of a module
ENTRIES = 14  # rooms and modules directly in the package, beside Python's own three files
PYTHONS_OWN = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
VAGUE = {"utils", "helpers", "common", "misc", "base", "core"}


def test_the_picture_is_of_this_house() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/house.py"))["picture"]()
    kept = (ROOT / "docs/house.svg").read_text(encoding="utf-8")
    assert kept == drawn, "draw it anew:  python docs/house.py"


def test_rooms_and_modules_are_of_a_size_to_know() -> None:
    assert len({path.name for path in PACKAGE.iterdir()} - PYTHONS_OWN) <= ENTRIES
    lines = {str(f.relative_to(PACKAGE)): f.read_text().count("\n") for f in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    assert {f.stem for f in FILES} & VAGUE == set()


def test_nobody_inside_imports_from_the_top() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module, node.level) != ("torchclust", 0), file
                assert node.level == 0, file
            elif isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "torchclust" for a in node.names), file


def test_a_package_hands_names_on_and_holds_no_logic() -> None:
    for file in PACKAGE.glob("*/**/__init__.py"):
        first, *body = ast.parse(file.read_text(encoding="utf-8")).body
        assert isinstance(first, ast.Expr), f"{file} says nothing of itself"
        for node in body:
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert exports or isinstance(node, ast.ImportFrom), f"{file}:{node.lineno}"


def test_each_test_file_stands_in_the_room_that_it_tests() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - PYTHONS_OWN
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - PYTHONS_OWN
    assert folders == rooms
