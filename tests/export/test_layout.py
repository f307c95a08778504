"""The copy that is converted computes what the model computes, and the model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export_networks import CASES, Case, flattened, randomize_norms
from torch import Tensor, nn
from torch.nn.utils import prune

from torchclust import cluster_
from torchclust.export import ExportError
from torchclust.export.layout import call, channels_last, module_of, named_inputs, prepare
from torchclust.export.rewrites.flattened import column_order


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_copy_computes_the_same(name: str, last: bool) -> None:
    case: Case = CASES[name]
    torch.manual_seed(0)
    model = cluster_(randomize_norms(case.build()), 8, codebook_dtype="int8").train()
    before = copy.deepcopy(model.state_dict())
    inputs = case.inputs(1)
    prepared = prepare(model, tuple(torch.cat([x, x]) for x in inputs), last=last)
    assert [x.shape[0] for x in prepared.example] == [1] * len(inputs)
    with torch.no_grad():
        expected = call(copy.deepcopy(model).eval(), None, inputs)
        got = prepared.module(*prepared.to_file_layout(inputs))
    for want, reference, y in zip(expected, prepared.reference(inputs), got, strict=True):
        want = channels_last(want) if last and want.ndim == 4 else want
        torch.testing.assert_close(reference, want, rtol=0, atol=0)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_only_linears_behind_a_flattened_map_are_permuted() -> None:
    prepared = prepare(flattened(), torch.randn(1, 3, 16, 16), last=True)
    assert list(prepared.columns) == ["5.weight"]
    linear = prepared.original.get_parameter("5.weight")
    (moved,) = prepared.module.constants.buffers()
    assert torch.equal(moved, linear[:, prepared.columns["5.weight"]])


class Head(nn.Module):
    """A Linear behind what ``reshape`` makes of a map."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.how = how
        self.linear = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "view":
            return self.linear(y.view(1, -1))
        if self.how == "relu after":
            return self.linear(y.flatten(1).relu())
        if self.how == "twice":
            return self.linear(y.flatten(1)) + self.linear(y.flatten(1).flip(1))
        if self.how == "permuted":
            return self.linear(y.permute(0, 2, 3, 1).flatten(1))
        return self.linear(y.mean((2, 3)).repeat(1, 4))


@pytest.mark.parametrize(
    ("how", "permuted"),
    [("view", True), ("relu after", True), ("twice", False), ("permuted", False), ("mean", False)],
)
def test_the_flattening_is_found_in_the_trace(how: str, permuted: bool) -> None:
    model, x = Head(how), torch.randn(1, 3, 4, 4)
    prepared = prepare(model, x, last=True)
    assert bool(prepared.columns) == permuted
    torch.testing.assert_close(prepared.module(channels_last(x))[0], model(x))


def test_column_order_is_that_of_a_permuted_map() -> None:
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(maps.flatten(1)[:, column_order((3, 4, 5))], channels_last(maps).flatten(1))


@pytest.mark.parametrize("linear_first", [False, True])
def test_a_tied_linear_is_left_alone(linear_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.linear = nn.Linear(16, 16)
            self.other = nn.Linear(16, 16)
            self.other.weight = self.linear.weight

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.linear, self.other
            if not linear_first:
                first, second = second, first
            return second(first(self.conv(x).flatten(1)))

    assert prepare(Model(), torch.randn(1, 3, 4, 4), last=True).columns == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_in_float32(dtype: torch.dtype) -> None:
    prepared = prepare(nn.Linear(4, 4).to(dtype), torch.ones(2, 4, dtype=dtype), last=True)
    assert prepared.example[0].dtype == torch.float32
    assert prepared.reference(prepared.arguments)[0].dtype == torch.float32


def test_keyword_inputs_keep_their_names() -> None:
    class Model(nn.Module):
        def forward(self, *, image: Tensor, gain: Tensor) -> dict[str, Tensor]:
            return {"y": image * gain[:, :, None, None]}

    inputs = {"image": torch.randn(1, 3, 4, 4), "gain": torch.randn(1, 3)}
    prepared = prepare(Model(), inputs, last=True)
    assert prepared.module.keys == ("image", "gain")
    assert [tuple(x.shape) for x in prepared.example] == [(1, 4, 4, 3), (1, 3)]


def test_tensors_are_traced_back_to_their_modules() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1)), nn.ReLU())
    root = prepare(model, torch.ones(1, 1, 2, 2), last=True).module
    top = "torchclust.export.layout.Deployed/torch.nn.modules.container.Sequential_model"
    conv = f"{top}/torch.nn.modules.container.Sequential_0/torch.nn.modules.conv.Conv2d_0"
    relu = f"{top}/torch.nn.modules.activation.ReLU_1"
    assert module_of(f"{relu};;{conv};2", root) == "1"
    assert module_of(f"{conv};1_quantized", root) == "0.0"
    assert module_of(f"{top};1", root) is None
    assert module_of("serving_default_args_0", root) is None


class Recurrent(nn.Module):
    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(2, 2), kept
        self.register_buffer("state", torch.zeros(1, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        state = torch.tanh(self.layer(x) + self.state)
        if self.kept:
            self.state = state
        return state


def test_a_model_that_keeps_a_state_is_refused() -> None:
    x, model = torch.ones(1, 2), Recurrent(kept=True)
    with pytest.raises(ExportError, match="output 0 of Recurrent changes from call to call"):
        prepare(model, x, last=True)
    assert not model.state.any()
    counting = Recurrent(kept=False)
    prepare(counting, x, last=True)
    assert counting.calls == 0


def test_a_model_that_draws_at_random_is_refused() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)  # training=True is its default

    x = torch.ones(1, 64)
    with pytest.raises(ExportError, match="keeps a state or draws random numbers"):
        prepare(Dropping(), x, last=True)
    prepare(nn.Dropout(), x, last=True)


def test_a_model_of_nan_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.data[1, 0] = torch.nan
    with pytest.raises(ExportError, match="'weight' holds NaN: training diverged"):
        prepare(model, torch.ones(1, 2), last=True)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("hook", [prune.random_unstructured, nn.utils.weight_norm])
def test_what_hooks_compute_is_copied(hook: Callable[..., Any]) -> None:
    """Torch deep-copies no tensor that was computed with gradients, as theirs are."""
    model = nn.Sequential(nn.Linear(4, 4))
    hook(model[0], "weight", **({"amount": 0.5} if hook is not nn.utils.weight_norm else {}))
    x = torch.rand(1, 4)
    for trained in (False, True):
        if trained:
            model(x).sum().backward()
        prepared = prepare(model, x, last=True)
        torch.testing.assert_close(prepared.module(x)[0], model(x))
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("by_name", [True, False])
def test_a_model_that_works_in_place_leaves_the_samples_alone(by_name: bool) -> None:
    class Normalizing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return x / 0.25

    x = torch.rand(1, 3)
    before = x.clone()
    prepared = prepare(Normalizing(), {"x": x} if by_name else x, last=True)
    (reference,) = prepared.reference((x,))
    assert torch.equal(x, before)
    torch.testing.assert_close(reference, (before - 0.5) / 0.25)
    torch.testing.assert_close(prepared.module(x.clone())[0], reference)


def test_linears_of_buffers_are_left_alone() -> None:
    """A weight that no optimizer trains, behind a flattened map."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("matrix", torch.rand(5, 4 * 36))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.conv(x).flatten(1), self.matrix)

    x, model = torch.rand(1, 3, 8, 8), Fixed()
    prepared = prepare(model, x, last=False)
    torch.testing.assert_close(prepared.module(x)[0], model(x))


def test_outputs_without_dimensions_are_outputs() -> None:
    class WithLoss(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.square().mean()

    x = torch.rand(1, 3, 8, 8)
    prepared = prepare(WithLoss(), x, last=True)
    assert [y.shape for y in prepared.module(*prepared.example)] == [(1, 8, 8, 3), ()]
    assert prepared.module.moved_outputs == (True, False)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"Model cannot be traced on inputs of shape \(1, 2\)"):
        prepare(Model(), torch.ones(1, 2), last=True)


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ((torch.ones(1), 3), TypeError, r"tuple of tensors or a dict of tensors, got tuple"),
        (torch.tensor(1.0), ValueError, r"need a batch dimension, got a scalar"),
    ],
)
def test_example_inputs_are_checked(inputs: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        prepare(nn.Identity(), inputs, last=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got list holding str"):
        named_inputs(["x"])  # type: ignore[list-item]
