"""Run a recipe for several values of some keys, sharing the stages that they have in common."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from torchclust.recipes.load import load_recipe, parse_yaml
from torchclust.recipes.prepare import prepare
from torchclust.recipes.run import STAGE_FOLDER, check_output, clear, run_recipe, write_whole
from torchclust.recipes.schema import Recipe, RecipeError

Row = dict[str, Any]
_COLUMNS = {
    "int8 accuracy, %": ("accuracy", "int8"),
    "not clustered, %": ("accuracy", "baseline_int8"),
    "float zip, bytes": ("bytes", "clustered_float_tflite_zip"),
    "int8 zip, bytes": ("bytes", "int8_tflite_zip"),
    "encoded weights, bytes": ("vela", "encoded_weight_bytes"),
    "flash, bytes": ("vela", "flash_bytes"),
    "cycles": ("vela", "cycles"),
}
# On the plot's axis: U65 and U85 keep their weights in DRAM, and Vela need not run.
_SIZES = ("flash, bytes", "encoded weights, bytes", "int8 zip, bytes")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what sets it apart, its recipe, and the name of its folder."""

    label: str
    recipe: Recipe
    folder: str


def run_sweep(
    file: Path,
    settings: Sequence[str],
    output: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> list[Row]:
    """Run every combination into a folder of its own under `output`, then compare them there.

    Writes sweep.json, sweep.md and sweep.png beside the runs' folders. Arguments as for
    `run_recipe`; `output` is by default ``runs/NAME_sweep``.

    Raises:
        RecipeError, DataError: before anything is written, if any of the recipes can not be run.
    """
    points = plan(file, settings)
    output = output or Path("runs") / f"{points[0].recipe.name}_sweep"
    check_output(output, resume=resume, overwrite=overwrite)
    for point in points:
        prepare(point.recipe)
    if overwrite:
        for folder in (output, *(output / point.folder for point in points)):
            clear(folder)
    rows = []
    for number, point in enumerate(points, 1):
        say(f"[{number}/{len(points)}] {point.label}")
        report = run_recipe(
            point.recipe,
            output / point.folder,
            resume=True,
            stage_folder=output / STAGE_FOLDER,
            say=say,
            progress=progress,
        )
        rows.append({"label": point.label, "folder": point.folder, **_figures(report)})
    write_whole(output / "sweep.json", json.dumps(rows, indent=2) + "\n")
    write_whole(output / "sweep.md", markdown(rows))
    _plot(rows, output / "sweep.png")
    return rows


def plan(file: Path, settings: Sequence[str]) -> list[Point]:
    """Return the runs that the settings ask for, one per combination of their values.

    A setting whose value is a list without brackets (``cluster.n_clusters=4,8,16``) is swept.

    Raises:
        RecipeError: if no setting has several values, or one of the recipes is not valid.
    """
    choices = [_alternatives(setting) for setting in settings]
    swept = [index for index, alternatives in enumerate(choices) if len(alternatives) > 1]
    if not swept:
        raise RecipeError("no key has several values:  --set cluster.n_clusters=4,8,16,32")
    points = []
    for chosen in itertools.product(*choices):
        own = [_short(chosen[index]) for index in swept]
        folder = "_".join(own).replace("/", "-")
        points.append(Point(", ".join(own), load_recipe(file, chosen), folder))
    return points


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table; what no run measured is left out."""
    columns = [name for name in _COLUMNS if any(row[name] is not None for row in rows)]
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[row["label"], *(_cell(row[name]) for name in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (size, accuracy) points no other beats in both, in order of size."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def _alternatives(setting: str) -> list[str]:
    """Split ``key=1,2`` into ``key=1`` and ``key=2``, each value as JSON."""
    key, _, text = setting.partition("=")
    values = parse_yaml(f"[{text}]", source=f"--set {setting}")
    return [f"{key}={json.dumps(value)}" for value in values] if len(values) > 1 else [setting]


def _short(setting: str) -> str:
    """Return ``n_clusters=8`` for ``cluster.n_clusters=8``."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value.strip(chr(34))}"


def _figures(report: dict[str, Any]) -> Row:
    found = {name: report[section][key] for name, (section, key) in _COLUMNS.items()}
    baseline = {
        f"baseline {name}": report[_COLUMNS[name][0]][f"baseline_{_COLUMNS[name][1]}"]
        for name in _SIZES
    }
    return {**found, **baseline}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Draw int8 accuracy against the first of `_SIZES` that was measured."""
    size = next((name for name in _SIZES if rows[0][name]), None)
    if size is None or any(row["int8 accuracy, %"] is None for row in rows):
        return
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    points = [(row[size] / 1024, row["int8 accuracy, %"]) for row in rows]
    best = [points[index] for index in front(points)]
    axes.plot(*zip(*best, strict=True), "-", color="#1f6feb", linewidth=1)
    axes.plot(*zip(*points, strict=True), "o", color="#1f6feb", label="clustered")
    for (x, y), row in zip(points, rows, strict=True):
        axes.annotate(row["label"], (x, y), (8, -11), textcoords="offset points", fontsize=9)
    baselines = {(row[f"baseline {size}"] / 1024, row["not clustered, %"]) for row in rows}
    axes.plot(*zip(*baselines, strict=True), "s", color="#9aa5b1", label="not clustered")
    axes.set_xlabel(f"{size.partition(',')[0]}, KiB")
    axes.set_ylabel("int8 accuracy, %")
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
