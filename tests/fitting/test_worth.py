"""What is worth no bits becomes 0, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from torchclust.fitting.worth import plain_int8_bits, without_dead_channels, without_noise


def test_only_dead_channels_become_zero() -> None:
    """Single weights do not: beside the largest of their channel they take the code 0 anyway."""
    rows = torch.tensor([[1.0, -0.9e-6, 0.0], [0.0, 1.1e-5, 1e-32], [0.9e-5, -1e-32, 0.0]])
    kept = torch.where(torch.tensor([[1], [1], [0]]).bool(), rows, 0)
    assert torch.equal(without_dead_channels(rows), kept)
    assert torch.equal(without_dead_channels(rows.double().view(3, 1, 3)).view(3, 3).float(), kept)


@pytest.mark.parametrize(
    "weight", [torch.randn(4, 4), torch.zeros(3, 3), torch.empty(0, 2), torch.tensor([1e-9, 1.0])]
)
def test_a_weight_that_matters_is_itself(weight: torch.Tensor) -> None:
    assert without_dead_channels(weight) is weight
    assert without_noise(weight[:1], torch.ones_like(weight[:1])) is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_refused_later_is_left_alone(value: float) -> None:
    rows = torch.tensor([[value, 1.0], [1e-9, 1e-9]])
    assert without_dead_channels(rows) is rows
    assert without_noise(rows, torch.ones(2, 2)) is rows


def test_effects_weigh_squares() -> None:
    weight = torch.ones(2, 3)
    effect = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.9e-10, 1.1e-10]])
    assert torch.equal(
        without_noise(weight, effect), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    )
    assert without_noise(weight, torch.zeros(2, 3)) is weight  # says nothing


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_no_magnitude_leaves_the_range(scale: float) -> None:
    weight = torch.tensor([[1.0], [1e-6]]) * scale
    assert without_dead_channels(weight).count_nonzero() == 1
    assert without_noise(weight, torch.ones(2, 1)).count_nonzero() == 1


def test_plain_int8_of_weights_in_any_order_and_of_any_size() -> None:
    rows = torch.randn(8, 6)
    bits = plain_int8_bits(rows)
    assert plain_int8_bits(rows.t().contiguous().t()) == bits
    assert plain_int8_bits(rows.double() * 1e300) == bits
