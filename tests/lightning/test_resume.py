"""A run killed at any step and resumed ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import EPOCHS, STEPS, run
from torch import Tensor

CONFIGS = [
    {"start_epoch": start, "assignment": assignment, "codebook_dtype": dtype}
    for start in (0, 1)
    for assignment in ("fixed", "nearest")
    for dtype in ("float32", "int8")
] + [
    {"start_epoch": 1, "codebook_dtype": "int8", "quantize_activations": True},
    {"start_epoch": 0, "assignment": "nearest", "rate": 0.05},
    {"start_epoch": 1, "assignment": "nearest", "codebook_dtype": "int8", "rate": 0.05},
]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Each run is a process of its own; they share the imports, which take longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchclust.lightning"])
    return context


@pytest.fixture(scope="module")
def straight(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The final state of the uninterrupted run, by its arguments."""
    known: dict[str, dict[str, Tensor]] = {}

    def final_state(**arguments: Any) -> dict[str, Tensor]:
        if str(arguments) not in known:
            folder = tmp_path_factory.mktemp("straight")
            assert _exit_code(processes, folder, **arguments) == 0
            known[str(arguments)] = torch.load(folder / "final.pt")
        return known[str(arguments)]

    return final_state


def _exit_code(processes: ForkServerContext, folder: Path, **arguments: Any) -> int | None:
    process = processes.Process(target=run, args=(folder,), kwargs=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def _assert_resumes(
    processes: ForkServerContext,
    folder: Path,
    kill_at: int,
    want: dict[str, Tensor],
    **arguments: Any,
) -> None:
    assert _exit_code(processes, folder, kill_at=kill_at, **arguments) == -signal.SIGKILL
    assert not (folder / "final.pt").exists()
    assert _exit_code(processes, folder, resume=True, **arguments) == 0
    got = torch.load(folder / "final.pt")
    assert list(got) == list(want)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, STEPS, STEPS + 1, EPOCHS * STEPS - 1])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_killed_at_any_step(
    processes: ForkServerContext,
    straight: Any,
    tmp_path: Path,
    config: dict[str, Any],
    kill_at: int,
) -> None:
    """Before, at and after the step from which on it is clustered; dropout is on."""
    _assert_resumes(processes, tmp_path, kill_at, straight(**config), **config)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [STEPS, STEPS + 1, EPOCHS * STEPS - 1])
def test_whole_epochs_shuffled_by_the_global_generator(
    processes: ForkServerContext, straight: Any, tmp_path: Path, kill_at: int
) -> None:
    """What an ordinary DataLoader allows: the last epoch is repeated from its beginning."""
    config = {"whole_epochs": True, "start_epoch": 1, "freeze": ["net.0.*", "BatchNorm2d"]}
    _assert_resumes(processes, tmp_path, kill_at, straight(**config), **config)
