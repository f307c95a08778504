"""Vela's output for many accelerators from one process: Vela starts slower than it compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from torchclust.export.accelerators import Configuration
from torchclust.export.graph import read_graph

_PROGRAM = """
import contextlib, io, json, sys
from ethosu.vela import vela

for options in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()):
        vela.main(options)
"""


def compile_files(
    paths: Iterable[Path], accelerators: Iterable[str], folder: Path, *more: str
) -> dict[tuple[str, str], Path]:
    """Compile each file for each accelerator: {(stem, accelerator): compiled file}."""
    jobs, found = [], {}
    for accelerator in accelerators:
        chosen = Configuration.of(accelerator, None, None)
        target = folder / accelerator
        target.mkdir(parents=True, exist_ok=True)
        options = ["--accelerator-config", accelerator, "--output-dir", str(target)]
        options += ["--config", chosen.config, "--system-config", chosen.system_config]
        options += ["--memory-mode", chosen.memory_mode]
        for path in paths:
            jobs.append([str(path), *options, *more])
            found[path.stem, accelerator] = target / f"{path.stem}_vela.tflite"
    subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(jobs),
        text=True,
        check=True,
        stderr=subprocess.DEVNULL,
        timeout=300,
    )
    return found


def program(path: Path) -> tuple[bytes, bytes]:
    """The first accelerator operator's command stream and constants."""
    graph = read_graph(path.read_bytes())
    operator = next(op for op in graph.operators if op.name == "ethos-u")
    payload, constants = (graph.tensors[i].data for i in operator.inputs[:2])
    assert payload is not None
    assert constants is not None
    return payload.tobytes(), constants.tobytes()
