"""The lookup tables of a run: their figures, when they are made again, when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import to_tflite
from torchclust.export.micro_interpreter import least_arena
from torchclust.recipes import tables
from torchclust.recipes.kept import Result, Stages

EXPORTED = ("int8.tflite", "baseline_int8.tflite")
INPUTS = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def export(model: nn.Module, path: Path) -> None:
    to_tflite(model, INPUTS[:1], path, calibration=[INPUTS])


def written(folder: Path, said: list[str], exported: Sequence[str] = EXPORTED) -> Result:
    recipe = SimpleNamespace(
        tflm=SimpleNamespace(max_arena=None), seed=0, sections=lambda *names: {"tflm": {}}
    )
    task = SimpleNamespace(inputs=lambda model, count, seed: INPUTS[:count])
    prepared = cast(Any, SimpleNamespace(recipe=recipe, task=task))
    networks = cast(Any, SimpleNamespace(modules={"trained": None}))
    stages = Stages(folder / "stages", say=said.append)
    return tables.write_tables(prepared, networks, exported, folder, stages)


@pytest.fixture(autouse=True)
def without_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "origin", lambda prepared: {})


def test_its_figures_are_those_of_the_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.Linear(32, 4)
    model, said = nn.Sequential(*layers).eval(), list[str]()
    export(model, tmp_path / "baseline_int8.tflite")
    export(cluster_(model, 4, codebook_dtype="int8"), tmp_path / "int8.tflite")
    found = written(tmp_path, said)
    made = (tmp_path / tables.TABLES_FILE).read_bytes()
    baseline = (tmp_path / "baseline_int8.tflite").read_bytes()
    assert found["flash_bytes"] == len(made)
    assert found["flash_bytes"] < 0.6 * found["baseline_flash_bytes"]
    assert found["baseline_flash_bytes"] == len(baseline)
    assert found["baseline_arena_bytes"] == least_arena(baseline)
    assert found["arena_bytes"] == least_arena(made)
    assert found["compared"] >= 32
    assert written(tmp_path, said) | {"seconds": 0} == found | {"seconds": 0}
    assert said == ["tflm ...", "tflm: done before"]
    (tmp_path / tables.TABLES_FILE).unlink()  # the result tells of a file that is not there
    written(tmp_path, said)
    assert said[2:] == ["tflm ..."]
    assert (tmp_path / tables.TABLES_FILE).read_bytes() == made


def test_nothing_is_written_where_nothing_was_clustered(tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / "int8.tflite").write_bytes(b"of an earlier recipe")
    assert written(tmp_path, said, ["baseline_int8.tflite"]) == {}
    assert not (tmp_path / tables.TABLES_FILE).exists()
    assert said == []
