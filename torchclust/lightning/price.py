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
    only, so that a resumed run goes on as it would have. They are counters of batches: with manual
    optimization nothing tells how many of these make a step.
    """
    length, a_pass = length_of_run(trainer), float(trainer.num_training_batches)
    begun = start_epoch * a_pass if start_epoch and math.isfinite(a_pass) else 0.0
    if not math.isfinite(length) or length <= begun:
        return 1.0
    done = (trainer.fit_loop.epoch_loop.total_batch_idx - begun) / (length - begun)
    return min(1.0, max(0.0, done / _RISE))


def length_of_run(trainer: Trainer) -> float:
    """Batches until the run ends, by epochs or by steps; infinite where neither is set.

    With manual optimization a batch is taken for one step of each optimizer.
    """
    ends, epochs, steps = [math.inf], trainer.max_epochs, trainer.max_steps
    if epochs is not None and epochs >= 0:
        ends.append(epochs * float(trainer.num_training_batches))
    if steps >= 0:
        ends.append(steps * trainer.accumulate_grad_batches / max(1, len(trainer.optimizers)))
    return min(ends)


def charge(
    trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, start_epoch: int
) -> None:
    """Charge the weights that an optimizer holds for their bits, if these have a price."""
    if is_priced(pl_module):
        share = share_of_price(trainer, start_epoch)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        charge_(pl_module, share, parameters=held)
