"""Rounded activations: which, how, with what gradient, and that nothing is left behind."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import register_pytree_node

from torchclust import cluster_, is_clustered, named_clusterings, restore_, strip_
from torchclust.activations import rounding
from torchclust.activations.quantized import (
    FirstCalls,
    activation_ranges,
    groups_of,
    kept_quantized,
    quantize_activations_,
    quantized_modules,
    remove_quantized_activations_,
)
from torchclust.activations.tracking import modes_at_work


class Mixed(nn.Module):
    """Modules and functions, one ReLU used three times, a branch that only training takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.auxiliary = nn.Conv2d(4, 2, 1)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8, 5)
        self.aside: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        if self.training:
            self.aside = F.relu(self.auxiliary(x)).mean().detach()
        y = self.relu(self.norm(self.second(x)) + x)
        z = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(y, 2)], 1)
        return self.head(self.drop(F.adaptive_avg_pool2d(self.relu(z), 1).flatten(1)))


def images(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def mixed(clusters: int | None = 4, **options: Any) -> Mixed:
    torch.manual_seed(0)
    model = Mixed()
    if clusters is not None:
        cluster_(model, clusters, codebook_dtype="int8", **options)
    return quantize_activations_(model, images(0))


def train(model: nn.Module, steps: range) -> list[Tensor]:
    """Train from the outside state alone, so that two models can be compared step by step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model.train()(images(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def same_state(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def groups(
    build: Callable[[Tensor], Any], *modules: nn.Module
) -> list[tuple[list[str], list[str]]]:
    """The plan of a forward on maps (2, 4, 6, 6), as (rounded, carried) per group."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d, self.n = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.gain = nn.Parameter(torch.rand(4, 1, 1))
            self.field = nn.Parameter(torch.rand(4, 6, 6))

        def forward(self, x: Tensor) -> Any:
            return build(self, x)  # type: ignore[call-arg, arg-type]

    net = quantize_activations_(Net(), torch.randn(2, 4, 6, 6))
    return [(list(g.quantized), list(g.carried)) for g in groups_of(net)][1:]  # without the input


# What the converter and the quantizer make of each, as seen in the files they write.
CONSTRUCTS: dict[str, tuple[Callable[..., Any], list[tuple[list[str], list[str]]]]] = {
    "convolution, norm and activation are one": (
        lambda m, x: F.relu(m.n(m.c(x))),
        [([":relu"], [])],
    ),
    "relu6, and clamp and hardtanh to its limits": (
        lambda m, x: torch.clamp(m.d(F.hardtanh(m.c(F.relu6(m.c(x))), 0.0, 6.0)), 0, 6),
        [([":relu6"], []), ([":hardtanh"], []), ([":clamp"], [])],
    ),
    "other limits are not fused": (
        lambda m, x: F.hardtanh(m.c(x), 0.0, 1.0),
        [(["c:conv2d"], []), ([":hardtanh"], [])],
    ),
    "constants per channel are folded": (
        lambda m, x: F.relu(1 - m.c(x) * m.gain / 3),
        [([":relu"], [])],
    ),
    "other constants are not": (
        lambda m, x: F.relu(m.c(x) * m.field),
        [(["c:conv2d"], []), ([":relu"], [])],
    ),
    "a value that is read twice is stored": (
        lambda m, x: (lambda y: F.relu(y) + y)(m.c(x)),
        [(["c:conv2d"], []), ([":relu"], []), ([":add"], [])],
    ),
    "a value that is returned is stored": (
        lambda m, x: (lambda y: (y, F.relu(y)))(m.c(x)),
        [(["c:conv2d"], []), ([":relu"], [])],
    ),
    "addition takes its activation in": (
        lambda m, x: F.relu(m.c(x) + m.d(x)),
        [(["c:conv2d"], []), (["d:conv2d"], []), ([":relu"], [])],
    ),
    "in place": (
        lambda m, x: m.c(x).add_(m.d(x)).relu_(),
        [(["c:conv2d"], []), (["d:conv2d"], []), ([":relu"], [])],
    ),
    "a norm of its own": (
        lambda m, x: F.relu(m.n(F.gelu(m.c(x)))),
        [(["c:conv2d"], []), ([":gelu"], []), ([":relu"], [])],
    ),
    "pooling keeps the scale, also through an activation": (
        lambda m, x: F.relu(F.max_pool2d(m.c(x), 2)).flatten(1),
        [(["c:conv2d"], [":max_pool2d", ":relu", ":flatten"])],
    ),
    "averaging rounds again": (
        lambda m, x: F.interpolate(F.avg_pool2d(m.c(x), 2), scale_factor=2.0),
        [(["c:conv2d", ":avg_pool2d", ":interpolate"], [])],
    ),
    "means have their own scale": (
        lambda m, x: (F.adaptive_avg_pool2d(m.c(x), 1), m.d(x).mean((2, 3))),
        [(["c:conv2d"], []), ([":adaptive_avg_pool2d"], []), (["d:conv2d"], []), ([":mean"], [])],
    ),
    "a pooling of the whole map is a mean": (
        lambda m, x: F.avg_pool2d(m.c(x), kernel_size=x.shape[-2:]),
        [(["c:conv2d"], []), ([":avg_pool2d"], [])],
    ),
    "times a factor, a pooling is another tensor": (
        lambda m, x: (F.avg_pool2d(m.c(x), 2, divisor_override=3), m.d(x)),
        [(["c:conv2d"], []), ([":avg_pool2d"], []), (["d:conv2d"], [])],
    ),
    "concatenation unites": (
        lambda m, x: torch.cat([m.c(x), F.relu(m.d(x)), F.max_pool2d(x, 1)], 1)[:, ::2],
        [],
    ),
    "parts share": (
        lambda m, x: torch.cat(m.c(x).chunk(2, 1)[::-1], 1),
        [(["c:conv2d"], [":chunk[0]", ":chunk[1]", ":cat"])],
    ),
    "prescribed scales are left alone": (
        lambda m, x: torch.cat([m.c(x), torch.sigmoid(m.d(x))], 1),
        [(["c:conv2d", ":cat"], []), (["d:conv2d"], []), ([":sigmoid"], [])],
    ),
    "hard-sigmoid takes in what is before it, hard-swish does not": (
        lambda m, x: F.hardsigmoid(m.c(x)) * F.hardswish(m.d(x)),
        [([":hardsigmoid"], []), (["d:conv2d"], []), ([":hardswish"], []), ([":mul"], [])],
    ),
    "dropout and copies are not there": (
        lambda m, x: F.relu(F.dropout(m.c(x), 0.5).contiguous().clone()),
        [([":relu"], [])],
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTS)
def test_what_the_file_stores_is_rounded(case: str) -> None:
    build, expected = CONSTRUCTS[case]
    assert groups(build) == expected


def test_concatenation_gives_the_input_its_scale() -> None:
    build, _ = CONSTRUCTS["concatenation unites"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = build(self, x)
            return result

    (only,) = groups_of(quantize_activations_(Net(), torch.randn(2, 4, 6, 6)))
    assert only.quantized == (":input", "c:conv2d", ":relu")
    assert only.carried == (":max_pool2d", ":cat", ":getitem")
    assert only.fixed is None


def test_names_tell_uses_apart_and_ignore_what_training_adds() -> None:
    model = mixed()
    names = activation_ranges(model)
    assert list(names) == [
        ":input", "relu:relu", "relu#1:relu", "norm:batch_norm",
        "relu#2:relu", ":adaptive_avg_pool2d", "head:linear",
    ]  # fmt: skip
    assert names["relu:relu"] == names["relu#1:relu"]  # they meet in a concatenation
    model.train()(100 * images(1))
    moved = activation_ranges(model)
    grown = (":input", "relu:relu", "relu#1:relu")  # the rest reads clipped or normalised values
    assert all(moved[name][1] > names[name][1] for name in grown)


def reference(x: Tensor, low: float, high: float) -> tuple[Tensor, float]:
    """Quantize and dequantize as LiteRT does, in double precision; also the step."""
    scale = np.float64(np.float32(high) - np.float32(low)) / 255
    zero_point = np.rint(-128 - low / scale)
    codes = np.clip(np.rint(x.double().numpy() / scale) + zero_point, -128, 127)
    return torch.tensor((codes - zero_point) * scale), float(scale)


@pytest.mark.parametrize("low", [-1.71, -1.7, 0.0])  # zero points rounded up, down, not
def test_values_and_gradients_of_rounding(low: float) -> None:
    net = nn.Sequential(nn.Identity(), nn.LogSoftmax(1))
    quantize_activations_(net, torch.tensor([[low, 2.3]]))
    rounded: list[Tensor] = []
    net[1].register_forward_pre_hook(lambda _, args: rounded.append(args[0]))
    x = torch.linspace(-4, 4, 1001)[None].requires_grad_()
    net.eval()(x)
    (y,) = rounded
    expected, scale = reference(x.detach(), low, 2.3)
    assert (y - expected).abs().max() < 1.001 * scale  # a tie may fall to either side
    assert ((y - expected).abs() > 1e-6).float().mean() < 0.01
    assert y.unique().numel() == 256
    assert 0.0 in y
    (gradient,) = torch.autograd.grad(y.sum(), x)
    inside = (x > low - 1.1 * scale) & (x < 2.3 + 1.1 * scale)
    assert torch.equal(gradient[~inside], torch.zeros_like(gradient[~inside]))
    assert (gradient[inside] == 1).float().mean() > 0.99


def test_ranges_are_a_moving_average_of_batches() -> None:
    first, *batches = (torch.randn(16, 4) * (1 + i % 3) for i in range(130))
    net = quantize_activations_(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), first).train()
    low, high = float(first.min()), float(first.max())
    assert activation_ranges(net)[":input"] == (low, high)
    for count, x in enumerate(batches, start=2):
        net(x)
        share = max(1 / count, 0.01)
        low, high = low + share * (float(x.min()) - low), high + share * (float(x.max()) - high)
        assert activation_ranges(net)[":input"] == pytest.approx((low, high), rel=1e-5)


def test_evaluation_moves_nothing_and_rounds_by_what_was_learned() -> None:
    model = mixed()
    train(model, range(3))
    before = copy.deepcopy(model.state_dict())
    model.eval()
    with torch.no_grad():
        first, again = model(images(7)), model(images(7))
    assert torch.equal(first, again)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(first.unique()) <= 256


def test_a_prescribed_range_does_not_move_nor_does_an_infinite_batch_spoil_one() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh())
    quantize_activations_(net, torch.rand(8, 4)).train()
    net(1000 * torch.rand(8, 4))
    assert activation_ranges(net)["1:sigmoid"] == (0.0, 255 / 256)
    assert activation_ranges(net)["3:tanh"] == (-1.0, 127 / 128)
    before = activation_ranges(net)[":input"]
    net(torch.tensor([[float("inf"), 0.0, 0.0, 0.0]]))
    assert activation_ranges(net)[":input"][1] == before[1]


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("preserve_sparsity", [False, True])
def test_clusters_and_zeros_survive_training(assignment: str, preserve_sparsity: bool) -> None:
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < 0.5] = 0
    zeros = {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() > 1}
    cluster_(
        model,
        8,
        codebook_dtype="int8",
        assignment=assignment,
        preserve_sparsity=preserve_sparsity,
    )
    quantize_activations_(model, images(0))
    losses = train(model, range(40))
    assert losses[-1] < losses[0]
    for name, clustering in named_clusterings(model):
        weight = getattr(clustering.module, clustering.tensor_name).detach()
        assert clustering.scale is not None
        scale = clustering.scale.view(-1, *[1] * (weight.dim() - 1))
        assert len((weight / scale).round().unique()) <= 8
        if preserve_sparsity:
            assert bool((weight[zeros[name]] == 0).all())


def test_training_goes_on_bit_for_bit_from_a_state_dict() -> None:
    straight, interrupted = mixed(), mixed()
    train(straight, range(6))
    train(interrupted, range(3))
    stored = load(save(interrupted.state_dict()))
    torch.manual_seed(5)
    resumed = restore_(Mixed(), stored)
    train(resumed, range(3, 6))
    assert same_state(straight, resumed)
    assert activation_ranges(straight) == activation_ranges(resumed)
    plain = copy.deepcopy(resumed)
    restore_(plain, Mixed().state_dict())
    assert not activation_ranges(plain)
    assert not is_clustered(plain)


def test_restoring_what_fits_keeps_every_parameter_and_buffer() -> None:
    model = mixed()
    parameters = list(model.parameters())
    ranges = model.get_buffer("activation_ranges")
    restore_(model, mixed().state_dict())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.get_buffer("activation_ranges") is ranges


def test_restoring_into_another_architecture_says_so() -> None:
    state = nn.ModuleDict({"net": mixed(clusters=None)}).state_dict()
    with pytest.raises(ValueError, match=r"activation ranges of 'net', this model has no such"):
        restore_(nn.ModuleDict({"other": Mixed()}), state)


def test_a_copy_learns_for_itself() -> None:
    model = mixed()
    twin = copy.deepcopy(model)
    train(twin, range(2))
    assert activation_ranges(twin) != activation_ranges(model)
    strip_(twin)
    assert activation_ranges(model)
    train(model, range(2))


def attributes(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything by which a module could differ from a plain one."""
    return [
        (
            type(m),
            sorted(m.__dict__),
            *(list(getattr(m, name)) for name in ("_parameters", "_buffers", "_modules")),
            list(m._forward_pre_hooks),
            list(m._forward_pre_hooks_with_kwargs),
            list(m._forward_hooks),
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize("clusters", [None, 4])
def test_strip_leaves_no_trace(clusters: int | None) -> None:
    model = mixed(clusters)
    train(model, range(2))
    strip_(strip_(model))
    assert attributes(model) == attributes(Mixed())
    assert type(model) is Mixed


@pytest.mark.parametrize("cluster_last", [False, True])
def test_a_model_that_is_one_layer(cluster_last: bool) -> None:
    model: nn.Module = nn.Linear(64, 8)
    if cluster_last:
        model = cluster_(quantize_activations_(model, torch.randn(4, 64)), 4)
    else:
        model = quantize_activations_(cluster_(model, 4), torch.randn(4, 64))
    train_once = model.train()(torch.randn(4, 64)).sum()
    train_once.backward()
    assert list(activation_ranges(model)) == [":input", ":linear"]
    assert type(strip_(model)) is nn.Linear


def test_quantizing_again_begins_anew() -> None:
    model = mixed()
    train(model, range(2))
    quantize_activations_(model, images(0))
    assert activation_ranges(model)[":input"] == pytest.approx(
        (float(images(0).min()), float(images(0).max()))
    )
    assert attributes(remove_quantized_activations_(model)) != []
    assert not list(quantized_modules(model))


def test_what_removes_them_can_be_told_to_keep_them() -> None:
    model = mixed()
    train(model, range(2))
    ranges = activation_ranges(model)
    with torch.no_grad():
        before = model.eval()(images(3))
    with kept_quantized(model):
        strip_(model)
    assert not is_clustered(model)
    assert activation_ranges(model) == ranges
    with torch.no_grad():
        assert torch.equal(model.eval()(images(3)), before)


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def test_a_wrapper_has_what_it_wraps_quantized() -> None:
    inner = Mixed()
    wrapper = quantize_activations_(Wrapper(Wrapper(inner)), {"x": images(0)})
    assert [path for path, _ in quantized_modules(wrapper)] == ["net.net"]
    assert list(activation_ranges(inner)) == [
        name.removeprefix("net.net").removeprefix(".") for name in activation_ranges(wrapper)
    ]


def test_the_trace_changes_nothing() -> None:
    model = Mixed().train()
    model.norm.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    remove_quantized_activations_(quantize_activations_(model, images(0)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not model.norm.training


def test_inputs_that_forward_does_not_use_are_refused() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(3)

    with pytest.raises(ValueError, match=r"forward computes nothing\s+from the example inputs"):
        quantize_activations_(Constant(), torch.ones(2))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_no_mode_behind(error: type[BaseException]) -> None:
    model = mixed().eval()

    def fail(*_: Any) -> None:
        raise error

    handle = model.norm.register_forward_hook(fail)
    with pytest.raises(error):
        model(images(0))
    handle.remove()
    assert torch.overrides._get_current_function_mode_stack() == []
    assert modes_at_work() == []
    fresh = mixed()
    with torch.no_grad():
        assert torch.equal(model.eval()(images(3)), fresh.eval()(images(3)))


def test_pruned_weights_do_not_rename_calls() -> None:
    """torch.nn.utils.prune multiplies by its mask in a hook, where the network multiplies too."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) * x
            return y

    plain, pruned = Product(), Product()
    prune.l1_unstructured(pruned.layer, "weight", 0.5)
    names = [activation_ranges(quantize_activations_(m, torch.rand(2, 4))) for m in (plain, pruned)]
    assert list(names[0]) == list(names[1]) == [":input", "layer:linear", ":mul"]


def test_compiled_exported_and_functional_calls_round_alike() -> None:
    model = mixed().eval()
    x = images(2)
    expected = model(x).detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), expected)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(torch.func.functional_call(model, state, (x,)), expected)


def test_a_compiled_model_learns_as_an_eager_one() -> None:
    eager, compiled = mixed(), mixed()
    train(eager, range(3))
    train(torch.compile(compiled, backend="eager"), range(3))  # type: ignore[arg-type]
    for name, expected in activation_ranges(eager).items():
        assert activation_ranges(compiled)[name] == pytest.approx(expected, rel=1e-4)


def test_what_was_compiled_before_is_quantized_inside() -> None:
    inner = Mixed()
    whole = torch.compile(inner, backend="eager")
    quantize_activations_(whole, images(0))  # type: ignore[type-var]
    assert activation_ranges(inner)
    assert torch.equal(whole.eval()(images(1)), inner.eval()(images(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = mixed().eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert model(images(1)).isfinite().all()
    model.to(dtype).train()
    model(images(1).to(dtype)).sum().backward()
    assert activation_ranges(model)


class Outside(nn.Module):
    """What a training step may look like: two networks, a frozen teacher, a loss with no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.teacher = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
        self.loss = nn.MSELoss()

    def step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.decoder(self.encoder(x)), self.teacher(x))
        return loss


def test_what_a_step_calls_from_outside_is_quantized_on_its_own_inputs() -> None:
    model = Outside()
    watching = FirstCalls(model)
    model.step(torch.rand(8, 4))
    watching.stop()
    assert [path for path, _ in quantized_modules(model)] == ["encoder", "decoder"]
    assert list(activation_ranges(model)) == [
        "encoder:input", "encoder.1:relu", "decoder:input", "decoder.1:relu",
    ]  # fmt: skip
    hooks = [len(m._forward_pre_hooks) for m in (model, model.encoder, model.teacher)]
    assert hooks == [0, 0, 0]


class Residual(nn.Module):
    """A block as ResNets have it, with or without operators that work in place."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu, self.in_place = nn.ReLU(in_place), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5) if self.in_place else x - 0.5
        y = self.norm(self.conv(x))
        z = y.tanh()
        if self.in_place:
            y += x
        else:
            y = y + x
        return z + self.relu(y)


def test_ranges_are_those_of_the_moment_whatever_works_in_place_later() -> None:
    plain, in_place = Residual(in_place=False), Residual(in_place=True)
    in_place.load_state_dict(plain.state_dict())
    expected = activation_ranges(quantize_activations_(plain, images(0)))
    x = images(0)
    found = activation_ranges(quantize_activations_(in_place, x))
    assert list(found.values()) == list(expected.values())
    assert torch.equal(x, images(0))
    wrapped = quantize_activations_(Wrapper(Wrapper(in_place)), x)
    assert list(activation_ranges(wrapped).values()) == list(expected.values())
    with torch.no_grad():
        assert torch.equal(plain.eval()(images(1)), in_place.eval()(images(1)))


class ManyInputs(nn.Module):
    """Inputs of ranges far apart, in whatever order they come."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, parts: dict[str, list[Tensor]]
    ) -> tuple[Tensor, ...]:
        own = () if y is None else (self.b(y),)
        return (self.a(x), self.c(parts["left"][0]), parts["right"][0] + 1, *own)


def test_an_input_has_the_range_of_its_parameter_in_whatever_order_it_is_given() -> None:
    x, y, left, right = (scale * torch.rand(8, 4) for scale in (1, 10, 100, 1000))
    parts, turned = ({key: [t] for key, t in d.items()} for d in (
        {"left": left, "right": right}, {"right": right, "left": left},
    ))  # fmt: skip
    net = quantize_activations_(ManyInputs(), {"x": x, "y": y, "parts": parts}).eval()
    for name, given in (
        (":input", x),
        (":input#1", y),
        (":input['parts']['left'][0]", left),
        (":input['parts']['right'][0]", right),
    ):
        assert activation_ranges(net)[name][1] == float(given.max())
    expected = net(x, y, parts=parts)
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
    for other in (
        net(parts=turned, y=y, x=x),
        net(x, parts=turned, y=y),
        compiled(x, y, parts=turned),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    without = net(parts=turned, x=x)
    assert all(torch.equal(a, b) for a, b in zip(without, expected[:3], strict=True))


class Pair:
    """A type that torch takes apart without a word on what leads inside."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right


def test_inputs_inside_a_type_of_the_user_s_are_counted() -> None:
    class Sum(nn.Module):
        def forward(self, pair: Pair) -> Tensor:
            return pair.left + pair.right

    register_pytree_node(Pair, lambda p: ([p.left, p.right], None), lambda x, _: Pair(*x))
    net = quantize_activations_(Sum(), (Pair(torch.rand(8), torch.rand(8)),))  # type: ignore[arg-type]
    assert list(activation_ranges(net)) == [":input[0]", ":input[1]", ":add"]


def test_a_forward_that_was_replaced_is_refused_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    state = quantize_activations_(copy.deepcopy(net), torch.rand(8, 4)).state_dict()
    forward = net.forward
    net.forward = lambda *args: forward(*args)  # type: ignore[method-assign]
    before = attributes(net)
    for attempt in (
        lambda: quantize_activations_(net, torch.rand(8, 4)),
        lambda: restore_(net, state),
    ):
        with pytest.raises(ValueError, match=r"its forward was replaced \(model.forward = ...\)"):
            attempt()
        assert attributes(net) == before
    del net.forward
    assert activation_ranges(quantize_activations_(net, torch.rand(8, 4)))


def test_a_forward_may_be_replaced_later() -> None:
    net = quantize_activations_(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), torch.rand(8, 4))
    expected = net.eval()(torch.ones(2, 4))
    forward = net.forward
    net.forward = lambda *args: forward(*args)  # type: ignore[method-assign]
    assert torch.equal(net(torch.ones(2, 4)), expected)
    strip_(net)
    assert torch.equal(net(torch.ones(2, 4)), net[1](net[0](torch.ones(2, 4))))


def test_a_step_that_comes_by_way_of_forward_is_looked_into() -> None:
    """As Lightning's DDP has it, which leaves the class's own forward on the object besides."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * x  # type: ignore[no-any-return]

        def step(self, x: Tensor) -> Tensor:
            return self(x).square().mean()  # type: ignore[no-any-return]

    def redirected(module: Module, x: Tensor) -> Tensor:
        own = module.forward

        def once(x: Tensor) -> Tensor:
            module.forward = own  # type: ignore[method-assign]
            return module.step(x)

        module.forward = once  # type: ignore[method-assign]
        return module(x)  # type: ignore[no-any-return]

    module = Module()
    watching = FirstCalls(module)
    redirected(module, torch.rand(8, 4))
    watching.stop()
    assert list(activation_ranges(module)) == [":input", "net.1:relu", ":mul"]
    redirected(module, torch.rand(8, 4))
    assert module.get_buffer("activation_batches") == 2
    quantize_activations_(module, torch.rand(8, 4))  # its own forward is not in the way
    redirected(module, torch.rand(8, 4))
    assert attributes(strip_(module)) == attributes(Module())


class TwoNames(nn.Module):
    """One network under two names, as backbones often are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.backbone = self.net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def test_a_module_of_two_names_is_restored_once() -> None:
    model = quantize_activations_(TwoNames(), torch.rand(8, 4)).eval()
    restored = restore_(TwoNames(), model.state_dict()).eval()
    assert activation_ranges(restored) == activation_ranges(model)
    assert torch.equal(restored(torch.ones(2, 4)), model(torch.ones(2, 4)))
    ranges = restored.net.get_buffer("activation_ranges")
    restore_(restored, model.state_dict())
    assert restored.net.get_buffer("activation_ranges") is ranges
    assert attributes(strip_(restored)) == attributes(TwoNames())


def test_an_empty_batch_moves_no_range_but_waits_for_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = quantize_activations_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.rand(8, 4))
    before = activation_ranges(model)
    met: list[Tensor] = []
    monkeypatch.setattr(rounding, "average_over_ranks", met.append)
    assert model.train()(torch.rand(0, 4)).shape == (0, 4)
    assert activation_ranges(model) == before
    assert len(met) == 1
    model.eval()(torch.rand(0, 4))
    assert len(met) == 1


@pytest.mark.parametrize(
    "bad",
    [torch.rand(0, 4), torch.full((8, 4), torch.nan), torch.tensor([[torch.inf, 0, 0, 0]])],
    ids=["empty", "nan", "inf"],
)
def test_inputs_that_give_no_range_are_refused_and_nothing_changes(bad: Tensor) -> None:
    net = quantize_activations_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.rand(8, 4))
    before = activation_ranges(net)
    with pytest.raises(ValueError, match=r"':input' is empty, or holds NaN or infinity. Pass inpu"):
        quantize_activations_(net, bad)
    assert activation_ranges(net) == before


def test_one_bad_value_among_those_that_share_a_scale_is_enough() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y])

    good, bad = torch.rand(8), torch.tensor([torch.nan])
    for inputs in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="is empty, or holds NaN or infinity"):
            quantize_activations_(Joined(), inputs)


def test_it_is_pickled_with_its_ranges() -> None:
    model = mixed(clusters=None)
    train(model, range(2))
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin).__name__ == "Mixed"
    assert isinstance(twin, Mixed)
    assert same_state(model, twin)
    train(model, range(2, 4))
    train(twin, range(2, 4))
    assert same_state(model, twin)
    assert attributes(strip_(twin)) == attributes(Mixed())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def test_what_is_done_to_a_part_leaves_the_whole_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(64, 4)
    quantize_activations_(model, x)
    expected = model(x)
    with pytest.raises(RuntimeError):
        quantize_activations_(model.body, torch.rand(8, 3))
    assert torch.equal(model(x), expected)
    quantize_activations_(model.body, x)
    assert [path for path, _ in quantized_modules(model)] == ["", "body"]
    remove_quantized_activations_(model.body)
    assert torch.equal(model(x), expected)
    assert attributes(strip_(model)) == attributes(Nested())


def test_networks_that_share_a_part_round_each_for_itself() -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    nets = [nn.Sequential(part, nn.Linear(4, 2)).eval() for _ in range(2)]
    x = torch.randn(64, 4)
    expected = quantize_activations_(copy.deepcopy(nets[1]), x)(x)
    for net in nets:
        quantize_activations_(net, x)
    assert torch.equal(nets[1](x), expected)
    remove_quantized_activations_(nets[0])
    assert torch.equal(nets[1](x), expected)
    remove_quantized_activations_(nets[1])
    assert not part[0]._forward_pre_hooks


def test_steps_beyond_those_of_the_example_are_told_of(recwarn: pytest.WarningsRecorder) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 4)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return h

    net = quantize_activations_(Steps(), torch.rand(8, 3, 4))
    for model in (net, restore_(Steps(), net.state_dict())):
        model(torch.rand(8, 3, 4))
        model(torch.rand(8, 2, 4))
        assert not recwarn.list
        with pytest.warns(
            UserWarning, match="'cell' runs more often than with the example inputs"
        ) as w:
            model(torch.rand(8, 4, 4))
        assert w[0].filename == __file__
        torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(torch.rand(8, 4, 4))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, torchclust.activations.quantized as a; "
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'litert_torch', 'ai_edge_litert', 'pytorch_lightning', 'tensorflow'}), "
        "'torch.ao.quantization' in open(a.__file__).read().partition('from __future__')[2])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] False"
