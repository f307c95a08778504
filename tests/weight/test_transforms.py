"""A clustered weight where torch runs it in its own ways: traced, vmapped, faked, cast, twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap

from torchclust import cluster_, strip_

MODES: list[dict[str, Any]] = [
    {"assignment": a, "codebook_dtype": d}
    for a in ("fixed", "nearest")
    for d in ("float32", "int8")
]
INT8 = {"assignment": "fixed", "codebook_dtype": "int8"}
pytestmark = pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))


def model(mode: dict[str, Any]) -> nn.Sequential:
    return cluster_(nn.Sequential(nn.Linear(32, 32)), 16, **mode)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 128).view(4, 32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # torch 2.13, 2026-11
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # on shapes, which are constant
@pytest.mark.parametrize("grad", [False, True])
def test_traced(mode: dict[str, Any], grad: bool) -> None:
    clustered = model(mode)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(clustered, inputs())
        assert torch.equal(traced(inputs()), clustered(inputs()))


@pytest.mark.parametrize("grad", [False, True])
def test_an_ensemble_under_vmap(mode: dict[str, Any], grad: bool) -> None:
    ensemble = [model(mode) for _ in range(3)]
    parameters, buffers = stack_module_state(ensemble)
    with torch.set_grad_enabled(grad):
        found = vmap(lambda p, b: functional_call(ensemble[0], (p, b), (inputs(),)))(
            parameters, buffers
        )
        want = torch.stack([one(inputs()) for one in ensemble])
    torch.testing.assert_close(found, want)


def test_gradients_of_an_ensemble_under_vmap(mode: dict[str, Any]) -> None:
    ensemble = [model(mode) for _ in range(3)]
    with torch.no_grad():
        for number, one in enumerate(ensemble):
            one[0].bias.add_(number)
    parameters, buffers = stack_module_state(ensemble)

    def loss(p: Any, b: Any) -> Tensor:
        found: Tensor = functional_call(ensemble[0], (p, b), (inputs(),))
        return found.square().mean()

    found = vmap(grad(loss))(parameters, buffers)
    for number, one in enumerate(ensemble):
        one(inputs()).square().mean().backward()
        for name, parameter in one.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name][number], parameter.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors(mode: dict[str, Any], grad: bool) -> None:
    clustered = model(mode)
    with FakeTensorMode() as fake, torch.set_grad_enabled(grad):
        tensors = [*clustered.named_parameters(), *clustered.named_buffers()]
        state = {name: fake.from_tensor(tensor) for name, tensor in tensors}
        found = functional_call(clustered, state, (torch.randn(4, 32),))
    assert found.shape == (4, 32)
    assert clustered(inputs()).shape == (4, 32)


def test_another_default_device(mode: dict[str, Any]) -> None:
    """As in a script that sets the default to "cuda" and keeps this model on the CPU."""
    plain = nn.Sequential(nn.Linear(32, 32))
    with torch.device("meta"):
        clustered = cluster_(plain, 16, **mode)
    x = inputs()
    with torch.device("meta"):
        clustered(x).square().mean().backward()
        with torch.no_grad():
            value = clustered(x)
        strip_(clustered)
        assert torch.equal(clustered(x), value)


def test_gradients_of_gradients(mode: dict[str, Any]) -> None:
    """MAML: a step inside the loss; the second derivative against finite differences."""
    clustered = model(mode).double()
    names = [name for name, _ in clustered.named_parameters()]
    start = [p.detach().clone().requires_grad_() for p in clustered.parameters()]
    x = inputs().double()

    def loss(values: Any) -> Tensor:
        out: Tensor = functional_call(clustered, dict(zip(names, values, strict=True)), (x,))
        return out.square().mean()

    def after_a_step(*values: Tensor) -> Tensor:
        steps = torch.autograd.grad(loss(values), values, create_graph=True)
        return loss([v - 0.1 * s for v, s in zip(values, steps, strict=True)])

    found = torch.autograd.grad(after_a_step(*start), start)
    assert all(g.isfinite().all() for g in found)
    if mode != MODES[0]:  # straight-through is the derivative of another function
        return
    bias, step = names.index("0.bias"), 1e-6
    for place in (0, 7):
        moved = [s.detach().clone().requires_grad_() for s in start]
        moved[bias].data[place] += step
        slope = (after_a_step(*moved) - after_a_step(*start)) / step
        torch.testing.assert_close(found[bias][place], slope.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6, 1.0])
def test_half_precision_of_nearly_dead_weights(mode: dict[str, Any], size: float) -> None:
    layer = nn.Linear(32, 32)
    layer.weight.data.mul_(size)
    expected = layer.weight.half().float().abs().max()
    clustered = cluster_(layer, 16, **mode).half()
    weight = clustered.weight.detach().float()
    assert weight.isfinite().all()
    assert weight.abs().max() <= 1.05 * expected + 1e-7


def test_a_value_that_is_no_number_does_not_vanish(mode: dict[str, Any]) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        clustered = model(mode)
        trained = clustered[0].parametrizations.weight.original
        trained.data.view(-1)[0] = bad
        for recording in (True, False):
            with torch.set_grad_enabled(recording):
                held = clustered[0].weight.isfinite().all()
            # Codes are clamped: an infinite one is 127, as a number too large would be.
            assert not held or (mode == INT8 and bad not in (torch.nan,))
