"""cluster_ says where clustering costs more bits than it saves."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import torchclust
from torchclust.fitting.worth import plain_int8_bits


def outliers() -> nn.Linear:
    """One weight of each row is a hundred times the others: plain int8 leaves these 0, 1 or -1."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[:, 0] = 12.0
    return layer


@pytest.mark.parametrize("aware", [False, True])
def test_a_tensor_that_gets_larger_is_named(aware: bool) -> None:
    options = {"inputs": torch.randn(64, 64)} if aware else {}
    with pytest.warns(UserWarning, match=r"'weight' gets larger, not smaller: .* 64 clusters") as w:
        torchclust.cluster_(outliers(), 64, **options)
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchclust.cluster_(outliers(), 4, codebook_dtype="int8", **options)
        torchclust.cluster_(nn.Linear(64, 64), 64, codebook_dtype="int8", **options)


def test_plain_bits_are_those_of_int8_codes_by_channel() -> None:
    weight = torch.randn(8, 3, 3, 3) * torch.logspace(-1, 1, 8)[:, None, None, None]
    weight[0] = 1e-30
    peaks = weight.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    codes = torch.where(peaks > 1e-20, weight / peaks * 127, 0).round()
    share = codes.unique(return_counts=True)[1] / codes.numel()
    assert plain_int8_bits(weight) == pytest.approx(float(-(share * share.log2()).sum()), abs=1e-4)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), outliers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="gets larger, not smaller"):
            torchclust.cluster_(model, 64)
    assert not torchclust.is_clustered(model)


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_weights_in_any_memory_order(assignment: str) -> None:
    """As a kernel of Keras has it, transposed, or a convolution with its channels last."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.ConvTranspose2d(1, 16, 3))
    model[0].weight.data = model[0].weight.data.t()
    model[2].to(memory_format=torch.channels_last)
    before = [p.detach().clone().contiguous() for p in model.parameters()]
    torchclust.cluster_(model, 4, assignment=assignment)
    assert [name for name, _ in torchclust.named_clusterings(model)] == ["0.weight", "2.weight"]
    torchclust.strip_(model)
    assert all((a - b).norm() < b.norm() for a, b in zip(model.parameters(), before, strict=True))
