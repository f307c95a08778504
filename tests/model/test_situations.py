"""Situations from the bug trackers of other tools; docs/situations.md has their sources."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torchclust import (
    cluster_,
    load_packed_,
    named_clusterings,
    refit_,
    restore_,
    save_packed,
    strip_,
    summary,
)


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


def works(layer: nn.Module) -> bool:
    return bool(layer(torch.randn(5, 32))[0].isfinite().all())


@pytest.mark.parametrize("change", ["cluster", "restore", "fit to inputs", "fit to NaN"])
def test_what_becomes_of_a_copy_does_not_concern_its_original(change: str) -> None:
    """A copy has its original's class, and torch keeps a parametrized tensor's property there."""
    original = weight_norm(nn.Linear(32, 32))
    copied = copy.deepcopy(original)
    if change == "cluster":
        cluster_(copied, 16)
    elif change == "restore":
        restore_(copied, cluster_(nn.Linear(32, 32), 16).state_dict())
    elif change == "fit to inputs":
        cluster_(original, 16, inputs=inputs())  # of which it makes a copy
    else:
        with pytest.raises(ValueError, match="batch 0 of the inputs holds NaN"):
            cluster_(original, 16, inputs=torch.full((8, 32), torch.nan))
    assert works(original)
    assert works(copied)


@pytest.mark.parametrize(
    ("layer", "first", "second"),
    [
        (nn.LSTM(32, 32), "weight_ih_l0", "weight_hh_l0"),
        (nn.Linear(32, 32), "weight", "bias"),
    ],
    ids=["LSTM", "Linear"],
)
def test_a_copy_may_be_clustered_further(layer: nn.Module, first: str, second: str) -> None:
    original = cluster_(layer, {first: 4})
    copied = cluster_(copy.deepcopy(original), {second: 4})
    assert works(original)
    assert [name for name, _ in named_clusterings(original)] == [first]
    assert [name for name, _ in named_clusterings(copied)] == [first, second]
    strip_(copied)
    assert works(original)
    assert works(copied)


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_what_stands_on_top_counts(assignment: str, tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([2.0]))

        def forward(self, weight: Tensor) -> Tensor:
            return self.factor * weight

    layer = cluster_(nn.Linear(32, 32), 4, assignment=assignment)
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    weight = layer.weight.detach().clone()
    save_packed(layer, tmp_path / "layer.packed")
    assert torch.equal(load_packed_(nn.Linear(32, 32), tmp_path / "layer.packed").weight, weight)
    plain = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="another parametrization on top of the clustered 'weight"):
        restore_(plain, layer.state_dict())
    assert type(plain) is nn.Linear
    assert torch.equal(restore_(copy.deepcopy(layer), layer.state_dict()).weight, weight)
    assert torch.equal(refit_(layer).weight, weight)


def test_a_summary_lists_what_cannot_be_clustered() -> None:
    layers = nn.ModuleDict({"lazy": nn.LazyLinear(4), "float8": nn.Linear(4, 4, bias=False)})
    layers["sparse"] = nn.Linear(4, 4, bias=False)
    layers["float8"].weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), False)
    layers["sparse"].weight = nn.Parameter(torch.eye(4).to_sparse())
    rows = {row.name: row for row in summary(layers).rows}
    assert "it is lazy" in rows["lazy.weight"].skipped
    assert "cluster it in bfloat16" in rows["float8.weight"].skipped
    assert "cluster it in dense form" in rows["sparse.weight"].skipped
    with pytest.raises(ValueError, match=r"dtype is torch.float8_e4m3fn; cluster it in bfloat16"):
        cluster_(layers, {"float8.weight": 4})


def test_a_summary_leaves_spectral_norm_where_it_was() -> None:
    layer = spectral_norm(nn.Linear(32, 32)).train()
    before = copy.deepcopy(layer.state_dict())
    summary(layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer.parametrizations.weight[0].training


def test_half_precision_holds_every_evenly_spaced_centroid() -> None:
    layer = nn.Linear(64, 64).half()
    layer.weight.data.uniform_(-1, 1).mul_(6e4)
    cluster_(layer, 64, assignment="nearest", rate=0.05)
    assert layer.weight.isfinite().all()
