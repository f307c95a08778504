"""A run killed at any step and resumed ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_runs import EPOCHS, STEPS, Batches, Net, run, trainer
from torch import Tensor

import torchclust
from torchclust.lightning import WeightClustering

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
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


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("options", [{}, {"start_epoch": 1, "assignment": "nearest"}])
def test_a_module_of_another_dtype_resumes(
    tmp_path: Path, precision: str, options: dict[str, Any]
) -> None:
    """Lightning restores before it converts the module, as a plain one's state dict allows."""
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, resumed = Net(), Net()
    trainer(WeightClustering(4, **options), Save(), precision=precision).fit(straight, Batches())
    trainer(WeightClustering(4, **options), precision=precision).fit(
        resumed, Batches(), ckpt_path=tmp_path / "middle.ckpt"
    )
    for name, value in straight.state_dict().items():
        assert resumed.state_dict()[name].dtype == value.dtype
    assert resumed.net[0].weight.dtype == dtype
    assert resumed.net[0].weight.unique().numel() <= 4


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("codebook", ["float32", "int8"])
def test_restoring_converts_as_loading_does(assignment: str, codebook: str) -> None:
    saved = torch.nn.Linear(16, 16).bfloat16()
    torchclust.cluster_(saved, 8, assignment=assignment, codebook_dtype=codebook)
    restored = torchclust.restore_(torch.nn.Linear(16, 16), saved.state_dict())
    assert restored.weight.dtype == torch.float32
    assert torch.allclose(restored.weight, saved.weight.float(), rtol=0.01)
    again = torchclust.restore_(torch.nn.Linear(16, 16).bfloat16(), saved.state_dict())
    assert torch.equal(again.weight, saved.weight)
