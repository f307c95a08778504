"""Trainings in two processes; ``python tests/ddp_runs.py FOLDER`` starts both.

Each rank leaves one file per training, ``FOLDER/NAME.RANK.pt``. Ranks start from different weights,
as without a common seed, and see different batches.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_runs import STEPS, Batches, Net, schedule, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchclust import cluster_, named_clusterings
from torchclust.lightning import WeightClustering
from torchclust.lightning.distributed import keep_indices_local_

CLUSTERINGS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "int8": {"codebook_dtype": "int8", "assignment": "nearest"},
    "priced": {"assignment": "nearest", "rate": 0.05},
    "later": {"start_epoch": 1, "freeze": "net.0.*"},
}


class Traffic(pl.Callback):
    """Bytes that DDP all-reduces, and those that it broadcasts while training."""

    def __init__(self) -> None:
        self.reduced: list[int] = []
        self.broadcast: list[int] = []
        self.indices: dict[str, Tensor] = {}
        self.model: nn.Module | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = trainer.strategy.model
        assert isinstance(model, DistributedDataParallel)
        if self.model is not model:  # wrapped anew
            self.model = model
            self.count(model)

    def count(self, model: DistributedDataParallel) -> None:
        model.register_comm_hook(None, self.all_reduce)
        broadcast = model._distributed_broadcast_coalesced

        def counted(tensors: list[Tensor], *rest: Any) -> None:
            self.broadcast.append(sum(t.numel() * t.element_size() for t in tensors))
            broadcast(tensors, *rest)

        model._distributed_broadcast_coalesced = counted

    # Not under postponed annotations: DDP compares the annotation itself.
    def all_reduce(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer().div_(dist.get_world_size())
        self.reduced.append(buffer.numel() * buffer.element_size())
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.indices = {name: c.indices for name, c in named_clusterings(pl_module)}


def mlp() -> nn.Module:
    """A million weights."""
    wide = nn.Linear(960, 960)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 960), nn.ReLU(), wide, nn.Linear(960, 3))


class DDPRuns:
    """Every training in turn, in this rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ.get("LOCAL_RANK", "0"))

    def save(self, name: str, result: dict[str, Any]) -> None:
        torch.save(result, self.folder / f"{name}.{self.rank}.pt")

    def fit(
        self,
        name: str,
        *callbacks: pl.Callback,
        net: nn.Module | None = None,
        ckpt_path: Path | None = None,
    ) -> Net:
        torch.manual_seed(100 + self.rank)
        traffic, module = Traffic(), Net(schedule, net)
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        fit = trainer(*callbacks, traffic, **options)
        fit.fit(module, Batches(seed=self.rank), ckpt_path=ckpt_path)
        self.save(
            name,
            {
                "state": module.state_dict(),
                "indices": traffic.indices,
                "reduced_per_step": sum(traffic.reduced) / fit.global_step,
                "broadcast": traffic.broadcast,
            },
        )
        return module

    def clusterings(self) -> None:
        for name, arguments in CLUSTERINGS.items():
            self.fit(name, WeightClustering(**arguments))

    def million(self) -> None:
        self.fit("million_plain", net=mlp())
        self.fit("million_clustered", WeightClustering(), net=mlp())

    def resumed(self) -> None:
        """Stopped after each of the first steps, in a folder that both ranks share."""
        checkpoints = ModelCheckpoint(
            self.folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        clustering = {"start_epoch": 1, "assignment": "nearest"}
        self.fit("straight", checkpoints, WeightClustering(**clustering), net=plain())
        for step in (STEPS, STEPS + 1):
            path = self.folder / f"step={step}.ckpt"
            self.fit(f"resumed_{step}", WeightClustering(**clustering), net=plain(), ckpt_path=path)

    def refused(self) -> None:
        """An error of the fit, which takes place on rank 0 only."""
        try:
            self.fit("refused", WeightClustering({"heads.*": 4}))
        except ValueError as error:
            self.save("refused", {"error": str(error)})

    def sharded(self) -> None:
        try:
            options = {"strategy": ModelParallelStrategy(), "devices": 2}
            trainer(WeightClustering(), **options).fit(Net(), Batches())
        except ValueError as error:
            self.save("sharded", {"error": str(error)})

    def wrapped_by_hand(self) -> None:
        torch.manual_seed(self.rank)
        model = cluster_(nn.Linear(64, 64), 4)
        wrapped, traffic = keep_indices_local_(DistributedDataParallel(model)), Traffic()
        traffic.count(wrapped)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
        indices = {name: c.indices for name, c in named_clusterings(model)}
        result = {"state": model.state_dict(), "indices": indices, "broadcast": traffic.broadcast}
        self.save("by_hand", result)


def plain() -> nn.Module:
    """Nothing random: of several processes Lightning keeps no generator's state."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = DDPRuns(Path(sys.argv[1]))
    for training in (runs.clusterings, runs.million, runs.resumed, runs.refused):
        training()
    runs.wrapped_by_hand()
    runs.sharded()
