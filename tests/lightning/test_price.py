"""The price of bits rises from nothing over the first half of what is clustered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from torchclust.lightning.price import share_of_price


def trainer(step: int, steps: float = 100, epochs: int = 10, optimizers: int = 1) -> Any:
    return SimpleNamespace(
        global_step=step,
        estimated_stepping_batches=steps,
        max_epochs=epochs,
        optimizers=[None] * optimizers,
    )


@pytest.mark.parametrize(
    ("step", "start_epoch", "share"),
    [(0, 0, 0.0), (25, 0, 0.5), (50, 0, 1.0), (99, 0, 1.0), (40, 4, 0.0), (55, 4, 0.5), (70, 4, 1)],
)
def test_rises_to_the_middle_of_the_clustered_epochs(
    step: int, start_epoch: int, share: float
) -> None:
    assert share_of_price(trainer(step), start_epoch) == pytest.approx(share)
    two = trainer(2 * step, optimizers=2)  # global_step counts the steps of both
    assert share_of_price(two, start_epoch) == pytest.approx(share)


def test_is_whole_where_no_end_is_set() -> None:
    assert share_of_price(trainer(0, steps=math.inf, epochs=-1), 0) == 1.0
