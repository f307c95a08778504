"""How much of the price of bits is charged at a moment of a Lightning run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from torchclust.model.charge import charge_, is_priced

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_RISE = 0.5  # of the clustered part of the run; in the rest weights settle at the whole price


def share_of_price(trainer: Trainer, start_epoch: int) -> float:
    """From 0 where clustering starts to 1 in the middle of what follows.

    Of a run without a set end the whole price is due at once. Depends on the trainer's counters
    only, so that a resumed run goes on as it would have.
    """
    steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    if not math.isfinite(steps) or steps <= 0:
        return 1.0
    begun = 0.0 if epochs is None or epochs <= 0 else start_epoch / epochs
    done = (trainer.global_step / max(1, len(trainer.optimizers)) / steps - begun) / (1 - begun)
    return min(1.0, max(0.0, done / _RISE))


def charge(
    trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, start_epoch: int
) -> None:
    """Charge the weights that an optimizer holds for their bits, if these have a price."""
    if is_priced(pl_module):
        share = share_of_price(trainer, start_epoch)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        charge_(pl_module, share, parameters=held)
