"""Training for recipes: Lightning's `fit` with the recipe's options, and lower rates."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.lightning.optimizers import scale_rates
from torchclust.lightning.trees import TREES, Callback, tree_of
from torchclust.recipes.schema import FinetuneSection, PruneSection, Schedule

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


class Phase(NamedTuple):
    """What the recipe says of one call of `fit`."""

    epochs: int
    lr_scale: float = 1.0
    schedule: Schedule = "constant"
    freeze_batch_norm: bool = False

    @classmethod
    def of(cls, section: PruneSection | FinetuneSection) -> Phase:
        """Return the phase that a section of the recipe describes."""
        return cls(section.epochs, section.lr_scale, section.schedule, section.freeze_batch_norm)

    def callbacks(self) -> list[Callback]:
        """Return what makes a training this phase's, beside its epochs and its schedule."""
        lower = [LowerRates(self.lr_scale)] if self.lr_scale != 1 else []
        return [*lower, *([FrozenNorms()] if self.freeze_batch_norm else [])]


class FrozenNorms(Callback):
    """Let BatchNorms compute as in eval mode: by the statistics that they came with."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the modes, which Lightning keeps from here on."""
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.eval()


class LowerRates(Callback):
    """Multiply every optimizer's rates, as `WeightClustering` does, for the control."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the rates of the optimizers just built."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scale_rates(trainer.optimizers, schedulers, self.factor)


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
