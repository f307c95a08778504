"""Two processes on the CPU (gloo): one clustering, and hardly any traffic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import CLUSTERINGS
from lightning_runs import STEPS

pytestmark = pytest.mark.slow
BATCH_STATISTICS = ("running_mean", "running_var")  # each rank's own, in any DDP training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ddp_runs` leaves."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).parents[1] / "ddp_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*CLUSTERINGS, "million_clustered", "straight", "by_hand"])
def test_ranks_are_equal_and_send_no_indices(folder: Path, name: str) -> None:
    first, second = _ranks(folder, name)
    assert len(first["indices"]) > 0
    for key in first["indices"]:
        assert torch.equal(first["indices"][key], second["indices"][key])
    assert list(first["state"]) == list(second["state"])
    for key in first["state"]:
        if not key.endswith(BATCH_STATISTICS):
            assert torch.equal(first["state"][key], second["state"][key]), key
    batch_norm = 6 * 4 + 6 * 4 + 8 if name in CLUSTERINGS else 0
    assert set(first["broadcast"]) <= {batch_norm}


def test_only_codebooks_are_all_reduced(folder: Path) -> None:
    clustered, plain = _ranks(folder, "million_clustered")[0], _ranks(folder, "million_plain")[0]
    weights = sum(v.numel() for v in plain["state"].values())
    assert weights > 900_000
    assert plain["reduced_per_step"] == 4 * weights
    assert clustered["reduced_per_step"] <= 0.02 * plain["reduced_per_step"]


@pytest.mark.parametrize("step", [STEPS, STEPS + 1])
def test_resumed_equals_straight(folder: Path, step: int) -> None:
    for straight, resumed in zip(
        _ranks(folder, "straight"), _ranks(folder, f"resumed_{step}"), strict=True
    ):
        for key, value in straight["state"].items():
            assert torch.equal(resumed["state"][key], value), key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refused", "rule 'heads.*' matches no parameter"),  # found on rank 0
        ("sharded", "works on one device and with strategy='ddp', got ModelParallelStrategy"),
    ],
)
def test_errors_reach_both_ranks(folder: Path, name: str, message: str) -> None:
    errors = {result["error"] for result in _ranks(folder, name)}
    assert len(errors) == 1
    assert message in errors.pop()
