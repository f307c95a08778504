"""Models that cannot be clustered as they are: one line each, and they stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchclust import cluster_, named_clusterings, strip_

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # torch 2.13


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in named_clusterings(model)]


class Wrapped(Tensor):
    """As DTensor and torchao's: a tensor around others."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        out = func(*inner, **(kwargs or {}))
        out = cls(out) if isinstance(out, Tensor) else out
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


def wrapped() -> nn.Module:
    model = nn.Linear(32, 32)
    model.weight = nn.Parameter(Wrapped(model.weight.detach()))
    return model


class Labelled(nn.Linear):
    def __init_subclass__(cls, *, label: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


def transposed() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    return model


def sliced() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(32, 32))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:32])
    return model


def child_named_parametrizations() -> nn.Module:
    model = nn.Linear(32, 32)
    model.parametrizations = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Linear(32, 32)), "compiled by TorchScript; cluster the Pyth"),
        (
            lambda: torch.jit.trace(nn.Linear(32, 32), torch.ones(1, 32)),
            "compiled by TorchScript; cluster the Python module",
        ),
        (
            lambda: nn.Sequential(nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 32))),
            r"'1\.weight' \(RecursiveScriptModule.*compiled by TorchScript",
        ),
        (wrapped, "it is a Wrapped, which keeps its values in a form of its own"),
        (
            lambda: nn.Sequential(nn.Linear(32, 32), Labelled(32, 32)),
            r"'1\.weight' .*derives a class from its module's, and that fails: .*'label'",
        ),
        (transposed, r"shares memory with '1\.weight', another parameter \(a transposed or"),
        (sliced, r"shares memory with '1\.weight', another parameter"),
        (child_named_parametrizations, "has a child named 'parametrizations', which is where torc"),
        (lambda: nn.Sequential(nn.ReLU()), r"matches no parameter: this model has none\. A quant"),
    ],
)
def test_refused_in_one_line(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        cluster_(model)
    if not isinstance(model, torch.jit.ScriptModule):
        assert names(model) == []
        assert not any(type(m).__name__.startswith("Parametrized") for m in model.modules())


def test_views_that_are_left_alone_stay_tied() -> None:
    model = nn.Sequential(transposed(), nn.Linear(32, 32))
    cluster_(model, {"*": 16, "0.*": None})
    model[0][0].weight.data.mul_(2)
    assert torch.equal(model[0][0].weight.t(), model[0][1].weight)


def test_parameters_side_by_side_in_one_buffer_are_no_views() -> None:
    """As flattened recurrent weights, and the even and odd columns of one matrix."""
    whole = torch.randn(32, 64)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    for place in (0, 1):
        model[place].weight = nn.Parameter(whole[:, place::2])
    assert names(cluster_(model)) == ["0.weight", "1.weight"]


def test_a_state_dict_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"cluster_ takes a module, got OrderedDict\. Weights in a"):
        cluster_(nn.Linear(32, 32).state_dict())  # type: ignore[type-var]


def test_children_named_parametrizations_are_clustered() -> None:
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(32, 32)})
    model.other = nn.Linear(32, 32)
    cluster_(model)
    assert names(model) == ["parametrizations.weight.weight", "other.weight"]


@pytest.mark.parametrize("pattern", ["block[0].weight", "block[0].*", "*[[]0].weight"])
def test_brackets_in_names(pattern: str) -> None:
    model = nn.Module()
    for index in (0, 1):
        model.add_module(f"block[{index}]", nn.Linear(32, 32, bias=False))
    assert names(cluster_(model, {pattern: 16})) == ["block[0].weight"]


def test_parameters_with_names_of_old_weight_norm_and_pruning() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(32, 32)
            for name in ("w_g", "w_v", "w_orig"):
                setattr(self, name, nn.Parameter(torch.randn(32, 32)))

    model, plain = Gate(), Gate()
    plain.load_state_dict(model.state_dict())
    cluster_(model, {"w_*": 16})
    assert names(model) == ["w_g", "w_v", "w_orig"]
    for name in ("w_g", "w_v", "w_orig"):
        assert (getattr(model, name) - getattr(plain, name)).norm() < 0.2 * 32


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_old_weight_norm_and_pruning_still_are_what_they_are() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    assert names(cluster_(model)) == ["0.weight", "1.weight"]
    assert [name for name, _ in model.named_buffers() if "mask" in name] == []


class Conv1D(nn.Module):
    """GPT-2's: a Linear that is none."""

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, 3 * n))
        self.bias = nn.Parameter(torch.zeros(3 * n))


@pytest.mark.parametrize(
    ("make", "rules", "message"),
    [
        (
            lambda: nn.Sequential(Conv1D()),
            16,
            r"^0 of the model's 3168 weights are clustered: '0\.weight' \(Conv1D, 3072 elements\) "
            r'.*cluster_\(model, \{"\*": 16, "Conv1D": 16\}\)',
        ),
        (
            lambda: nn.Sequential(nn.Embedding(40, 32), Conv1D(), Conv1D()),
            {"*": 16},
            r"1280 of the model's 7616 weights are clustered: '1\.weight'",
        ),
        (lambda: nn.Linear(3, 4), 16, "nothing is clustered: a tensor needs more elements than"),
    ],
)
def test_says_what_to_type_where_little_is_clustered(
    make: Callable[[], nn.Module], rules: Any, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        cluster_(make(), rules)


@pytest.mark.parametrize("rules", [{"Conv1D": 16}, {"*": 16, "Conv1D": 16}, {"0.weight": 16}])
def test_a_class_name_reaches_matrices(rules: dict[str, Any]) -> None:
    assert names(cluster_(nn.Sequential(Conv1D()), rules)) == ["0.weight"]


def test_nothing_is_said_where_nothing_was_asked_for() -> None:
    assert names(cluster_(nn.Sequential(Conv1D()), {"*": None})) == []


def test_a_class_name_of_vectors() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    with pytest.raises(ValueError, match="rule 'LayerNorm' reaches tensors of one dimension only"):
        cluster_(model, {"LayerNorm": 4})
    assert names(cluster_(model, {"1.weight": 4, "LayerNorm": None})) == []


class Pretrained(nn.Module):
    """As a model of Hugging Face: it saves itself, and ties its weights by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.table.weight

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("whole", [True, False])
def test_tied_weights_that_a_model_seeks_by_name(whole: bool) -> None:
    model = Pretrained() if whole else nn.Sequential(Pretrained(), nn.Linear(16, 16))
    match = r"'(0\.)?table.weight' is tied to '(0\.)?head.weight', and save_pretrained\(\) and tie"
    with pytest.warns(UserWarning, match=match):
        cluster_(model)
    strip_(model)
    inner = model if whole else model[0]  # type: ignore[index]
    assert inner.table.weight is inner.head.weight


def test_tied_weights_of_other_models_are_none_of_its_business() -> None:
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    model[1].weight = model[0].weight
    cluster_(model)
    untied = Pretrained()
    untied.head.weight = nn.Parameter(untied.table.weight.detach().clone())
    assert names(cluster_(untied)) == ["table.weight", "head.weight"]


PRUNINGS: dict[str, Callable[[nn.Module], Any]] = {
    "unstructured": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),  # type: ignore[index]
    "structured": lambda m: prune.ln_structured(m[1], "weight", 0.5, 2, 0),  # type: ignore[index]
    "global": lambda m: prune.global_unstructured(
        [(m[1], "weight"), (m[0], "weight")],  # type: ignore[index]
        prune.L1Unstructured,
        amount=0.5,
    ),
}


@pytest.mark.parametrize("how", PRUNINGS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_clustered_layer_cannot_be_pruned(how: str, copied: bool) -> None:
    model = cluster_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 8)
    model = copy.deepcopy(model) if copied else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    match = r"'weight' of this Linear is clustered, and cannot be pruned any more: prune first, th"
    with pytest.raises(ValueError, match=match):
        PRUNINGS[how](model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    strip_(model)
    PRUNINGS[how](model)  # now it is an ordinary layer
    assert bool((model[1].weight == 0).any())


def test_other_tensors_of_a_clustered_layer_can_be_pruned() -> None:
    model = cluster_(nn.Linear(32, 32), 8)
    prune.l1_unstructured(model, "bias", 0.5)
    assert int((model.bias == 0).sum()) == 16
    assert names(model) == ["weight"]
