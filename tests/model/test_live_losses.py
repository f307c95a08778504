"""A model changes its structure while a loss of the old one is still alive, as in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_, load_packed_, refit_, restore_, save_packed, strip_

MAKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 32),
    "rnn": lambda: nn.LSTM(32, 16),
    "tied": lambda: tied(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.ConvTranspose2d(2, 8, 3), nn.Flatten()
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "int8": {"codebook_dtype": "int8"},
    "nearest": {"assignment": "nearest"},
}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    return model


def loss(model: nn.Module) -> Tensor:
    found = model(torch.linspace(-1, 1, 128).view(4, 32))
    return (found if isinstance(found, Tensor) else found[0]).square().mean()


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["cluster", "again", "strip", "refit", "restore", "packed"])
def test_the_next_loss_has_gradients(change: str, mode: str, make: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = MODES[mode]
    model, other = MAKE[make](), cluster_(MAKE[make](), 8, **options)
    if change != "cluster":
        cluster_(model, 16, **options)
    alive = loss(model)
    alive.backward()
    if change in ("cluster", "again"):
        cluster_(model, 8, **options)
    elif change == "restore":
        restore_(model, other.state_dict())
    elif change == "packed":
        save_packed(other, tmp_path / "small")
        load_packed_(model, tmp_path / "small")
    else:
        {"strip": strip_, "refit": refit_}[change](model)
    for name, parameter in model.named_parameters():  # or an optimizer's next step would fail
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, name
    model.zero_grad()
    loss(model).backward()
    fresh = MAKE[make]()
    if change != "strip":
        restore_(fresh, model.state_dict())
    else:
        fresh.load_state_dict(model.state_dict())
    loss(fresh).backward()
    for (name, got), (_, want) in zip(
        model.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert got.grad is not None, name
        assert got.grad.shape == got.shape, name
        torch.testing.assert_close(got.grad, want.grad)
    assert alive.grad_fn is not None


def test_the_parameter_stays_the_same_object() -> None:
    """An optimizer that holds it trains on, as before."""
    model = cluster_(nn.Linear(32, 32), 16)
    held = model.parametrizations.weight.original
    assert strip_(model).weight is held
