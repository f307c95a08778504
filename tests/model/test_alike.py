"""Layers of one shape and one configuration, fitted in one pass, are as if each were alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchclust import cluster_, refit_
from torchclust.fitting.codebook import fit_codebook
from torchclust.model import alike, cluster
from torchclust.weight import codebooks


def many() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 20) for _ in range(3)] + [nn.Linear(8, 9) for _ in range(2)]
    layers[1].weight.data[:2] = 1e-32  # worth no bits
    layers[2].weight.data = layers[2].weight.data.mul(20).round() / 20  # few values
    return nn.Sequential(
        *layers, nn.Linear(20, 19), nn.ConvTranspose2d(4, 6, 2), nn.ConvTranspose2d(4, 6, 2)
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"assignment": "nearest"},
        {"granularity": "channel"},
        {"granularity": "group", "group_size": 3},
        {"preserve_sparsity": True},
        {"init": "density"},
        {"rate": 0.05},
        {"codebook_dtype": "int8"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_one_pass_is_as_many(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = many()
    plain = copy.deepcopy(model)
    cluster_(model, 8, **options)
    for module in (codebooks, alike):
        monkeypatch.setattr(module, "can_be_stacked", lambda *_: False)
    assert same(cluster_(plain, 8, **options), model)


def test_float_layers_alike_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []

    def counted(values: torch.Tensor, *arguments: Any, **options: Any) -> object:
        fitted.append(values.numel())
        return fit_codebook(values, *arguments, **options)

    monkeypatch.setattr(codebooks, "fit_codebook", counted)
    model = cluster_(many(), 8)
    assert fitted == [20 * 19]
    refit_(model)
    assert fitted == [20 * 19] * 2


def test_importance_is_a_fit_of_its_own() -> None:
    model = many()
    importance = {"1.weight": torch.rand(20, 20)}
    expected = fit_codebook(model[1].weight.masked_fill(model[1].weight < 1e-20, 0), 8)
    cluster_(model, 8, importance=importance)
    assert len(model[1].weight.unique()) <= 8
    assert not torch.equal(model[1].parametrizations.weight.original, expected.centroids)


def test_a_nan_among_layers_alike_is_named() -> None:
    model = many()
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"cannot cluster '1\.weight' \(Linear\): .*must be finite"
    ):
        cluster_(model, 8)
    assert type(model[0]) is nn.Linear
    assert cluster.books_of_alike([], {}) == {}
