"""cluster_(inputs=): the output error falls, the contract holds, labels and the model are left."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchclust
from torchclust.data_aware.batches import calls
from torchclust.data_aware.compensation import Book, Target, compensate
from torchclust.data_aware.input_moments import InputMoments

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (12,)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1, dilation=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding="valid"), (4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1, bias=False), (6, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), (3, 3, 4, 3)),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"codebook_dtype": "int8"},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 3},
    "sparse": {"preserve_sparsity": True},
    "sparse_int8": {"preserve_sparsity": True, "codebook_dtype": "int8"},
}


def correlated(shape: tuple[int, ...], samples: int = 96) -> Tensor:
    """Inputs like activations: correlated over channels, not centred, not negative."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *shape, generator=generator)
    mixing = torch.randn(shape[0], shape[0], generator=generator) + 1
    return torch.einsum("nc...,cd->nd...", x, mixing).relu() + 0.3


def error(layer: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((layer(x) - reference(x)).double().square().mean())


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_error_falls_and_the_contract_holds(kind: str, config: str, assignment: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer, x = build(), correlated(shape)
    options = {**CONFIGS[config], "assignment": assignment}
    if "preserve_sparsity" in options:
        with torch.no_grad():
            layer.weight[layer.weight.abs() < 0.1] = 0
    zeros = layer.weight == 0
    plain = torchclust.cluster_(copy.deepcopy(layer), 5, **options)
    aware = torchclust.cluster_(copy.deepcopy(layer), 5, inputs=x, **options)
    assert error(aware, layer, x) <= 0.9 * error(plain, layer, x)
    if "preserve_sparsity" in options:
        assert not aware.weight[zeros].any()
    if "codebook_dtype" in options:
        ((_, clustering),) = torchclust.named_clusterings(aware)
        assert clustering.codes is not None
        assert len(clustering.codes) <= 5
        assert torch.equal(clustering.codes, -clustering.codes.flip(0))
    if aware.bias is not None:
        with torch.no_grad():
            shift = (aware(x) - layer(x)).transpose(0, 1 if x.dim() > 2 else -1)
        assert shift.flatten(1).mean(1).abs().max() < 1e-5
    before = aware.weight.detach().clone()
    torchclust.strip_(aware)  # validates the number of distinct values
    assert torch.equal(aware.weight, before)


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_are_those_of_the_output(kind: str) -> None:
    """For any weights the quadratic's error is the layer's own output error, up to damping."""
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer, x = build(), correlated(shape)
    other, noisy = copy.deepcopy(layer), x + 0.1 * torch.randn_like(x)
    with torch.no_grad():
        other.weight.add_(0.1 * torch.randn_like(other.weight))
    moments = InputMoments.of(layer, [(x[:32], noisy[:32]), (x[32:], noisy[32:])])
    with torch.no_grad():
        gap = (other(noisy) - layer(x)).double().transpose(0, -1 if x.dim() == 2 else 1).flatten(1)
    shift = moments.shift(other.weight, layer.weight)
    assert torch.allclose(shift, gap.mean(1), atol=1e-5)


def test_compensation_equals_the_best_of_all_assignments() -> None:
    """On three weights of one row, brute force over all 5^3 assignments of a fixed codebook."""
    torch.manual_seed(0)
    near = 0
    for _ in range(20):
        mixing = torch.randn(3, 3)
        hessian = mixing @ mixing.T + 0.1 * torch.eye(3)
        target = Target(hessian, hessian @ torch.randn(3, 1), torch.ones(1))
        values = torch.linspace(-2, 2, 5)[None]
        book = Book(values, torch.zeros(1, dtype=torch.int64), None, torch.ones(1, 5).bool())
        found, indices = compensate([target], book)
        assert torch.equal(found.values, values)  # pinned
        reached = target.error(found.table().T.gather(0, indices))
        every = [
            target.error(torch.tensor(q)[:, None])
            for q in itertools.product(values[0].tolist(), repeat=3)
        ]
        assert reached >= min(every) - 1e-5
        near += reached <= min(every) + 1e-5
    assert near >= 14  # a local search, but a good one


@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
def test_any_magnitude_of_activations_gives_the_same_weights(size: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 10), correlated((12,))
    found = [
        torchclust.cluster_(copy.deepcopy(layer), 5, inputs=x * factor).weight
        for factor in (1.0, size)
    ]
    assert (found[0] - found[1]).square().sum() < 0.01 * found[0].square().sum()


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual, a depthwise convolution, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.body = nn.Sequential(nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y + self.body(self.depthwise(y)) * gate[:, None, None, None]
        return self.head(self.act(y).mean((2, 3)))


def trained_net() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x, gate = Net(), correlated((2, 8, 8), 64), torch.rand(64)
    for _ in range(20):
        net(x, gate)  # gives the BatchNorms statistics
    return net.eval(), x, gate


FORMS: dict[str, Any] = {
    "labelled pairs": lambda x, g: [((a, b), torch.zeros(16)) for a, b in pieces(x, g)],
    "flat with a label": lambda x, g: [
        (a, b, torch.full((16,), torch.nan)) for a, b in pieces(x, g)
    ],
    "dict": lambda x, g: [{"x": a, "gate": b, "labels": None} for a, b in pieces(x, g)],
    "generator": lambda x, g: ((a, b) for a, b in pieces(x, g)),
}


def pieces(x: Tensor, gate: Tensor) -> Any:
    return zip(x.split(16), gate.split(16), strict=True)


@pytest.mark.parametrize("form", FORMS)
def test_network_recovers_whatever_form_the_inputs_have(form: str) -> None:
    net, x, gate = trained_net()
    with torch.no_grad():
        reference = net(x, gate)
        spread = reference.var()
        plain = torchclust.cluster_(copy.deepcopy(net), 6, codebook_dtype="int8")
        worse = (plain(x, gate) - reference).square().mean() / spread
        inputs = FORMS[form](x, gate)
        aware = torchclust.cluster_(net.train(), 6, codebook_dtype="int8", inputs=inputs)
        assert aware.training
        better = (aware.eval()(x, gate) - reference).square().mean() / spread
    assert better < 0.3 * worse


def test_labels_and_order_of_attributes_do_not_matter_but_inputs_do() -> None:
    net, x, gate = trained_net()
    states = [
        torchclust.cluster_(copy.deepcopy(net), 6, inputs=FORMS[form](x, gate)).state_dict()
        for form in ("labelled pairs", "flat with a label")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_can_not_be_compensated_is_fitted_plainly() -> None:
    """An embedding, a recurrent layer, a tied weight, and a layer that never runs."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.gru = nn.GRU(8, 8, batch_first=True)
            self.never = nn.Linear(8, 8)
            self.up = nn.ConvTranspose1d(8, 6, 3)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            states, _ = self.gru(self.table(tokens))
            self.up(states.mT)
            return self.out(states)

    torch.manual_seed(0)
    model = Odd().eval()
    plain = torchclust.cluster_(copy.deepcopy(model), 4)
    aware = torchclust.cluster_(model, 4, inputs=[torch.randint(0, 20, (6, 7))])
    for name in ("table", "never", "out"):
        assert torch.equal(plain.get_submodule(name).weight, aware.get_submodule(name).weight)
    assert torch.equal(plain.gru.weight_ih_l0, aware.gru.weight_ih_l0)
    assert aware.table.weight is aware.out.weight or torch.equal(
        aware.table.weight, aware.out.weight
    )
    assert aware.up.weight.unique().numel() <= 4
    torchclust.strip_(aware)


def test_failure_leaves_the_model_as_it_was() -> None:
    net, x, gate = trained_net()
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot cluster 'head.weight' .*NaN"):
        torchclust.cluster_(net, 6, inputs=[(x, gate)])
    after = net.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) or k == "head.weight" for k in before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "there is no batch of inputs"),
        ([(torch.zeros(2, 2),)], "batch 0 of the inputs has 1 items, the model takes 2"),
        ([(torch.full((1,), torch.inf), torch.zeros(1))], "batch 0 of the inputs holds NaN or inf"),
    ],
)
def test_inputs_that_can_not_be_used(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calls(Net(), inputs)


@pytest.mark.parametrize("share", [1e-3, 1e-4, 1e-5])
def test_inputs_that_hardly_vary(share: float) -> None:
    """Float32 products leave their covariance indefinite; it is damped until it is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 8))
    torchclust.cluster_(model, 4, inputs=100 * (1 + share * torch.randn(64, 300)))
    assert model[0].weight.unique().numel() <= 4
    assert model[0].weight.isfinite().all()
