"""Ordinary training for recipes: one LightningModule, one `fit`, one `accuracy`."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor, nn
from torch.nn.utils import prune

from torchclust.recipes.schema import Schedule
from torchclust.zoo.dataset import Batch


class Classifier(pl.LightningModule):
    """A `model` from images to logits, cross-entropy, and Adam at `lr`, or from there down to 0."""

    def __init__(self, model: nn.Module, lr: float, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.lr, self.schedule = model, lr, schedule

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch, and show it in the progress bar."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return Adam over the parameters that train, and the schedule of its rate."""
        trained = (p for p in self.parameters() if p.requires_grad)
        optimizer = torch.optim.Adam(trained, lr=self.lr)
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    epochs: int,
    lr: float,
    schedule: Schedule = "constant",
    seed: int,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> nn.Module:
    """Train `model` in place through Lightning's Trainer and return it on the CPU, in eval mode.

    `seed` fixes dropout and whatever else draws at random in the step; the order of images is the
    loader's own. A Ctrl-C leaves as `KeyboardInterrupt`, where Lightning would exit with status 1.
    """
    pl.seed_everything(seed, verbose=False)
    bar = TQDMProgressBar(refresh_rate=1 if sys.stdout.isatty() else 100)
    with _lightning_kept_quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            devices=1,
            callbacks=[*callbacks, *([bar] if progress else [])],
            enable_progress_bar=progress,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(Classifier(model.train(), lr, schedule), batches)
        except SystemExit as end:  # Lightning's, after a Ctrl-C; or the model's own
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt from None
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
    return model.cpu().eval()


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the percentage of images whose largest logit is their label's."""
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


class GradualPruning(Callback):
    """Set the smallest weights to zero, more and more of them while the others train on.

    Magnitudes are compared over all Linear and convolution weights together (depthwise ones left
    alone), so a layer keeps what it needs; the share of zeros rises to `sparsity` along the cubic
    of Zhu & Gupta, "To prune, or not to prune" (2017), over the first three quarters of the
    steps. Lightning's own ModelPruning changes the share between epochs only, which one epoch of
    pruning does not have. At the end the masks are gone and the zeros stay.
    """

    UPDATES = 30

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self._done = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune further when the schedule has come to its next update."""
        ramp = 0.75 * trainer.estimated_stepping_batches
        due = min(self.UPDATES, int(self.UPDATES * (trainer.global_step + 1) / ramp))
        if due > self._done:
            self._done = due
            share = self.sparsity * (1 - (1 - due / self.UPDATES) ** 3)
            weights = prunable(pl_module)
            _make_permanent(weights)
            prune.global_unstructured(weights, prune.L1Unstructured, amount=share)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the zeros permanent."""
        _make_permanent(prunable(pl_module))


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
def _lightning_kept_quiet() -> Iterator[None]:
    """Leave out Lightning's lines about devices, and its advice that does not fit here."""
    loggers = [logging.getLogger(f"pytorch_lightning.{n}") for n in _CHATTY]
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


_CHATTY: tuple[Any, ...] = ("utilities.rank_zero", "accelerators.cuda")
