"""`round_mantissas_`: which tensors, how far, and what it saves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from torchclust import cluster_, load_packed_, round_mantissas_, save_packed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1))
    norm = model[1]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 3)
    norm.num_batches_tracked.fill_(1234567)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 8, 12])
def test_vectors_keep_their_significant_bits(bits: int, dtype: torch.dtype) -> None:
    model = cluster_(network().to(dtype), {"0.weight": 8, "3.weight": None})
    before = copy.deepcopy(model.state_dict())
    assert round_mantissas_(model, bits) is model
    for name, after in model.state_dict().items():
        old = before[name]
        if old.dim() != 1 or old.dtype != dtype or "parametrizations" in name:
            assert torch.equal(old, after), name
            continue
        assert ((after - old).abs() <= old.abs() * 2**-bits).all(), name
        assert not torch.equal(old, after), name
        mantissa = torch.frexp(after)[0] * 2**bits
        assert torch.equal(mantissa, mantissa.round()), name
    assert (model[1].running_var > 0).all()
    again = copy.deepcopy(model.state_dict())
    state = round_mantissas_(model, bits).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in again)


def test_odd_values_stay() -> None:
    layer = nn.Linear(1, 6)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4028235e38, -float("inf")])
    layer.bias.data.copy_(odd)
    round_mantissas_(layer)
    expected = odd.clone()
    assert torch.equal(layer.bias.view(torch.int32), expected.view(torch.int32))


def test_norms_and_biases_pack_into_less(tmp_path: Path) -> None:
    """The file is smaller by 8 of their 24 bits and more, loads to the bit, and does as much."""
    model = cluster_(network(), 16)
    images = torch.randn(8, 3, 9, 9)
    outputs = model(images).detach()
    whole = save_packed(model, tmp_path / "whole")
    short = save_packed(round_mantissas_(model), tmp_path / "short")
    vectors = [row.name for row in whole.rows if len(row.shape) == 1]
    assert len(vectors) == 6
    saved = whole.bytes - short.bytes
    assert saved > 6 * 64 * 1.1
    sizes = {row.name: row.bytes for row in short.rows}
    assert all(sizes[name] < 64 * 2.3 + 30 for name in vectors)
    loaded = load_packed_(network(), tmp_path / "short")
    got = loaded(images).detach()
    assert torch.equal(got, model(images).detach())
    assert float((got - outputs).square().mean() / outputs.var()) < 1e-4


@pytest.mark.parametrize("bits", [8.5, "8", True, None])
def test_bits_are_whole(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be a whole number, got"):
        round_mantissas_(nn.Linear(2, 2), bits)


@pytest.mark.parametrize("bits", [1, 25, 0, -3])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be between 2 and 24, got {bits}"):
        round_mantissas_(nn.Linear(2, 2), bits)
