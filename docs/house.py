"""Draw docs/house.svg, the rooms of the package and what imports what:  python docs/house.py

The order of the floors is the layers contract of setup.cfg, which import-linter holds; rooms, what
they are for and arrows are read from the files themselves. A test compares the picture with them.
An arrow that follows from others (cli imports recipes, recipes imports export: so cli may import
export) is left out.
"""

from __future__ import annotations

import ast
import configparser
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchclust"
PICTURE = Path(__file__).parent / "house.svg"
WIDTH, FLOOR, BOX = 1000, 110, (190, 80)
BLUE, GREY = "#3b5b8c", "#8894a2"


class Room(NamedTuple):
    """A folder of the package, or a module that stands directly in it."""

    name: str
    purpose: str
    imports: frozenset[str]


def floors() -> list[list[str]]:
    """Return the rooms' names from the top floor down, as the contract has them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    layers = config["importlinter:contract:house"]["layers"].strip().splitlines()
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def imported(file: Path) -> Iterator[str]:
    """Yield the room of every import of the package within a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torchclust."):
            yield str(node.module).split(".")[1]


def room(name: str) -> Room:
    """Read a room from its files."""
    folder = PACKAGE / name
    files = sorted(folder.glob("**/*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    main = folder / "__init__.py" if folder.is_dir() else files[0]
    says = ast.get_docstring(ast.parse(main.read_text(encoding="utf-8"))) or ""
    purpose = says.split("\n")[0].replace("`", "").rstrip(".")
    return Room(name, purpose, frozenset(i for f in files for i in imported(f)) - {name})


def arrows(rooms: dict[str, Room]) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others."""

    def reached(name: str) -> set[str]:
        below = rooms[name].imports
        return set(below).union(*map(reached, below))

    return [
        (room.name, below)
        for room in rooms.values()
        for below in sorted(room.imports)
        if not any(below in reached(other) for other in room.imports)
    ]


def places() -> dict[str, tuple[float, float]]:
    """Return the middle of every room's box."""
    return {
        name: (WIDTH * (column + 0.5) / len(names), FLOOR * (level + 0.5))
        for level, names in enumerate(floors())
        for column, name in enumerate(names)
    }


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a curve from the lower edge of a box to the upper edge of another one."""
    (x, y), (u, v) = (start[0], start[1] + BOX[1] / 2), (end[0], end[1] - BOX[1] / 2 - 6)
    around = BOX[0] * 0.8 if x == u and v - y > FLOOR else 0  # what stands between
    first, second = f"{x + around:.0f},{y + FLOOR / 2:.0f}", f"{u + around:.0f},{v - FLOOR / 2:.0f}"
    path = f"M{x:.0f},{y:.0f} C{first} {second} {u:.0f},{v:.0f}"
    return f'<path d="{path}" fill="none" stroke="{GREY}" marker-end="url(#tip)"/>'


def box(room: Room, at: tuple[float, float]) -> str:
    """Return a room's box with its name and what it is for."""
    left, top = at[0] - BOX[0] / 2, at[1] - BOX[1] / 2
    lines = textwrap.wrap(room.purpose, 34)
    said = "".join(
        f'<text x="{at[0]:.0f}" y="{top + 37 + 12 * i:.0f}" font-size="10">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" '
        f'fill="#f4f7fb" stroke="{BLUE}"/><text x="{at[0]:.0f}" y="{top + 20:.0f}" '
        f'font-size="15" font-weight="bold">{escape(room.name)}</text>{said}'
    )


def picture() -> str:
    """Return the whole drawing."""
    at = places()
    rooms = {name: room(name) for name in at}
    height = FLOOR * len(floors())
    tip = (
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker></defs>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" text-anchor="middle">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            tip,
            *(arrow(at[above], at[below]) for above, below in arrows(rooms)),
            *(box(rooms[name], at[name]) for name in at),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
