"""Run a recipe for several values of some keys, sharing the stages that they have in common."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from torchclust.recipes.load import load_recipe, parse_yaml
from torchclust.recipes.metric import Metric
from torchclust.recipes.ready import ready
from torchclust.recipes.run import STAGE_FOLDER, check_output, clear, run_recipe, write_whole
from torchclust.recipes.schema import Recipe, RecipeError

Row = dict[str, Any]
_COLUMNS = {
    "float zip, bytes": ("bytes", "clustered_float_tflite_zip"),
    "int8 zip, bytes": ("bytes", "int8_tflite_zip"),
    "encoded weights, bytes": ("vela", "encoded_weight_bytes"),
    "flash, bytes": ("vela", "flash_bytes"),
    "tflite-micro's flash, bytes": ("tflm", "flash_bytes"),
    "cycles": ("vela", "cycles"),
    "packed, bytes": ("bytes", "packed"),
}
# On the plot's axis: U65 and U85 keep their weights in DRAM, and Vela need not run.
_SIZES = (
    "flash, bytes",
    "encoded weights, bytes",
    "tflite-micro's flash, bytes",
    "int8 zip, bytes",
)


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
    jobs: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> list[Row]:
    """Run every combination into a folder of its own under `output`, then compare them there.

    Writes sweep.json, sweep.md and sweep.png beside the runs' folders. Arguments as for
    `run_recipe`; `output` is by default ``runs/NAME_sweep``. With several `jobs` so many runs are
    under way at a time, each in a process of its own; a stage that several need is computed by one
    of them, and the others wait for it.

    Raises:
        RecipeError, DataError: before anything is written, if any of the recipes can not be run;
            at the end, when the others are compared, if a run failed.
    """
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least 1 process is needed")
    points = plan(file, settings)
    output = output or Path("runs") / f"{points[0].recipe.name}_sweep"
    check_output(output, resume=resume, overwrite=overwrite)
    metrics = [ready(point.recipe).task.metric for point in points]
    if overwrite:
        for folder in (output, *(output / point.folder for point in points)):
            clear(folder)
    reports = (
        _in_processes(points, output, jobs, say)
        if jobs > 1
        else (
            _run_point(point, output, f"[{number}/{len(points)}] {point.label}", say, progress)
            for number, point in enumerate(points, 1)
        )
    )
    rows, failed = [], []
    for point, report, metric in zip(points, reports, metrics, strict=True):
        if isinstance(report, RecipeError):
            failed.append(f"{point.label}: {report}")
        else:
            named = {"label": point.label, "folder": point.folder}
            rows.append({**named, **_figures(report, metric)})
    if not rows:
        raise RecipeError(failed[0])
    write_whole(output / "sweep.json", json.dumps(rows, indent=2) + "\n")
    write_whole(output / "sweep.md", markdown(rows))
    _plot(rows, output / "sweep.png", metrics[0])
    if failed:
        raise RecipeError(
            f"{len(failed)} of {len(points)} runs failed, the others are compared in "
            f"{output / 'sweep.md'}. {'; '.join(failed)}"
        )
    return rows


def _run_point(
    point: Point, output: Path, title: str, say: Callable[[str], None], progress: bool
) -> dict[str, Any] | RecipeError:
    """Return the report, or an error that is the recipe's own; others end the sweep."""
    say(title)
    try:
        return run_recipe(
            point.recipe,
            output / point.folder,
            resume=True,
            stage_folder=output / STAGE_FOLDER,
            say=say,
            progress=progress,
        )
    except RecipeError as error:
        return error


def _in_processes(
    points: Sequence[Point], output: Path, jobs: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any] | RecipeError]:
    """Run the points in that many processes, which share the threads of this one."""
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        running = [pool.submit(_run_point, p, output, p.label, _silent, False) for p in points]
        try:
            for number, (point, done) in enumerate(zip(points, running, strict=True), 1):
                report = done.result()
                ended = "failed" if isinstance(report, RecipeError) else "done"
                say(f"[{number}/{len(points)}] {point.label}: {ended}")
                yield report
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _silent(line: str) -> None:
    pass


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
    names = [n for n in rows[0] if n not in ("label", "folder") and not n.startswith("baseline ")]
    columns = [name for name in names if any(row[name] is not None for row in rows)]
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [
        [row["label"], *(_cell(row[name], 2 if "%" in name else 4) for name in columns)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (size, score) points no other beats in both, in order of size."""
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


def _scored(metric: Metric) -> tuple[str, str]:
    """Return what the columns of the metric are called: of the int8 file, and of the control's."""
    return f"int8 {metric.label}", f"not clustered, {metric.unit or metric.name}"


def _figures(report: dict[str, Any], metric: Metric) -> Row:
    accuracy = report["accuracy"]
    scores = (accuracy["int8"], accuracy["baseline_int8"])
    found = dict(zip(_scored(metric), scores, strict=True))
    found[f"float {metric.label}"] = accuracy["clustered"] if scores[0] is None else None
    found[f"packed {metric.label}"] = accuracy["packed"]
    found |= {name: report[section][key] for name, (section, key) in _COLUMNS.items()}
    baseline = {
        f"baseline {name}": report[_COLUMNS[name][0]][f"baseline_{_COLUMNS[name][1]}"]
        for name in _SIZES
    }
    return {**found, **baseline}


def _cell(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _plot(rows: Sequence[Row], path: Path, metric: Metric) -> None:
    """Draw the int8 files' metric against the first of `_SIZES` that was measured."""
    size = next((name for name in _SIZES if rows[0][name]), None)
    score, control = _scored(metric)
    if size is None or any(row[score] is None for row in rows):
        return
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    points = [(row[size] / 1024, row[score]) for row in rows]
    worth = [(x, -metric.loss(0, y)) for x, y in points]
    best = [points[index] for index in front(worth)]
    axes.plot(*zip(*best, strict=True), "-", color="#1f6feb", linewidth=1)
    axes.plot(*zip(*points, strict=True), "o", color="#1f6feb", label="clustered")
    for (x, y), row in zip(points, rows, strict=True):
        axes.annotate(row["label"], (x, y), (8, -11), textcoords="offset points", fontsize=9)
    baselines = {(row[f"baseline {size}"] / 1024, row[control]) for row in rows}
    axes.plot(*zip(*baselines, strict=True), "s", color="#9aa5b1", label="not clustered")
    axes.set_xlabel(f"{size.partition(',')[0]}, KiB")
    axes.set_ylabel(score)
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
