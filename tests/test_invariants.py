"""The contract of a clustered weight, over every layer, init, k, dtype, granularity, assignment."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from layers import LAYERS, Layer
from torch import Tensor, nn

from torchclust import Clustering, cluster_, is_clustered, named_clusterings, restore_, strip_
from torchclust.weight.config import Init

SHARING: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 2},
    "int8": {"codebook_dtype": "int8"},
}
# LSTM with projections has no oneDNN kernel and says so once (torch 2.13, RNN.cpp, 2026-11-23)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def distinct(weight: Tensor, clustering: Clustering) -> int:
    """Values in the fullest codebook, counted without the package's help."""
    rows = weight.detach().transpose(0, clustering.channel_dim).flatten(1)
    config, codes, scale = clustering.config, clustering.codes, clustering.scale
    if codes is not None and scale is not None:
        assert torch.equal(codes, -codes.flip(0)), "symmetric"
        assert 0 in codes
        products = scale[:, None] * codes.to(scale.dtype)
        assert (rows[:, :, None] == products[:, None, :]).any(2).all(), "scale times code"
        return len(codes)
    size = {"channel": 1, "group": config.group_size}.get(config.granularity) or len(rows)
    values = rows.double().numpy()
    return max(len(np.unique(values[i : i + size])) for i in range(0, len(rows), size))


def weights_of(model: nn.Module, layer: Layer) -> dict[str, Tensor]:
    found = {}
    for name in layer.weights:
        path, _, attribute = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), attribute)
    return found


def counts(model: nn.Module, layer: Layer, like: nn.Module) -> list[int]:
    """Distinct values of every weight; what they are clustered by is read off ``like``."""
    clusterings = dict(named_clusterings(like))
    assert set(clusterings) == set(layer.weights)
    return [distinct(w, clusterings[name]) for name, w in weights_of(model, layer).items()]


def step(model: nn.Module, layer: Layer, dtype: torch.dtype, steps: int) -> None:
    rate = 0.5 if dtype == torch.bfloat16 else 0.05  # a smaller step can round to none at all
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        layer.call(model, dtype).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer: str, dtype: torch.dtype, sharing: str, assignment: str) -> None:
    """At most k values: fitted, trained, stripped, restored, copied; strip changes no bit."""
    kind, options = LAYERS[layer], SHARING[sharing]
    torch.manual_seed(0)
    for init in get_args(Init):
        for k in (3, 8):
            plain = kind.make().to(dtype)
            if min(w.numel() for w in weights_of(plain, kind).values()) <= k:
                continue
            model = cluster_(copy.deepcopy(plain), k, init=init, assignment=assignment, **options)
            case = (layer, init, k)
            assert max(counts(model, kind, model)) <= k, case
            before = {n: w.detach().clone() for n, w in weights_of(model, kind).items()}
            step(model, kind, dtype, 2)
            assert any(not torch.equal(before[n], w) for n, w in weights_of(model, kind).items())
            assert max(counts(model, kind, model)) <= k, case
            with torch.no_grad():
                output = kind.call(model, dtype)
            twin = copy.deepcopy(model)
            restored = restore_(copy.deepcopy(plain), model.state_dict())
            for other in (twin, restored):
                assert max(counts(other, kind, other)) <= k, case
                with torch.no_grad():
                    assert torch.equal(kind.call(other, dtype), output), case
            strip_(twin)
            assert not is_clustered(twin)
            assert max(counts(twin, kind, model)) <= k, case
            assert type(twin) is type(plain)
            assert list(twin.state_dict()) == list(plain.state_dict())
            assert [n for n, _ in twin.named_parameters()] == [
                n for n, _ in plain.named_parameters()
            ]
            assert {p.dtype for p in twin.parameters()} == {dtype}
            with torch.no_grad():
                assert torch.equal(kind.call(twin, dtype), output), case
                assert torch.equal(kind.call(model, dtype), output), "the copy's strip reached it"
