"""The price of bits rises from nothing over the first half of what is clustered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from torchclust.lightning.price import share_of_price


def trainer(
    batch: int,
    a_pass: float = 10,
    epochs: int | None = 10,
    steps: int = -1,
    optimizers: int = 1,
    accumulated: int = 1,
) -> Any:
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch)),
        num_training_batches=a_pass,
        max_epochs=epochs,
        max_steps=steps,
        optimizers=[None] * optimizers,
        accumulate_grad_batches=accumulated,
    )


@pytest.mark.parametrize(
    ("batch", "start_epoch", "share"),
    [(0, 0, 0.0), (25, 0, 0.5), (50, 0, 1.0), (99, 0, 1.0), (40, 4, 0.0), (55, 4, 0.5), (70, 4, 1)],
)
def test_rises_to_the_middle_of_the_clustered_epochs(
    batch: int, start_epoch: int, share: float
) -> None:
    """Whichever end a run has: epochs, steps, steps of several batches, or of two optimizers."""
    for run in (
        trainer(batch),
        trainer(batch, epochs=None, steps=100),
        trainer(batch, epochs=1000, steps=100),
        trainer(batch, epochs=-1, steps=20, accumulated=5),
        trainer(batch, epochs=-1, steps=200, optimizers=2),  # global_step counts those of both
    ):
        assert share_of_price(run, start_epoch) == pytest.approx(share)


def test_is_whole_where_no_end_is_set() -> None:
    assert share_of_price(trainer(0, epochs=-1), 0) == 1.0
    assert share_of_price(trainer(0, a_pass=math.inf), 0) == 1.0
    assert share_of_price(trainer(0, a_pass=math.inf, steps=100), 0) == 0.0
