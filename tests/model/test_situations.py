"""Situations from the bug trackers of other tools; docs/situations.md has their sources."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torchclust import cluster_, named_clusterings, strip_


def model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return cluster_(layers, 16, **options)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 128).view(4, 32)


def test_an_ema_handler_that_averages_buffers() -> None:
    source = model()
    average = copy.deepcopy(source)
    with torch.no_grad():
        for _ in range(3):
            for mine, theirs in zip(average.buffers(), source.buffers(), strict=True):
                mine.copy_(mine * (1 - 1e-4) + theirs * 1e-4)
    torch.testing.assert_close(average(inputs()), source(inputs()))


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9998, 0.9999])
def test_a_state_dict_averaged_in_place(decay: float) -> None:
    source = model(codebook_dtype="int8")
    average = copy.deepcopy(source)
    with torch.no_grad():
        for _ in range(3):
            pairs = zip(average.state_dict().values(), source.state_dict().values(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(decay * mine + (1 - decay) * theirs)
    torch.testing.assert_close(average(inputs()), source(inputs()))


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9998, 0.9999])
def test_checkpoints_averaged_into_new_tensors(decay: float) -> None:
    """Their integers have become floats, some a little less than they were."""
    source = model()
    state = source.state_dict()
    averaged = {k: v * decay + v * (1 - decay) for k, v in state.items()}
    loaded = copy.deepcopy(source)
    loaded.load_state_dict(averaged)
    torch.testing.assert_close(loaded(inputs()), source(inputs()))


def test_checkpoints_whose_integers_were_summed() -> None:
    source = model()
    state = source.state_dict()
    summed = {k: v if v.is_floating_point() else v + v for k, v in state.items()}
    with pytest.raises(RuntimeError, match="config_json is damaged"):
        copy.deepcopy(source).load_state_dict(summed)


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_over_a_shared_layer(assignment: str, reentrant: bool) -> None:
    clustered = model(assignment=assignment)
    grads = []
    for wrapped in (False, True):
        x = inputs().requires_grad_()
        y: Any = x
        for _ in range(2):
            y = checkpoint(clustered, y, use_reentrant=reentrant) if wrapped else clustered(y)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in clustered.parameters() if p.grad is not None])
        clustered.zero_grad()
    torch.testing.assert_close(grads[0], grads[1])


def test_a_pruned_model_after_a_step_can_be_copied_once_clustered() -> None:
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    prune.l1_unstructured(layers[0], "weight", 0.5)
    layers(inputs()).sum().backward()
    cluster_(layers, 16, preserve_sparsity=True)
    assert torch.equal(copy.deepcopy(layers)(inputs()), layers(inputs()))
    assert float((layers[0].weight == 0).float().mean()) >= 0.5


def test_attributes_of_a_parameter_are_kept() -> None:
    layers = nn.Sequential(nn.Linear(32, 32))
    layers[0].weight.no_decay = True  # type: ignore[union-attr]
    cluster_(layers)
    assert layers[0].parametrizations.weight.original.no_decay
    assert strip_(layers)[0].weight.no_decay


def test_fewer_weights_in_a_channel_than_clusters() -> None:
    plain = nn.Conv2d(1, 64, 3)
    before = plain.weight.detach().clone()
    assert torch.equal(strip_(cluster_(plain, 16, granularity="channel")).weight, before)


def test_a_penalty_on_the_weights_reaches_the_codebook() -> None:
    clustered = model()
    clustered[0].weight.square().sum().backward()
    trained = clustered[0].parametrizations.weight.original
    members = torch.bincount(next(named_clusterings(clustered))[1].indices.reshape(-1))
    torch.testing.assert_close(trained.grad, 2 * trained.detach() * members)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(32, 2)), nn.Parameter(torch.randn(2, 32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def test_a_low_rank_adapter_on_top() -> None:
    clustered = model()
    before = clustered(inputs())
    parametrize.register_parametrization(clustered[0], "weight", LowRank())
    assert torch.equal(clustered(inputs()), before)
    clustered[0].parametrizations.weight[1].a.data.normal_()
    with pytest.raises(ValueError, match="distinct values, more than n_clusters=16"):
        strip_(clustered)


def test_an_average_of_a_network_with_spectral_norm() -> None:
    """Its vectors would lose their length, were they still there."""
    layers = nn.Sequential(spectral_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    clustered = cluster_(layers, 16)
    assert [name for name, _ in clustered.named_buffers() if name.endswith(("_u", "_v"))] == []
    average = AveragedModel(clustered, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(clustered)
    assert torch.equal(average(inputs()), clustered(inputs()))
