"""The price of bits in training: gradients, counts, assignments, state."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from layers import LAYERS
from torch import Tensor, nn

from torchclust import charge_, cluster_, named_clusterings, refit_, restore_, strip_
from torchclust.fitting.nearest import count_below, priced_midpoints
from torchclust.weight.bits import bits_of, slopes_between
from torchclust.weight.clustered import ClusteredWeight

SHARING: list[dict[str, Any]] = [
    {},
    {"codebook_dtype": "int8"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 5},
    {"preserve_sparsity": True},
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def make(rate: float = 0.05, seed: int = 0, **options: Any) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(60, 32)
    nn.init.normal_(layer.weight)
    return cluster_(layer, 9, **{"assignment": "nearest", "rate": rate, **options})


def lookup_of(layer: nn.Module) -> ClusteredWeight:
    found = layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
    assert isinstance(found, ClusteredWeight)
    return found


def latent_of(layer: nn.Module) -> Tensor:
    latent: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return latent


def slopes_of_bits(weights: Tensor, table: Tensor, bits: Tensor) -> Tensor:
    return slopes_between(table, bits)[count_below(weights, table[1:-1]).long()]


def entropy(layer: nn.Module) -> float:
    ((_, clustering),) = named_clusterings(layer)
    counts = torch.bincount(clustering.indices.flatten().int()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def train(layer: nn.Module, steps: int = 60, share: float | None = None) -> nn.Module:
    generator, inputs = torch.Generator().manual_seed(1), latent_of(layer).shape[1]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    with torch.no_grad():
        teacher = latent_of(layer).clone()
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(64, inputs, generator=generator)
        (layer(x) - x @ teacher.T).square().mean().backward()
        charge_(layer, min(1.0, 2 * step / steps) if share is None else share)
        optimizer.step()
    return layer


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_every_weight_takes_what_costs_least(options: dict[str, Any]) -> None:
    """Distance plus price, written out over all centroids."""
    layer = make(rate=0.3, **options)
    ((_, clustering),) = named_clusterings(layer)
    lookup = lookup_of(layer)
    table = lookup._table(lookup._codebook(lookup.trained(latent_of(layer)))).detach()
    table, bits = (t.expand(32, -1) for t in (table, lookup.bits()))
    unit = clustering.scale if clustering.scale is not None else torch.ones(32)
    price = 0.3 * clustering.latent.var(correction=0) * unit.square() / unit.square().mean()
    price = price[:, None, None]  # of an int8 codebook in squares of each channel's scale
    costs = (latent_of(layer)[..., None] - table[:, None]).square() + price * bits[:, None]
    taken = costs.gather(2, clustering.indices[..., None].long()).squeeze(2)
    assert torch.allclose(taken, costs.amin(2), atol=1e-5)
    nearest = (latent_of(layer)[..., None] - table[:, None]).abs().argmin(2)
    assert (nearest != clustering.indices).any()


def test_the_gradient_is_that_of_the_expected_bits_under_dither() -> None:
    """Against a numerical one: bits of the nearest centroid, averaged over a cell's width."""
    table = torch.arange(-3.0, 4.0).double() * 0.5
    bits = torch.tensor([9.0, 6, 3, 0.5, 2, 7, 11]).double()
    noise = (torch.arange(20_000).double() + 0.5) / 20_000 * 0.5 - 0.25
    weights = torch.linspace(-1.4, 1.4, 23).double()

    def expected(w: Tensor) -> Tensor:
        nearest = ((w[:, None] + noise)[..., None] - table).abs().argmin(-1)
        return bits[nearest].mean(1)

    step = 1e-3
    numeric = (expected(weights + step) - expected(weights - step)) / (2 * step)
    away = (weights / 0.5 - (weights / 0.5).round()).abs() > 0.01  # a slope changes at centroids
    got = slopes_of_bits(weights, table, bits)
    assert torch.allclose(got[away], numeric[away], rtol=0.06)


def test_a_dead_centroid_is_no_wall() -> None:
    """Weights beyond one that has lost its members are still pulled to the cheapest."""
    table = torch.arange(-3.0, 4.0)
    members = torch.tensor([0.0, 300, 0, 20_000, 0, 200, 1])
    weights = torch.tensor([-2.9, -2.1, -1.9, -1.1, -0.9, -0.1, 0.1, 0.9, 1.1, 1.9, 2.1])
    slopes = slopes_of_bits(weights, table, bits_of(members))
    assert (slopes * weights.sign() > 1).all()
    assert torch.allclose(slopes[2:6], slopes[2])
    two = slopes_between(table.expand(2, -1), bits_of(torch.stack([members, members.flip(0)])))
    one = slopes_between(table, bits_of(members))
    assert torch.allclose(two, torch.stack([one, -one.flip(0)]))


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_weights_that_are_not_needed_end_alike(options: dict[str, Any]) -> None:
    """No loss but the price: whatever spacing and granularity, everything becomes cheap."""
    layer = make(rate=0.2, **options)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for step in range(400):
        optimizer.zero_grad()
        (0 * layer(torch.zeros(2, 60)).sum()).backward()
        charge_(layer, min(1.0, step / 100))
        optimizer.step()
    alike = layer.weight == layer.weight.mode(1).values[:, None]
    assert alike.float().mean() > 0.97


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_codebooks_start_even_and_stand_still(options: dict[str, Any]) -> None:
    layer = make(rate=0.1, **options)
    lookup = lookup_of(layer)
    before = lookup._codebook(lookup.trained(latent_of(layer))).clone()
    table = lookup._table(before).detach()
    gaps = table.diff(dim=-1)
    assert torch.allclose(gaps, gaps[..., :1].expand_as(gaps), rtol=1e-4)
    assert (table == 0).any(-1).all()
    # nine values for a normal distribution: the step that pays, 0.93, not what the range would give
    assert gaps.mean() == pytest.approx(0.93, rel=0.15)
    train(layer)
    assert torch.equal(before, lookup._codebook(lookup.trained(latent_of(layer))))


def test_it_adds_to_the_gradient_what_the_loss_would_gain() -> None:
    layer = make()
    layer(torch.randn(4, 60)).sum().backward()
    before, lookup = latent_of(layer).grad.clone(), lookup_of(layer)
    table = lookup.trained(latent_of(layer)).detach().sort().values
    slopes = slopes_of_bits(latent_of(layer).detach(), table, lookup.bits())
    charge_(layer, 0.5)
    added = latent_of(layer).grad - before
    assert torch.allclose(added, 0.5 * 4 * 0.05 / (32 * 60) * slopes, atol=1e-6)


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_a_price_makes_fewer_bits(options: dict[str, Any]) -> None:
    cheap, free = train(make(rate=0.5, **options)), train(make(rate=1e-9, **options))
    assert entropy(cheap) < 0.8 * entropy(free)
    assert refit_(cheap) is cheap
    assert strip_(cheap).weight.unique().numel() <= 9 * 32


@pytest.mark.parametrize("n_clusters", [3, 9, 31, 200])
@pytest.mark.parametrize("options", SHARING, ids=str)
def test_one_search_finds_the_centroid_and_the_gap(
    n_clusters: int, options: dict[str, Any]
) -> None:
    """What a step assigns is what an evaluation does; the pull is that of the gap, looked up."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 32)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.weight[3] *= layer.weight[3].abs() > 0.5
    cluster_(layer, n_clusters, assignment="nearest", rate=0.05, **options)
    train(layer, steps=3)
    lookup, latent = lookup_of(layer), latent_of(layer)
    x = torch.ones(1, 300)
    trained = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), trained)
        places = lookup._places(lookup._codebook(lookup.trained(latent)))
        unit = torch.ones(32)
        if options.get("codebook_dtype") == "int8":
            unit = lookup._divisors()  # type: ignore[operator]
        tables, bits = places.expand(32, -1), lookup.bits().expand(32, -1)
        pulls = [
            slopes_of_bits(w, t, b)
            for w, t, b in zip(latent / unit[:, None], tables, bits, strict=True)
        ]
        wanted = torch.stack(pulls) / unit[:, None]
    latent.grad = torch.zeros_like(latent)
    charge_(layer)
    assert torch.allclose(latent.grad * latent.numel() / (4 * 0.05), wanted, rtol=1e-4, atol=1e-5)


def test_counts_follow_the_present_members() -> None:
    layer = train(make(), steps=40, share=1.0)
    for _ in range(60):  # the weights stand, the price follows their counts, and these the price
        layer(torch.randn(4, 60)).sum().backward()
        charge_(layer)
    ((_, clustering),) = named_clusterings(layer)
    counts = torch.bincount(clustering.indices.flatten().int(), minlength=len(clustering.centroids))
    running = lookup_of(layer).members
    assert torch.allclose(running.sum(), torch.tensor(32.0 * 60))
    assert (running - counts).abs().max() < 0.05 * 32 * 60
    assert bits_of(torch.tensor([8.0, 0.0])).tolist() == [
        pytest.approx(float(np.log2(9 / 8.5))),
        pytest.approx(float(np.log2(9 / 0.5))),
    ]


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_state_dict_copy_and_dtype(options: dict[str, Any]) -> None:
    layer = train(make(**options), steps=10)
    restored = restore_(nn.Linear(60, 32), layer.state_dict())
    assert torch.equal(restored.weight, layer.weight)
    train(restored, steps=5)
    train(copied := copy.deepcopy(restore_(nn.Linear(60, 32), layer.state_dict())), steps=5)
    assert torch.equal(restored.weight, copied.weight)
    train(layer, steps=5)
    assert torch.equal(restored.weight, layer.weight)
    half = layer.to(torch.bfloat16)
    half(torch.randn(2, 60, dtype=torch.bfloat16)).sum().backward()
    charge_(half)
    assert half.weight.isfinite().all()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_type_can_be_charged(layer: str) -> None:
    kind = LAYERS[layer]
    module = cluster_(kind.make(), 5, assignment="nearest", rate=0.1, codebook_dtype="int8")
    kind.call(module).square().sum().backward()
    before = {name: c.latent.clone() for name, c in named_clusterings(module)}
    charge_(module)
    torch.optim.SGD(module.parameters(), 0.1).step()
    for name, clustering in named_clusterings(module):
        assert clustering.latent.isfinite().all()
        assert not torch.equal(clustering.latent, before[name])


def test_only_what_is_assigned_anew_and_asked_for_is_charged() -> None:
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    rules: dict[str, Any] = {"0.weight": {"rate": 0.1}, "1.weight": {"rate": 0.1, "n_clusters": 4}}
    cluster_(net, {**rules, "2.weight": {"assignment": "fixed", "rate": 0.1}}, assignment="nearest")
    net(torch.randn(4, 20)).sum().backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    before = {name: parameter.grad.clone() for name, parameter in trained.items()}
    charge_(net, parameters=[latent_of(net[0])])
    changed = [name for name, p in trained.items() if not torch.equal(p.grad, before[name])]
    assert changed == ["0.parametrizations.weight.original"]


def test_a_share_is_between_nothing_and_all() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            charge_(make(), share)


def test_without_a_price_nothing_is_kept_and_nothing_is_charged() -> None:
    layer = make(rate=0.0)
    assert not any("members" in name or "price" in name for name in layer.state_dict())
    layer(torch.randn(4, 60)).sum().backward()
    before = latent_of(layer).grad.clone()
    assert torch.equal(latent_of(charge_(layer)).grad, before)


def test_dead_centroids_are_jumped_over() -> None:
    """Equal, dear and dead ones: boundaries ascend, and nobody is sent to them."""
    centroids = torch.tensor([-1.0, 0.0, 0.0, 0.5, 1.0])
    bits = torch.tensor([2.0, 0.2, 30.0, 30.0, 2.0])
    limits = priced_midpoints(centroids, bits, torch.tensor(0.05))
    assert (limits.diff() >= 0).all()
    taken = (torch.linspace(-2, 2, 401)[:, None] > limits).sum(1).unique().tolist()
    assert taken == [0, 1, 4]
