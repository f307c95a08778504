"""Integers of a clustered weight under tools that average models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_net import images, net, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from torchclust import ClusterConfig, cluster_, named_clusterings, restore_, strip_
from torchclust.weight.config import config_as_bytes, config_from_bytes

MODES: list[dict[str, Any]] = [
    {"assignment": a, "codebook_dtype": d}
    for a in ("fixed", "nearest")
    for d in ("float32", "int8")
]
DECAYS = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999)


def by_torch(decay: float) -> dict[str, Any]:
    return {"multi_avg_fn": get_ema_multi_avg_fn(decay)}


def one_by_one(decay: float) -> dict[str, Any]:
    return {"avg_fn": get_ema_avg_fn(decay)}


def mean(_: float) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("how", [by_torch, one_by_one, mean])
@pytest.mark.parametrize("decay", DECAYS)
def test_an_average_of_equal_models_is_the_model(
    decay: float, how: Callable[[float], dict[str, Any]], mode: dict[str, Any]
) -> None:
    model = cluster_(net(), 16, **mode).eval()
    averaged = AveragedModel(model, use_buffers=True, **how(decay)).eval()
    for _ in range(4):
        averaged.update_parameters(model)
    for (_, got), (_, want) in zip(
        named_clusterings(averaged.module), named_clusterings(model), strict=True
    ):
        assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(averaged(images()), model(images()), rtol=1e-5, atol=1e-6)
    restored = restore_(net().eval(), averaged.module.state_dict())
    assert torch.equal(restored(images()), averaged(images()))


def test_an_average_over_training_keeps_indices() -> None:
    model = cluster_(net(), 16)
    averaged = AveragedModel(model, use_buffers=True, **by_torch(0.9))
    for _ in range(5):
        train(model, 1)
        averaged.update_parameters(model)
    for (_, got), (_, want) in zip(
        named_clusterings(averaged.module), named_clusterings(model), strict=True
    ):
        assert torch.equal(got.indices, want.indices)
        assert not torch.equal(got.centroids, want.centroids)


def test_truncated_indices_are_never_used() -> None:
    """Where the model that was copied holds other indices by now."""
    model = cluster_(nn.Linear(32, 32), 16)
    averaged = AveragedModel(model, use_buffers=True, **by_torch(0.9999))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    model.load_state_dict(cluster_(nn.Linear(32, 32), 16).state_dict())
    with pytest.raises(RuntimeError, match=r"Average parameters only:  AveragedModel\(model, use_"):
        averaged(torch.ones(1, 32))


def test_an_average_outlives_the_model() -> None:
    model = cluster_(nn.Linear(32, 32), 16)
    averaged = AveragedModel(model, use_buffers=True, **by_torch(0.9999))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    value = model.weight.detach().clone()
    strip_(model)
    assert torch.equal(averaged.module.weight, value)


def test_state_dicts_averaged_by_hand() -> None:
    model = cluster_(net(), 16, codebook_dtype="int8")
    state = model.state_dict()
    averaged = {k: 0.9999 * v + 0.0001 * v for k, v in state.items()}
    restored = restore_(net(), averaged)
    torch.testing.assert_close(restored.eval()(images()), model.eval()(images()))
    truncated = {k: v.to(state[k].dtype) for k, v in averaged.items()}
    with pytest.raises(ValueError, match=r"config_json is damaged .*average of state dicts"):
        restore_(net(), truncated)


def test_others_may_write_indices() -> None:
    """Another state dict, and a process group's broadcast of all buffers, are no damage."""
    model, other = (cluster_(nn.Linear(32, 32), 16) for _ in range(2))
    want = other(torch.ones(1, 32))
    twin = copy.deepcopy(model)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(torch.ones(1, 32)), want)
    received = copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(
            [*received.parameters(), *received.buffers()],
            [*other.parameters(), *other.buffers()],
            strict=True,
        ):
            mine.copy_(theirs)
    assert torch.equal(received(torch.ones(1, 32)), want)


def test_assigning_a_weight_is_no_damage() -> None:
    layer = cluster_(nn.Linear(32, 32), 16)
    layer.weight = torch.randn(32, 32)
    assert layer(torch.ones(1, 32)).shape == (1, 32)


def test_configuration_as_bytes() -> None:
    config = ClusterConfig(7, codebook_dtype="int8")
    encoded: Tensor = config_as_bytes(config)
    assert config_from_bytes(encoded) == config
