"""The price of a bit in `cluster_(inputs=)`: fewer bits, for less output error than elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchclust import charge_, cluster_, named_clusterings
from torchclust.data_aware.compensation import Book, Target, compensate

CONFIGS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"codebook_dtype": "int8"},
    "channel": {"granularity": "channel"},
    "sparse": {"preserve_sparsity": True},
    "nearest": {"assignment": "nearest"},
}


def layer_and_inputs() -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    layer = nn.Linear(48, 40)
    nn.init.normal_(layer.weight)
    mixing = torch.randn(48, 48, generator=generator) / 4 + 0.2
    return layer, (torch.randn(200, 48, generator=generator) @ mixing).relu()


def bits(model: nn.Module) -> float:
    ((_, clustering),) = named_clusterings(model)
    indices = clustering.indices.flatten(1 if clustering.centroids.dim() > 1 else 0)
    total = 0.0
    for row in torch.atleast_2d(indices):
        counts = torch.bincount(row.int()).double()
        counts = counts[counts > 0]
        total += float((counts * (counts.sum() / counts).log2()).sum())
    return total / clustering.indices.numel()


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - reference(x)).square().mean())


@pytest.mark.parametrize("config", CONFIGS)
def test_fewer_bits_for_less_error_than_without_inputs(config: str) -> None:
    layer, x = layer_and_inputs()
    free = cluster_(copy.deepcopy(layer), 9, inputs=x, **CONFIGS[config])
    aware = cluster_(copy.deepcopy(layer), 9, inputs=x, rate=0.03, **CONFIGS[config])
    blind = cluster_(copy.deepcopy(layer), 9, rate=0.05, **CONFIGS[config])
    assert bits(aware) < 0.95 * bits(free)
    assert bits(aware) < 1.1 * bits(blind)
    assert error(aware, layer, x) < 0.85 * error(blind, layer, x)


def test_every_sweep_pays() -> None:
    """Error plus price is no more than where the compensation starts, nor than without a price."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=generator)
    hessian = root @ root.T / 20 + torch.eye(20)
    w = torch.randn(20, 12, generator=generator)
    target = Target(hessian, hessian @ w, torch.rand(12, generator=generator) + 0.5)
    values = torch.linspace(-2, 2, 9)[None]
    book = Book(values, torch.zeros(12, dtype=torch.int64), None, torch.zeros_like(values).bool())
    start = (w[..., None] - values[0]).abs().argmin(2)

    def cost(found: tuple[Book, Tensor], price: float) -> float:
        shared, indices = found
        paid = shared.bits(indices).T.gather(0, indices).sum()
        return target.error(shared.table().T.gather(0, indices)) + price * float(paid)

    free = compensate([target], book)
    for price in (0.01, 0.1, 1.0):
        priced = compensate([target], book, price=price, indices=start)
        assert cost(priced, price) <= min(cost((book, start), price), cost(free, price))


def test_bits_follow_from_counts_by_book_and_regardless_of_sign() -> None:
    indices = torch.tensor([[0, 2], [2, 2], [2, 1]])
    of_row = torch.tensor([0, 1])
    pinned = torch.zeros(2, 3, dtype=torch.bool)
    book = Book(torch.tensor([[0.0, 1, 2], [0, 1, 2]]), of_row, None, pinned)
    assert (book.bits(indices)[0].argmin(), book.bits(indices)[1].argmin()) == (2, 2)
    assert book.bits(indices)[0, 1] > book.bits(indices)[0, 0]
    scaled = Book(torch.tensor([[3.0]]), of_row * 0, torch.ones(2), pinned[:1, :1])
    assert torch.equal(scaled.bits(indices)[:, 0], scaled.bits(indices)[:, 2])


@pytest.mark.parametrize("config", [{}, {"granularity": "channel"}, {"codebook_dtype": "int8"}])
def test_charging_begins_with_the_members_that_there_are(config: dict[str, Any]) -> None:
    """Those of the indices that the inputs chose, not of the fit that they began with."""
    layer, x = layer_and_inputs()
    cluster_(layer, 9, inputs=x, rate=0.3, assignment="nearest", **config)
    ((_, clustering),) = named_clusterings(layer)
    lookup = clustering.module.parametrizations[clustering.tensor_name][0]
    latent = clustering.latent
    codebook = lookup._codebook(lookup.trained(latent))
    counts = lookup.members_of(lookup._indices(latent, codebook), codebook)
    assert torch.equal(lookup.members, counts.float())


def test_weights_stay_where_they_were_put_until_they_are_charged() -> None:
    layer, x = layer_and_inputs()
    cluster_(layer, 9, inputs=x, rate=0.05, assignment="nearest")
    lookup: Any = layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
    before = bits(layer)
    layer(x).sum().backward()
    charge_(layer, 1.0)
    assert lookup.price_share == 1
    assert bits(layer) <= before
