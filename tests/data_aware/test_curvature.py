"""What a bit costs where: the curvature of the model's outputs, against derivatives in full."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_, named_clusterings
from torchclust.data_aware.batches import calls
from torchclust.data_aware.curvature import curvatures
from torchclust.data_aware.input_moments import columns


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 4, 5),
    ).eval()


def in_full(net: nn.Sequential, at: int, x: Tensor, *, centred: bool) -> Tensor:
    """Squared derivatives of all outputs by each weight, a channel's over its inputs' variance."""
    weight, bias = net[at].weight.detach(), net[at].bias.detach()
    with torch.no_grad():
        fed, outputs = net[:at](x.clone()), net(x.clone())
    inputs = columns_of(net[at], fed)
    mean = inputs.mean((0, 2)) if centred else torch.zeros(inputs.shape[1])
    found = torch.zeros(len(weight), dtype=torch.float64)
    for sample in fed:

        def output(w: Tensor, b: Tensor, one: Tensor = sample[None]) -> Tensor:
            with_these = torch.func.functional_call(net[at], {"weight": w, "bias": b}, one.clone())
            return net[at + 1 :](with_these)[0]

        by_weight, by_bias = torch.autograd.functional.jacobian(output, (weight, bias))
        errors = by_weight.flatten(2) - by_bias[..., None] * mean
        found += errors.double().square().sum((0, 2))
    varying = (inputs - mean[:, None]).square().mean((0, 2)).sum()
    return found / len(x) / varying / (outputs.std().square() * outputs.shape[1])


def columns_of(layer: nn.Module, fed: Tensor) -> Tensor:
    """`(samples, d, positions)`."""
    if isinstance(layer, nn.Conv2d):
        return nn.functional.unfold(fed, layer.kernel_size, 1, layer.padding)
    return fed[:, :, None]


@pytest.mark.parametrize("centred", [False, True])
def test_one_backward_pass_finds_the_diagonal(centred: bool) -> None:
    net, x = network(), torch.randn(128, 2, 6, 6) + 0.5
    modules = {str(i): net[i] for i in (0, 2, 6)}
    found = curvatures(net, modules, calls(net, x), modules if centred else ())
    for name in modules:
        full = in_full(net, int(name), x, centred=centred)
        torch.testing.assert_close(found[name], full, rtol=0.35, atol=0)
        assert float(found[name].sum() / full.sum()) == pytest.approx(1, abs=0.12)


class Pooled(nn.Module):
    """A layer, and the mean of all its positions."""

    def __init__(self, layer: nn.Module, dim: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.layer, self.dim, self.last = layer, dim, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).relu().mean(self.dim))


POOLED = {
    "convolution": (lambda: Pooled(nn.Conv2d(4, 6, 3, padding=1), (-2, -1), 6), (4, 7, 7)),
    "groups": (lambda: Pooled(nn.Conv2d(4, 6, 3, 2, groups=2), (-2, -1), 6), (4, 7, 7)),
    "depthwise": (lambda: Pooled(nn.Conv1d(6, 6, 3, groups=6), (-1,), 6), (6, 9)),
    "tokens": (lambda: Pooled(nn.Linear(6, 6), (-2,), 6), (9, 6)),
    "a sample a batch": (lambda: Pooled(nn.Conv2d(4, 6, 3), (-2, -1), 6), (4, 7, 7)),
}


@pytest.mark.parametrize("kind", POOLED)
def test_it_is_what_random_errors_of_the_weights_do(kind: str) -> None:
    """Behind a pooling the errors of all positions add up."""
    torch.manual_seed(0)
    build, shape = POOLED[kind]
    net, x = build().eval(), torch.randn(96, *shape) + 0.5
    batches = list(x) if kind == "a sample a batch" else x
    (found,) = curvatures(net, {"layer": net.layer}, calls(net, batches)).values()
    with torch.no_grad():
        power = torch.cat(list(columns(net.layer, x)), 2).square().mean(2).sum(1)
        outputs, total = net(x), 0.0
        for _ in range(300):
            noisy = copy.deepcopy(net)
            noisy.layer.weight += 1e-3 * torch.randn_like(noisy.layer.weight)
            total += float((noisy(x) - outputs).square().sum(1).mean()) / 300 / 1e-6
        varying = outputs.std().square() * outputs.shape[1]
    if kind == "a sample a batch":  # each is told in units of its own outputs
        varying = outputs.var(1).mean() * outputs.shape[1]
    by_row = found * power.repeat_interleave(len(found) // len(power))
    assert float(by_row.sum()) == pytest.approx(total / float(varying), rel=0.3)


def test_nothing_of_the_model_changes_and_frozen_ones_are_seen_too() -> None:
    net = network().requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        x = torch.randn(8, 2, 6, 6)
        found = curvatures(net, {"0": net[0]}, calls(net, x))
    assert found["0"].sum() > 0
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not net[0]._forward_hooks


class Partly(nn.Module):
    """Two layers of which the outputs depend differentiably on one, and not at all on a third."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden, self.idle = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        with torch.no_grad():
            x = self.hidden(x)
        return self.seen(x)


def test_layers_that_outputs_tell_nothing_of_pay_nothing() -> None:
    torch.manual_seed(0)
    net, x = Partly().eval(), torch.randn(64, 16)
    modules = {name: getattr(net, name) for name in ("seen", "hidden", "idle")}
    assert list(curvatures(net, modules, calls(net, x))) == ["seen"]
    found = bits(cluster_(net, 8, inputs=x, rate=0.3))
    assert found["seen"] < 2.2
    assert min(found["hidden"], found["idle"]) > 2.6


def test_classes_instead_of_probabilities_are_no_derivative() -> None:
    class Decides(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    net, x = Decides(nn.Linear(8, 4)).eval(), torch.randn(32, 8)
    assert curvatures(net, {"0": net[0]}, calls(net, x)) == {}
    cluster_(net, 4, inputs=x, rate=0.05)


class Padded(nn.Conv2d):
    """As some do TensorFlow's padding: the layer is fed fewer positions than its output has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_a_layer_that_does_more_than_its_kind_pays_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Padded(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(32, 2, 6, 6)
    assert list(curvatures(net, {"0": net[0], "2": net[2]}, calls(net, x))) == ["2"]
    found = bits(cluster_(net, 8, inputs=x, rate=0.1))
    assert found["0"] > 2.6 > 2.2 > found["2"]


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_the_outputs_err_by_no_more_than_the_rate_says_however_deep_the_model(depth: int) -> None:
    """A single layer by that, deeper ones by less, as each makes up for those before it."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(depth))).eval()
    x = torch.randn(512, 128)
    with torch.no_grad():
        wanted = net(x)
        for rate in (0.02, 0.05):
            found = cluster_(copy.deepcopy(net), 63, inputs=x, rate=rate)(x)
            error = float((found - wanted).square().mean() / wanted.var())
            share = error / (rate / (2 * math.log(2)))
            assert (0.7 if depth == 1 else 0.01) < share < 1.2


def bits(model: nn.Module) -> dict[str, float]:
    found = {}
    for name, clustering in named_clusterings(model):
        share = torch.bincount(clustering.indices.flatten().int()).double()
        share = share[share > 0] / share.sum()
        found[name.removesuffix(".weight")] = float(-(share * share.log2()).sum())
    return found


@pytest.mark.parametrize("options", [{}, {"codebook_dtype": "int8"}], ids=str)
def test_layers_that_outputs_mind_get_more_bits(options: dict[str, Any]) -> None:
    """A layer at a tenth of the scale, behind the same inputs, is worth less."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.1 * self.quiet(x)

    torch.manual_seed(0)
    net, x = Sum().eval(), torch.randn(256, 64)
    loud = {}
    for rate in (0.0005, 0.005):
        found = bits(cluster_(copy.deepcopy(net), 127, inputs=x, rate=rate, **options))
        assert found["loud"] - found["quiet"] > 2.4  # of log2(10), that is 3.3
        loud[rate] = found["loud"]
    # By theory ten times the price takes half of log2(10) bits off.
    assert loud[0.0005] - loud[0.005] == pytest.approx(0.5 * math.log2(10), abs=0.15)
