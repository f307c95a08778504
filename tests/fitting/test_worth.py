"""What is worth no bits becomes 0, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from torchclust.fitting.worth import without_noise


def test_only_what_is_buried_becomes_zero() -> None:
    weight = torch.tensor([[1.0, -0.9e-5, 1.1e-5], [1e-32, -1e-32, 0.0]])
    assert torch.equal(without_noise(weight), torch.tensor([[1.0, 0.0, 1.1e-5], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("weight", [torch.randn(4, 4), torch.zeros(3, 3), torch.empty(0, 2)])
def test_a_weight_that_matters_is_itself(weight: torch.Tensor) -> None:
    assert without_noise(weight) is weight


def test_importance_weighs_squares() -> None:
    weight = torch.ones(2, 3)
    importance = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.9e-10, 1.1e-10]])
    assert torch.equal(
        without_noise(weight, importance), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    )
    assert without_noise(weight, torch.zeros(2, 3)) is weight  # says nothing


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_no_magnitude_leaves_the_range(scale: float) -> None:
    weight = torch.tensor([1.0, 1e-6]) * scale
    assert without_noise(weight).count_nonzero() == 1
