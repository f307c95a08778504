"""Training for recipes: Lightning's `fit` with the recipe's options, lower rates, pruning."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import prune

from torchclust.lightning.optimizers import scale_rates
from torchclust.lightning.trees import TREES, Callback, tree_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer

DEFAULTS = {
    "devices": 1,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


def fit(
    module: LightningModule,
    data: LightningDataModule,
    *,
    epochs: int,
    seed: int,
    callbacks: Sequence[Callback] = (),
    options: Mapping[str, Any] = MappingProxyType({}),
    progress: bool = True,
) -> LightningModule:
    """Train `module` in place through Lightning's Trainer and return it on the CPU, in eval mode.

    `seed` fixes dropout and whatever else draws at random in the step, and the order of batches as
    far as the loaders leave it to the global generators. A Ctrl-C leaves as `KeyboardInterrupt`,
    where Lightning would exit with status 1.
    """
    tree = tree_of(module)
    assert tree is not None
    tree.seed_everything(seed, verbose=False)
    bar = tree.callbacks.TQDMProgressBar(refresh_rate=1 if sys.stdout.isatty() else 100)
    with lightning_kept_quiet():
        trainer = tree.Trainer(
            **{**DEFAULTS, **options},
            max_epochs=epochs,
            callbacks=[*callbacks, *([bar] if progress else [])],
            enable_progress_bar=progress,
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module.train(), datamodule=data)
        except SystemExit as end:  # Lightning's, after a Ctrl-C; or the model's own
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt from None
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
    module.trainer = None
    return module.cpu().eval()


class LowerRates(Callback):
    """Multiply every optimizer's rates, as `WeightClustering` does, for the control."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the rates of the optimizers just built."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scale_rates(trainer.optimizers, schedulers, self.factor)


class GradualPruning(Callback):
    """Set the smallest weights to zero, more and more of them while the others train on.

    Magnitudes are compared over all Linear and convolution weights together (depthwise ones left
    alone), so a layer keeps what it needs; the share of zeros rises to `sparsity` along the cubic
    of Zhu & Gupta, "To prune, or not to prune" (2017), over the first three quarters of the
    steps. Lightning's own ModelPruning changes the share between epochs only, which one epoch of
    pruning does not have. At the end the masks are gone and the zeros stay.
    """

    UPDATES = 30

    def __init__(self, sparsity: float, path: str = "") -> None:
        self.sparsity = sparsity
        self.path = path
        self._done = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune further when the schedule has come to its next update."""
        # Batches, not optimizer steps: of these a module with two optimizers takes two a batch.
        a_pass = int(trainer.num_training_batches)
        ramp = 0.75 * a_pass * (trainer.max_epochs or 1)
        seen = trainer.current_epoch * a_pass + batch_idx + 1
        due = min(self.UPDATES, int(self.UPDATES * seen / ramp))
        if due > self._done:
            self._done = due
            share = self.sparsity * (1 - (1 - due / self.UPDATES) ** 3)
            weights = prunable(pl_module.get_submodule(self.path))
            _make_permanent(weights)
            prune.global_unstructured(weights, prune.L1Unstructured, amount=share)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the zeros permanent."""
        _make_permanent(prunable(pl_module.get_submodule(self.path)))


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights of Linear and of dense convolutions, as (module, "weight")."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        (module, "weight")
        for module in model.modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    ]


def _make_permanent(weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Take the masks off; what they set to zero stays so, as +0.0.

    A mask times a negative weight is -0.0, a second kind of zero, which would cost a packed file up
    to a bit for every zero.
    """
    for module, name in weights:
        if prune.is_pruned(module):
            prune.remove(module, name)
            with torch.no_grad():
                getattr(module, name).add_(0.0)


@contextmanager
def lightning_kept_quiet() -> Iterator[None]:
    """Leave out Lightning's lines about devices, and its advice that does not fit here."""
    loggers = [logging.getLogger(f"{tree}.{n}") for tree in TREES for n in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Batches are slices of arrays in memory: worker processes would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6.6's use of torch 2.13's pytree, 2026-11.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_CHATTY = ("utilities.rank_zero", "accelerators.cuda")
