"""What a bit costs where: the curvature of the model's outputs, against derivatives in full."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.data_aware.batches import calls
from torchclust.data_aware.bit_prices import unit_of_price
from torchclust.data_aware.curvature import Curvature, curvatures


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ).eval()


def in_full(net: nn.Sequential, at: int, x: Tensor) -> Tensor:
    """Squared derivatives of all outputs by each channel of layer `at`, mean over samples."""
    with torch.no_grad():
        hidden, spread = output_of(net, at, x), net(x.clone()).std()
    found = torch.zeros(hidden.shape[1], dtype=torch.float64)
    for sample in hidden:
        jacobian = torch.autograd.functional.jacobian(
            lambda value: net[at + 1 :](value.clone()), sample[None]
        )  # (1, outputs, 1, channels, ...)
        squares = (jacobian[0, :, 0] / spread).double().square()
        found += squares.transpose(0, 1).flatten(1).sum(1)
    return found / len(x)


@torch.no_grad()
def output_of(net: nn.Sequential, at: int, x: Tensor) -> Tensor:
    """Of layer `at`, before what follows works on it in place."""
    return net[at](net[:at](x.clone())) if at else net[at](x)


def test_one_backward_pass_finds_the_diagonal() -> None:
    net, x = network(), torch.randn(128, 2, 6, 6)
    modules = {str(i): net[i] for i in (0, 2, 5)}
    found = curvatures(net, modules, calls(net, [x]))
    for name in modules:
        full = in_full(net, int(name), x)
        torch.testing.assert_close(found[name].squares, full, rtol=0.35, atol=0)
        assert float(found[name].squares.sum() / full.sum()) == pytest.approx(1, abs=0.12)
        rows = output_of(net, int(name), x).transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(found[name].variance, rows.var(1, correction=0))


def test_nothing_of_the_model_changes_and_frozen_ones_are_seen_too() -> None:
    net = network().requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        x = torch.randn(8, 2, 6, 6)
        found = curvatures(net, {"0": net[0]}, calls(net, x))
    assert found["0"].power > 0
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


def test_layers_that_outputs_tell_nothing_of_pay_by_their_own_output() -> None:
    torch.manual_seed(0)
    net, x = Partly().eval(), torch.randn(64, 16)
    modules = {name: getattr(net, name) for name in ("seen", "hidden", "idle")}
    assert list(curvatures(net, modules, calls(net, x))) == ["seen"]
    cluster_(net, 8, inputs=x, rate=0.05)
    assert all(getattr(net, name).weight.unique().numel() <= 8 for name in modules)


def test_classes_instead_of_probabilities_are_no_derivative() -> None:
    class Decides(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    net, x = Decides(nn.Linear(8, 4)).eval(), torch.randn(32, 8)
    assert curvatures(net, {"0": net[0]}, calls(net, x)) == {}
    cluster_(net, 4, inputs=x, rate=0.05)


def test_the_unit_is_the_geometric_mean() -> None:
    ones = torch.ones(1, dtype=torch.float64)
    found = {"a": Curvature(4 * ones, ones), "b": Curvature(9 * ones, 4 * ones)}
    unit = unit_of_price({**found, "dead": Curvature(0 * ones, ones)}, {"a": 2, "b": 6, "dead": 9})
    assert unit == pytest.approx(math.exp((2 * math.log(2) + 6 * math.log(6)) / 8))
    assert unit_of_price({}, {}) == 0


def bits(model: nn.Module) -> dict[str, float]:
    found = {}
    for name, parameter in model.named_modules():
        weight = getattr(parameter, "weight", None)
        if isinstance(weight, Tensor):
            counts = weight.unique(return_counts=True)[1].double()
            found[name] = float((counts * (counts.sum() / counts).log2()).sum() / weight.numel())
    return found


@pytest.mark.parametrize("options", [{}, {"codebook_dtype": "int8"}])
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
    mean = {}
    k = 31 if options else 127  # an int8 grid is no finer than a few thousandths of a weight
    for rate in (0.002, 0.02):
        found = bits(cluster_(copy.deepcopy(net), k, inputs=x, rate=rate, **options))
        assert found["loud"] - found["quiet"] > 1
        mean[rate] = (found["loud"] + found["quiet"]) / 2
    # By theory ten times the price takes half of log2(10) bits off.
    assert mean[0.002] - mean[0.02] == pytest.approx(0.5 * math.log2(10), abs=0.25)
