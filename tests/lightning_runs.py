"""A small LightningModule, a loader that resumes within an epoch, a quiet Trainer."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from torchclust.lightning import WeightClustering

EPOCHS, STEPS = 3, 3  # steps per epoch

Optimizers = Callable[[pl.LightningModule], Any]


def adam(module: pl.LightningModule) -> Any:
    return torch.optim.Adam(module.parameters(), lr=1e-2)


def network() -> nn.Sequential:
    """Convolution, live BatchNorm, dropout, transposed convolution, Linear."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.ConvTranspose2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(256, 3),
    )


class Net(pl.LightningModule):
    """Classifies 1x8x8 inputs; its optimizers come from outside."""

    def __init__(self, optimizers: Optimizers = adam, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.build = optimizers

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.build(self)


class Evaluated(Net):
    """With the step that validation and test share."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[1]))

    test_step = validation_step


class Order(Sampler[int]):
    """Another order every epoch (Lightning sets it), taken up where it was left."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch, self.position = length, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        self.position %= self.length
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        while self.position < self.length:
            self.position += 1
            yield order[self.position - 1]


class Batches(DataLoader[Any]):
    """Shuffled batches that resume within an epoch: Lightning keeps the loader's state."""

    def __init__(self, steps: int = STEPS, size: int = 8, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(steps * size, 1, 8, 8, generator=generator)
        self.y = torch.randint(3, (steps * size,), generator=generator)
        self.order = Order(steps * size)
        super().__init__(TensorDataset(self.x, self.y), size, sampler=self.order)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.position = state["position"]


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


class KillAt(pl.Callback):
    """SIGKILL in the middle of a training step: after its forward, before its update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def schedule(module: pl.LightningModule) -> Any:
    """Two groups with their own rates, a schedule by the step."""
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    others = [p for n, p in module.named_parameters() if not n.endswith("bias")]
    groups = [{"params": others, "weight_decay": 1e-3}, {"params": biases, "lr": 3e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[1e-2, 3e-2], total_steps=EPOCHS * STEPS + 1
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}


def run(
    folder: Path,
    *,
    resume: bool = False,
    kill_at: int | None = None,
    whole_epochs: bool = False,
    **callback: Any,
) -> None:
    """One training with checkpoints as it goes; its final state goes to ``folder/final.pt``.

    Args:
        folder: of the checkpoints.
        resume: go on from the last checkpoint in the folder.
        kill_at: the step within which this process kills itself.
        whole_epochs: checkpoints after every epoch's validation, batches from torch's DataLoader
            shuffled by the global generator; else checkpoints after every step.
        **callback: arguments of `WeightClustering`.
    """
    torch.set_num_threads(1)
    pl.seed_everything(7 + resume, verbose=False)  # a resumed run may not live off the seed
    every = {"every_n_epochs": 1} if whole_epochs else {"every_n_train_steps": 1}
    checkpoints = ModelCheckpoint(folder, filename="{step:03d}", save_top_k=-1, **every)
    killer = [] if kill_at is None else [KillAt(kill_at)]
    batches: Any = Batches()
    if whole_epochs:
        batches = DataLoader(batches.dataset, batches.batch_size, shuffle=True)
    module = (Evaluated if whole_epochs else Net)(schedule)
    trainer(checkpoints, WeightClustering(strip=False, **callback), *killer).fit(
        module,
        batches,
        DataLoader(TensorDataset(*next(iter(Batches())))) if whole_epochs else None,
        ckpt_path=str(max(folder.glob("*.ckpt"))) if resume else None,
    )
    torch.save(module.state_dict(), folder / "final.pt")
