"""cluster_, strip_, refit_, restore_ as a PyTorch user meets them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_net import images, net, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchclust
from torchclust import (
    ClusterConfig,
    cluster_,
    fisher_information,
    is_clustered,
    named_clusterings,
    refit_,
    restore_,
    strip_,
    summary,
)
from torchclust.weight.lookup import Memory

MODES: list[dict[str, Any]] = [
    {"assignment": assignment, "codebook_dtype": dtype}
    for assignment in ("fixed", "nearest")
    for dtype in ("float32", "int8")
]


def n_distinct(tensor: Tensor) -> int:
    return len(np.unique(tensor.detach().double().numpy()))


# --- what trains -------------------------------------------------------------------------------


def test_the_optimizer_sees_the_codebook() -> None:
    model = cluster_(net(), 16)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "parametrizations" in n}
    assert shapes == {
        "0.parametrizations.weight.original": (16,),
        "4.parametrizations.weight.original": (16,),
    }


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_centroid_gradient_is_the_scatter_sum_of_the_weights(
    gradient: str, granularity: str
) -> None:
    """Eq. 3: against the gradient of the same weight as a plain parameter."""
    size = 3 if granularity == "group" else None
    layer = cluster_(
        nn.Linear(20, 7), 4, gradient=gradient, granularity=granularity, group_size=size
    )
    plain = strip_(copy.deepcopy(layer))
    x = torch.randn(8, 20)
    for module in (layer, plain):
        module(x).square().sum().backward()
    ((_, clustering),) = named_clusterings(layer)
    expected = np.zeros(np.atleast_2d(clustering.centroids.detach()).shape)
    counts = np.zeros_like(expected)
    for row in range(7):
        book = {"tensor": 0, "channel": row, "group": row // 3}[granularity]
        np.add.at(expected[book], clustering.indices[row].numpy(), plain.weight.grad[row].numpy())
        np.add.at(counts[book], clustering.indices[row].numpy(), 1)
    if gradient == "mean":
        expected = expected / np.maximum(counts, 1)
    found = np.atleast_2d(clustering.centroids.grad.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_int8_gradients_are_those_of_the_product() -> None:
    """Scale and code of ``scale[o] * code`` against autograd on that expression itself."""
    layer = cluster_(nn.Linear(20, 7), 8, codebook_dtype="int8")
    parametrization = layer.parametrizations.weight[0]
    x = torch.randn(8, 20)
    layer(x).square().sum().backward()
    magnitudes = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    relative = parametrization.relative_scale.detach().clone().requires_grad_()
    table = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])
    weight = relative[:, None] * table[parametrization.indices.long()]
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, magnitudes.grad)
    torch.testing.assert_close(parametrization.relative_scale.grad, relative.grad)


def test_trained_int8_tensors_keep_the_weights_magnitude() -> None:
    """Adam moves an element by about the learning rate, so units decide whether it can learn."""
    layer = nn.Linear(64, 64)
    nn.init.normal_(layer.weight, std=0.02)
    cluster_(layer, 16, codebook_dtype="int8")
    assert 0.005 < layer.parametrizations.weight.original.abs().mean() < 0.2
    assert 0.2 < layer.parametrizations.weight[0].relative_scale.min() < 2


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_nearest_assigns_anew(codebook_dtype: str) -> None:
    layer = cluster_(nn.Linear(20, 7), 5, assignment="nearest", codebook_dtype=codebook_dtype)
    ((_, clustering),) = named_clusterings(layer)
    before = clustering.indices.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original[0] = 10.0
        layer.parametrizations.weight.original[1] = -10.0
    weight = layer.weight.detach()
    assert torch.equal(weight[0], weight[0].max().expand(20))
    assert torch.equal(weight[1], weight[1].min().expand(20))
    assert (clustering.indices[0] == 4).all()
    assert (clustering.indices[1] == 0).all()
    assert torch.equal(clustering.indices[2:], before[2:])


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
def test_nearest_is_the_nearest(codebook_dtype: str) -> None:
    layer = cluster_(nn.Linear(40, 30), 7, assignment="nearest", codebook_dtype=codebook_dtype)
    train_weight = layer.parametrizations.weight.original
    with torch.no_grad():
        train_weight.add_(torch.randn_like(train_weight) * 0.05)
    ((_, clustering),) = named_clusterings(layer)
    scale = torch.ones(30) if clustering.scale is None else clustering.scale.detach()
    values = clustering.centroids.detach() if clustering.codes is None else clustering.codes
    table = scale[:, None] * values.float().sort().values
    distance = (train_weight.detach()[..., None] - table[:, None, :]).abs()
    chosen = distance.gather(2, clustering.indices.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.min(-1).values, rtol=0, atol=1e-6)


# --- sparsity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_exactly_zero(mode: dict[str, Any], optimizer: str) -> None:
    model = net()
    for module in (model[0], model[4]):
        prune.l1_unstructured(module, "weight", amount=0.6)
    zeros = {i: model[i].weight == 0 for i in (0, 4)}
    cluster_(model, 8, preserve_sparsity=True, **mode)
    builders: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    }
    train(model, 5, builders[optimizer](model.parameters()))
    for i, mask in zeros.items():
        assert (model[i].weight[mask] == 0).all()
        assert not hasattr(model[i], "weight_mask")
    for i, mask in zeros.items():
        assert (strip_(model)[i].weight[mask] == 0).all()


def test_pruned_zeros_are_read_before_the_next_forward() -> None:
    """`prune` recomputes ``weight`` in a forward hook: after an edit it is stale until then."""
    layer = nn.Linear(10, 10)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)
    expected = (layer.weight_orig * layer.weight_mask).detach()
    cluster_(layer, 90, preserve_sparsity=True)
    torch.testing.assert_close(layer.weight.detach(), expected, atol=0.02, rtol=0)
    assert torch.equal(layer.weight == 0, expected == 0)


# --- other people's reparametrizations, tying, sharing -----------------------------------------


def test_weight_norm_is_evaluated_and_clustered() -> None:
    layer = parametrizations.weight_norm(nn.Linear(30, 30))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
        expected = layer.weight.clone()
    cluster_(layer, 200)
    torch.testing.assert_close(layer.weight.detach(), expected, atol=0.05, rtol=0)
    assert type(strip_(layer)) is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]


def test_another_tensors_parametrization_is_left_alone() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = nn.LSTMCell(6, 5)
    parametrize.register_parametrization(layer, "bias_ih", Doubled())
    bias = layer.bias_ih.detach().clone()
    cluster_(layer, 4)
    copied = copy.deepcopy(layer)
    strip_(layer)
    assert torch.equal(layer.bias_ih, bias)
    assert parametrize.is_parametrized(layer, "bias_ih")
    assert not parametrize.is_parametrized(layer, "weight_ih")
    assert is_clustered(copied, "weight_ih")
    assert n_distinct(copied.weight_ih) == 4
    train_input = torch.randn(2, 6)
    assert torch.equal(copied(train_input)[0], layer(train_input)[0])


def test_tied_weights_are_clustered_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    model[1].weight = model[0].weight
    cluster_(model, 4)
    assert len(list(named_clusterings(model))) == 1
    assert len(list(model.parameters())) == 1
    assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original
    model(torch.arange(5)).square().mean().backward()
    restored = restore_(copy.deepcopy(strip_(copy.deepcopy(model))), model.state_dict())
    assert torch.equal(restored(torch.arange(5)), model(torch.arange(5)))
    strip_(model)
    assert model[0].weight is model[1].weight
    assert n_distinct(model[0].weight) == 4


def test_a_shared_module_answers_to_both_its_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    cluster_(model, {"b.weight": 4})
    assert [name for name, _ in named_clusterings(model)] == ["a.weight"]


def test_encoder_layers_fast_path_reads_the_lookup() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
    cluster_(layer, 3)
    assert len(list(named_clusterings(layer))) == 4
    slow = layer(x).detach()
    with torch.no_grad():
        fast = layer(x)
    stripped = strip_(copy.deepcopy(layer))
    with torch.no_grad():
        assert torch.equal(fast, stripped(x))
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(fast, before, atol=1e-3)


def test_user_subclasses_and_custom_modules() -> None:
    class Scaled(nn.Linear):
        pass

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.randn(9, 9))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mixing

    model = nn.Sequential(Scaled(9, 9), Gate())
    cluster_(copy.deepcopy(model), {"Scaled": 4, "Gate": 5})
    cluster_(model, {"*": 4, "1.mixing": 6})
    assert n_distinct(model[0].weight) == 4
    assert n_distinct(model[1].mixing) == 6
    strip_(model)
    assert type(model[0]) is Scaled
    assert type(model[1]) is Gate


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LazyLinear(8), "is lazy and has no values yet; run one batch"),
        (lambda: nn.Linear(8, 8, device="meta"), "on the meta device and has no values"),
        (lambda: nn.Embedding(8, 8, sparse=True), "sparse=True gives gradients by row"),
        (lambda: nn.EmbeddingBag(8, 8, max_norm=1.0), "max_norm rescales rows in place"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its dtype is torch.complex64"),
    ],
)
def test_what_cannot_be_clustered_says_why(module: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module())
    with pytest.raises(ValueError, match=message):
        cluster_(model)
    assert not is_clustered(model)
    with pytest.warns(UserWarning, match=message):
        cluster_(model, strict=False)
    assert is_clustered(model[0])
    assert not is_clustered(model[1])


def test_a_hooked_weight_says_why() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"a forward hook recomputes it \(spectral_norm\?\)"):
        cluster_(layer)


def test_hooked_weight_norm_is_evaluated() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    expected = layer(torch.eye(8))
    cluster_(layer, 63)
    torch.testing.assert_close(layer(torch.eye(8)), expected, atol=0.05, rtol=0)
    assert sorted(n for n, _ in strip_(layer).named_parameters()) == ["bias", "weight"]


# --- safety ------------------------------------------------------------------------------------


def test_failure_halfway_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    parametrizations.weight_norm(model[2])
    with torch.no_grad():
        model[4].weight[3, 3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"cannot cluster '4.weight' \(Linear\): values .*NaN"):
        cluster_(model, 4)
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensor, before[name], equal_nan=True)


def test_what_is_skipped_stays_bit_identical() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.Linear(2, 3)
    )
    tensors = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    cluster_(model, 16)
    skipped = {row.name: row.skipped for row in summary(model).rows if row.skipped}
    assert skipped["0.weight"] == "depthwise convolution"
    assert skipped["1.weight"] == "not a weight that is clustered by default"
    assert skipped["3.weight"] == "a tensor needs more elements than clusters"
    present = dict(model.named_parameters())
    for name in skipped:
        assert id(present[name]) == tensors[name][0]
        assert torch.equal(present[name], tensors[name][1])


def test_strip_refuses_a_weight_with_too_many_values() -> None:
    layer = cluster_(nn.Linear(20, 20), 4)
    parametrize.register_parametrization(layer, "weight", _Noise(), unsafe=True)
    with pytest.raises(ValueError, match=r"'weight' holds \d+ distinct values, more than n_clu"):
        strip_(layer)
    assert is_clustered(layer)
    strip_(layer, validate=False)
    assert not is_clustered(layer)


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, x.numel()).view(x.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dtype": "int8"},
        {"granularity": "channel"},
        {"assignment": "nearest"},
        {"assignment": "nearest", "rate": 0.1},
        {"assignment": "nearest", "rate": 0.1, "codebook_dtype": "int8"},
    ],
    ids=str,
)
def test_a_bias_is_clustered_trained_and_stripped(options: dict[str, Any]) -> None:
    layer = nn.Linear(20, 40)
    nn.init.normal_(layer.bias)
    cluster_(layer, {"*": 8, "bias": 5}, **options)
    layer(torch.randn(2, 20)).square().sum().backward()
    for parameter in layer.parameters():
        if parameter.grad is not None:
            parameter.data -= 1e-3 * parameter.grad
    trained = layer.bias.detach().clone()
    assert "bias" in str(torchclust.summary(layer))
    strip_(layer)
    assert torch.equal(layer.bias, trained)
    if options.get("codebook_dtype") != "int8" and "granularity" not in options:
        assert len(layer.bias.unique()) <= 5


def test_strip_is_idempotent_and_keeps_the_parameter() -> None:
    model = net()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    strip_(strip_(cluster_(model, 4)))
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert strip_(nn.Linear(2, 2)) is not None


def test_clustering_again_replaces_the_clustering() -> None:
    model = cluster_(cluster_(net(), 16), 4)
    assert n_distinct(model[4].weight) == 4
    assert len(list(model[4].parametrizations.weight)) == 1


def test_refit_fits_to_the_weights_that_train() -> None:
    layer = cluster_(nn.Linear(20, 20), 4, assignment="nearest")
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3).add_(1)
    off = (layer.weight - layer.parametrizations.weight.original).norm()
    latent = layer.parametrizations.weight.original.detach().clone()
    refit_(layer)
    assert (layer.weight - layer.parametrizations.weight.original).norm() < off / 3
    assert torch.equal(layer.parametrizations.weight.original, latent)


def test_assigning_a_weight_fits_anew() -> None:
    layer = cluster_(nn.Linear(20, 20), 400 // 2)
    value = torch.randn(20, 20)
    layer.weight = value
    torch.testing.assert_close(layer.weight.detach(), value, atol=0.05, rtol=0)


# --- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("via", ["pickle", "torch", "safetensors"])
def test_state_dict_round_trips(mode: dict[str, Any], via: str, tmp_path: Path) -> None:
    model = cluster_(net(), 8, **mode)
    train(model)
    model.eval()
    state = model.state_dict()
    if via == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif via == "torch":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        safetensors.torch.save_file(state, tmp_path / "state.safetensors")
        state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    restored = restore_(net(), state).eval()
    assert torch.equal(restored(images()), model(images()))
    again = cluster_(net(), 8, **mode)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(images()), model(images()))


def test_a_new_process_continues_bit_for_bit(tmp_path: Path) -> None:
    """Clustered, trained, saved; restored elsewhere, trained on: equal to training straight on."""
    models = {}
    for number, mode in enumerate(MODES):
        models[number] = model = cluster_(net(), 8, **mode)
        optimizer = train(model)
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / f"{number}.pt")
        train(model, 2, optimizer)
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from small_net import net, train
from torchclust import restore_
for number in range({len(MODES)}):
    file = f"{tmp_path}/{{number}}.pt"
    state, of_optimizer = torch.load(file)
    model = restore_(net(), state)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer.load_state_dict(of_optimizer)
    train(model, 2, optimizer)
    torch.save(model.state_dict(), file)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    for number, model in models.items():
        continued = torch.load(tmp_path / f"{number}.pt")
        assert continued.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(continued[name], tensor), (MODES[number], name)


def test_restore_says_what_is_missing() -> None:
    state = cluster_(nn.Sequential(nn.Linear(8, 8)), 4).state_dict()
    with pytest.raises(ValueError, match=r"has a clustered '0\.weight', this model has no suc"):
        restore_(nn.Linear(8, 8), state)
    plain = nn.Linear(8, 8)
    restore_(cluster_(nn.Linear(8, 8), 4), plain.state_dict())


# --- torch citizenship -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_models_stay_clustered(mode: dict[str, Any], dtype: torch.dtype) -> None:
    model = cluster_(net(), 8, **mode).to(dtype)
    assert model[4].weight.dtype == dtype
    if mode["codebook_dtype"] == "float32":
        assert n_distinct(model[4].weight) <= 8
    else:
        ((_, first), _) = named_clusterings(model)
        ((_, original), _) = named_clusterings(cluster_(net(), 8, **mode))
        assert torch.equal(first.codes, original.codes), "a cast must not move the codes"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_autocast_accumulation_and_clipping(mode: dict[str, Any]) -> None:
    model = cluster_(net(), 8, **mode)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images()).float().square().mean()
        loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    optimizer.step()
    ((name, clustering), _) = named_clusterings(model)
    table = clustering.indices.unique()
    assert len(table) <= 8, name


def test_frozen_weights_stay_frozen() -> None:
    for mode in MODES:
        model = net()
        model[0].weight.requires_grad_(False)
        before = cluster_(model, 8, **mode)[0].weight.detach().clone()
        train(model)
        assert torch.equal(model[0].weight, before)
        assert not model[0].weight.requires_grad
        assert not strip_(model)[0].weight.requires_grad


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_functional_call_and_inference_mode(mode: dict[str, Any]) -> None:
    model = cluster_(net(), 8, **mode).eval()
    expected = model(images()).detach()
    with torch.inference_mode():
        assert torch.equal(model(images()), expected)
        assert torch.equal(model(images()), expected)
    with torch.no_grad():
        assert torch.equal(model(images()), expected)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, state, (images(),)), expected)
    doubled = {n: 2 * p.detach() for n, p in model.named_parameters()}
    with torch.no_grad():
        changed = torch.func.functional_call(model, doubled, (images(),))
        assert not torch.allclose(changed, expected)
        assert torch.equal(model(images()), expected)
    train(model, 1)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_exported_program_equals_the_model(mode: dict[str, Any]) -> None:
    model = cluster_(net(), 8, **mode).eval()
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_compiled_training_equals_eager(mode: dict[str, Any]) -> None:
    torch.compiler.reset()  # compilations of this network are limited, and other tests make some
    eager, compiled = cluster_(net(), 8, **mode), cluster_(net(), 8, **mode)
    train(eager, 2, torch.optim.SGD(eager.parameters(), 0.01))
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    train(run, 2, torch.optim.SGD(compiled.parameters(), 0.01))
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# --- the cached lookup -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_eval_looks_up_once_until_something_changes(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = cluster_(nn.Linear(12, 12), 5, **mode)
    count = 0
    parametrization = layer.parametrizations.weight[0]
    evaluate = parametrization._evaluate

    def counted(original: Tensor, memory: Memory | None) -> Tensor:
        nonlocal count
        count += 1
        return evaluate(original, memory)

    monkeypatch.setattr(parametrization, "_evaluate", counted)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        first = layer.weight
        assert layer.weight is first
        assert count == 1
        original.mul_(2)
        assert not torch.equal(layer.weight, first)
        assert count == 2
        if mode["assignment"] == "fixed":
            original.data.mul_(2)  # leaves the version counter alone
            layer.weight  # noqa: B018
            assert count == 3
            count = 2
        edited = layer.weight.zero_()
        assert not torch.equal(layer.weight, edited), "an edit of the result must not stick"
        count = 0
        layer.load_state_dict(layer.state_dict())
        layer.weight  # noqa: B018
        assert count == 1
    layer.weight.sum().backward()
    assert parametrization._cached is None
    with torch.no_grad():
        layer.weight  # noqa: B018
    assert copy.deepcopy(layer).parametrizations.weight[0]._cached is None


# --- importance --------------------------------------------------------------------------------


def test_fisher_information_is_the_mean_squared_gradient() -> None:
    model = net().train()
    model[4].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones(5, 96)
    before = copy.deepcopy(model.state_dict())
    batches = [(images(2), torch.tensor([0, 1])), (images(3)[1:], torch.tensor([4, 4]))]
    found = fisher_information(model, iter(batches), nn.functional.cross_entropy)
    reference = copy.deepcopy(model).eval()
    expected = torch.zeros(5, 96)
    for x, y in batches:
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        expected += reference[4].weight.grad ** 2 / 2
    torch.testing.assert_close(found["4.weight"], expected)
    assert found["4.bias"].abs().sum() > 0
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert model.training
    assert not model[4].bias.requires_grad
    assert torch.equal(model[4].weight.grad, torch.ones(5, 96))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_fisher_information_of_a_clustered_model_is_of_its_weights() -> None:
    batches = [(images(), torch.tensor([0, 1, 2, 3]))]
    clustered = cluster_(net(), 8)
    found = fisher_information(clustered, batches, nn.functional.cross_entropy)
    stripped = strip_(clustered)
    expected = fisher_information(stripped, batches, nn.functional.cross_entropy)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("by_name", [False, True])
def test_fisher_information_passes_inputs_on_as_they_are_given(by_name: bool) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scale * super().forward(x)

    model, x, scale, y = Scaled(3, 2), torch.randn(5, 3), torch.tensor(2.0), torch.randn(5, 2)
    given = {"scale": scale, "x": x} if by_name else (x, scale)
    found = fisher_information(model, [(given, y)], nn.functional.mse_loss)
    expected = torch.autograd.grad(nn.functional.mse_loss(model(x, scale), y), model.weight)[0]
    torch.testing.assert_close(found["weight"], expected**2)


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_an_all_zero_weight_stays_all_zero_in_int8(assignment: Any) -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    cluster_(model, 4, codebook_dtype="int8", assignment=assignment)
    assert not model.weight.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert len(model.weight.unique()) <= 3 * len(model.weight)
    assert torch.isfinite(model.weight).all()
    strip_(model)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "needs at least one batch, got none"),
        ([torch.zeros(2)], r"a batch must be a pair \(inputs, target\), got Tensor"),
        ([(1, 2, 3)], r"a batch must be a pair \(inputs, target\), got tuple of 3"),
    ],
)
def test_fisher_information_refuses(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_information(net(), batches, nn.functional.cross_entropy)


@pytest.mark.parametrize("options", [{}, {"codebook_dtype": "int8"}, {"granularity": "channel"}])
def test_importance_moves_the_error_to_where_it_matters_less(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 400)
    weight[:, :200] *= 0.3
    importance = torch.ones(8, 400)
    importance[:, :200] = 1000.0

    def errors(given: dict[str, Tensor] | None) -> tuple[float, float]:
        layer = nn.Linear(400, 8)
        layer.weight.data = weight.clone()
        cluster_(layer, 6, importance=given, **options)
        error = (layer.weight - weight).square()
        return error[:, :200].sum().item(), error[:, 200:].sum().item()

    plain, weighted = errors(None), errors({"weight": importance})
    assert weighted[0] < plain[0]
    assert weighted[1] > plain[1]


def test_importance_errors() -> None:
    with pytest.raises(ValueError, match=r"importance of '4.weight' must have its shape \(5, 96\)"):
        cluster_(net(), importance={"4.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="importance names no tensor that is clustered"):
        cluster_(net(), importance={"head.weight": torch.ones(3)})


# --- summary -----------------------------------------------------------------------------------


def test_summary_counts_what_is_there() -> None:
    int8 = {"n_clusters": 8, "codebook_dtype": "int8"}
    model = cluster_(net(), {"0.weight": 4, "4.weight": int8})
    report = summary(model)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [name for name, _ in net().named_parameters()]
    assert (rows["0.weight"].distinct, rows["0.weight"].n_clusters) == (4, 4)
    assert (rows["4.weight"].distinct, rows["4.weight"].codebook_dtype) == (7, "int8")
    assert rows["0.weight"].rate == pytest.approx(162 * 32 / (162 * 2 + 4 * 32))  # Eq. 1
    counts = np.unique(model[0].weight.detach().numpy(), return_counts=True)[1] / 162
    assert rows["0.weight"].entropy_bits == pytest.approx(-(counts * np.log2(counts)).sum())
    weight = net()[0].weight
    assert rows["0.weight"].error == pytest.approx(
        ((model[0].weight - weight).norm() / weight.norm()).item(), rel=1e-5
    )
    text = str(report)
    assert "skipped: not a weight that is clustered by default" in text
    assert "8 int8" in text
    assert report.to_dict()["tensors"][0]["name"] == "0.weight"
    assert len(report.plot().axes) == 2


def test_paper_example_rate() -> None:
    """Deep Compression section 3: 16 weights in 4 clusters of 32-bit floats compress 3.2 times."""
    layer = cluster_(nn.Linear(4, 4, bias=False), 4)
    assert summary(layer).rate == pytest.approx(3.2)


def test_summary_plot_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to plot: no tensor is clustered"):
        summary(net()).plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .torchclust\[recipes\]"):
        summary(cluster_(net())).plot()


def test_configs_travel_with_the_state() -> None:
    config = ClusterConfig(8, assignment="nearest", preserve_sparsity=True, gradient="mean")
    restored = restore_(net(), cluster_(net(), config).state_dict())
    assert [c.config for _, c in named_clusterings(restored)] == [config, config]


def test_public_names_are_documented() -> None:
    for name in torchclust.__all__:
        assert getattr(torchclust, name).__doc__, name
