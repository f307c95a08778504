"""Second moments of few samples: how wrong they are, and what is made of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.data_aware.input_moments import InputMoments
from torchclust.data_aware.shrinkage import covariances, shrunk

D = 24


def inputs(samples: int, seed: int, d: int = D) -> Tensor:
    """Correlated, and not around 0."""
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(1)) / d**0.5
    drawn = torch.randn(samples, d, generator=torch.Generator().manual_seed(seed))
    return (drawn * torch.linspace(0.2, 2, d)) @ mixing + 0.5


def moments_of(x: Tensor) -> InputMoments:
    return InputMoments.of(nn.Linear(x.shape[-1], 1), [(x, x)])


@pytest.mark.parametrize("repeated", [1, 5], ids=["rows", "alike positions"])
@pytest.mark.parametrize("centre", [False, True])
def test_doubt_is_the_expected_squared_error(centre: bool, repeated: int) -> None:
    truth = moments_of(inputs(200_000, 0))
    wanted = covariances(truth.zz, truth.z, truth.z) if centre else truth.zz
    said, found = [], []
    for seed in range(1, 60):
        x = inputs(40, seed)[:, None].expand(-1, repeated, -1)
        moments = moments_of(x)
        said.append(float(moments.doubt[int(centre)]))
        got = covariances(moments.zz, moments.z, moments.z) if centre else moments.zz
        found.append(float((got - wanted).square().sum()))
    assert sum(said) / sum(found) == pytest.approx(1, abs=0.25)


def test_shrinking_comes_close_to_the_best_share() -> None:
    truth = moments_of(inputs(200_000, 0))
    wanted = covariances(truth.zz, truth.z, truth.z)
    level = wanted.diagonal(dim1=1, dim2=2).mean() * torch.eye(D).double()
    got, best, raw_error = 0.0, 0.0, 0.0
    for seed in range(1, 21):
        moments = moments_of(inputs(24, seed))
        raw = covariances(moments.zz, moments.z, moments.z)
        found, kept, added = shrunk(raw, moments.doubt[1])
        assert torch.allclose(found, kept * raw + added * torch.eye(D))
        every = [(1 - s) * raw + s * level for s in torch.linspace(0, 1, 51)]
        errors = [float((tried - wanted).square().sum()) for tried in every]
        got += float((found - wanted).square().sum())
        best, raw_error = best + min(errors), raw_error + errors[0]
    assert got < 0.75 * raw_error
    assert got < 1.2 * best


def test_what_can_not_be_doubted_stays() -> None:
    one = moments_of(inputs(1, 0))
    assert not one.doubt.any()
    raw = moments_of(inputs(50, 0)).zz
    assert torch.equal(shrunk(raw, torch.zeros(1))[0], raw)
    equal = torch.eye(3).double()[None]
    assert torch.allclose(shrunk(equal, torch.zeros(1))[0], equal)
    assert torch.allclose(shrunk(0 * equal, torch.zeros(1))[0], 0 * equal)


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_fewer_samples_than_inputs_do_no_harm(rate: float) -> None:
    """Where they do not vary errors seem to cost nothing, and with a price every bit was saved."""
    torch.manual_seed(0)
    d = 256
    layer, x, others = nn.Linear(d, 48), inputs(64, 1, d), inputs(2000, 2, d)

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(others) - layer(others)).square().mean())

    few, many = (
        cluster_(copy.deepcopy(layer), 15, codebook_dtype="int8", rate=rate, inputs=seen)
        for seen in (x, inputs(4000, 3, d))
    )
    blind = cluster_(copy.deepcopy(layer), 15, codebook_dtype="int8", rate=rate)
    assert error(many) < error(few) < error(blind)
