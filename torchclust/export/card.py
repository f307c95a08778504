"""The model card of a board kit: what the model is for, how good it is, what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torchclust.export.cpp import Board
from torchclust.export.inspect import Inspection, Port
from torchclust.export.resolver import DECODE
from torchclust.export.vela_report import VelaReport

_KIB = 1024
# What a run calls its files, and where their scores stand in its report.
_FILES = {"int8.tflite": "int8", "tflm.tflite": "int8", "baseline_int8.tflite": "baseline_int8"}
_PACKAGES = ("torchclust", "torch", "litert-torch", "tflite-micro", "ethos-u-vela")


def run_report(path: Path) -> dict[str, Any]:
    """report.json of the run that wrote this file, or {} where there is none beside it."""
    beside = path.with_name("report.json")
    if not beside.is_file():
        return {}
    found = json.loads(beside.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and "accuracy" in found else {}


def card(
    board: Board, inspected: Inspection, report: Mapping[str, Any], compiled: VelaReport | None
) -> str:
    """Markdown; what nobody has measured is not in it."""
    recipe = report.get("recipe", {})
    lines = [f"# {report.get('name') or inspected.path.stem}", ""]
    lines += _intended(board, recipe)
    lines += _scores(inspected.path.name, report)
    lines += ["", "## Size", "", "| what | KiB |", "|---|---:|"]
    lines += _sizes(board, inspected, compiled)
    lines += ["", "## Weights", "", "| operator | shape | codes | bits per weight (entropy) |"]
    lines += ["|---|---|---:|---:|"]
    lines += [
        f"| {r.operator} | {_by(r.shape)} | {r.codes} | {r.entropy_bits:.2f} |" for r in inspected
    ]
    tables = inspected.operators.get(DECODE)
    if tables:
        lines += ["", f"{tables} more are lookup tables, decoded into the arena before their use."]
    lines += ["", "## How it was made", "", _made(inspected.path, report)]
    return "\n".join(lines) + "\n"


def _intended(board: Board, recipe: Mapping[str, Any]) -> list[str]:
    source = recipe.get("data", {})
    data = source.get("name") or source.get("target")
    task = f"Classifies into {', '.join(board.labels)}." if board.labels else ""
    trained = f"Trained and tested on {data}." if data else ""
    lines = [" ".join(filter(None, (task, trained))), ""] if task or trained else []
    lines += ["| | type | shape | scale | zero point |", "|---|---|---|---:|---:|"]
    for kind, ports in (("input", board.inputs), ("output", board.outputs)):
        lines += [_port(kind, p) for p in ports]
    return lines


def _port(kind: str, p: Port) -> str:
    return f"| {kind} {p.name} | {p.dtype} | {_by(p.shape)} | {p.scale:.6g} | {p.zero_point} |"


def _scores(file: str, report: Mapping[str, Any]) -> list[str]:
    """What the run measured on its test data, by the metric that it has."""
    found, metric = report.get("accuracy", {}), report.get("metric", {})
    labels = {
        "float": "float, not clustered",
        "clustered": "float, clustered",
        "baseline_int8": "int8, not clustered, trained as long",
        "int8": "int8, clustered",
    }
    if file in _FILES:
        labels[_FILES[file]] += ": this file"
    rows = [
        f"| {label} | {found[key]:.5g} |"
        for key, label in labels.items()
        if found.get(key) is not None
    ]
    if not rows:
        return []
    unit = f", {metric['unit']}" if metric.get("unit") else ""
    name = f"{metric.get('name', 'accuracy')}{unit}"
    return ["", "## On the test data", "", f"| model | {name} |", "|---|---:|", *rows]


def _sizes(board: Board, inspected: Inspection, compiled: VelaReport | None) -> Sequence[str]:
    rows = [
        ("model in flash", len(board.content)),
        ("the .tflite file that it was made of", inspected.size_bytes),
        ("arena (RAM)", board.arena),
    ]
    if compiled is not None:
        rows += [("encoded weights (Vela)", compiled.encoded_weight_bytes)]
    lines = [f"| {what} | {size / _KIB:,.1f} |" for what, size in rows]
    lines += ["", board.arena_note]
    if compiled is not None:
        lines += [
            "",
            f"Vela {compiled.vela_version} estimates {compiled.cycles:,} cycles an inference on "
            f"{compiled.accelerator} ({compiled.system_config}, {compiled.memory_mode}).",
        ]
    return lines


def _made(path: Path, report: Mapping[str, Any]) -> str:
    versions = report.get("versions") or _versions()
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    if report:
        return (
            f"By `torchclust run` with seed {report.get('seed')}; the recipe is in the run's "
            f"report.json, which is one itself. {names}."
        )
    return f"From {path.name}, with {names}."


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
