"""Dead channels, dead inputs, BatchNorm's zeros: what does not matter takes one code, not bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchclust
from torchclust.export import inspect_tflite, to_tflite

DEAD = slice(8, 16)  # of the first convolution's channels, and of the second's inputs


class Net(nn.Module):
    """Two convolutions with BatchNorm, of which the first has lost half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm2(self.second(torch.relu(self.norm1(self.first(x))))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def dead_net() -> Net:
    net = Net()
    with torch.no_grad():
        net.first.weight[DEAD] *= 1e-31
        for _ in range(20):
            net(images())
    return net.eval()


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("aware", [False, True])
def test_dead_output_channels_are_zero(dtype: str, assignment: str, aware: bool) -> None:
    net = dead_net()
    options: dict[str, Any] = {"inputs": images()} if aware else {}
    torchclust.cluster_(net, 8, codebook_dtype=dtype, assignment=assignment, **options)
    clustering = dict(torchclust.named_clusterings(net))["first.weight"]
    assert clustering.indices[DEAD].unique().numel() == 1
    if dtype == "int8":
        assert not net.first.weight[DEAD].any()
    assert (net.first.weight[:8] != 0).float().mean() > 0.5


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_inputs_that_never_vary_cost_nothing(dtype: str, assignment: str) -> None:
    """A dead channel gives the same value at every place but the image's rim; here at every one."""
    net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    x[:, 10:] = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 3.0])
    with torch.no_grad():
        for _ in range(20):
            net(x)
        expected = net.eval()(x)
        plain = torchclust.cluster_(copy.deepcopy(net), 16, codebook_dtype=dtype)
    torchclust.cluster_(net, 16, codebook_dtype=dtype, assignment=assignment, inputs=x)
    indices = dict(torchclust.named_clusterings(net))["0.weight"].indices
    assert indices[:, 10:].unique().numel() == 1
    assert indices[:, :10].unique().numel() > 8
    assert (
        dict(torchclust.named_clusterings(plain))["0.weight"].indices[:, 10:].unique().numel() > 8
    )
    with torch.no_grad():
        error = (net(x) - expected).square().mean()
        assert error < (plain(x) - expected).square().mean()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("aware", [False, True])
def test_channels_behind_a_gamma_of_zero_are_one_code_in_the_file(
    tmp_path: Path, dtype: str, aware: bool
) -> None:
    pytest.importorskip("litert_torch")
    net, file = dead_net(), tmp_path / "net.tflite"
    with torch.no_grad():
        net.norm2.weight[4:] = torch.logspace(-12, -38, 28)
    options: dict[str, Any] = {"inputs": images()} if aware else {}
    torchclust.cluster_(net, 8, codebook_dtype=dtype, **options)
    if aware:
        indices = dict(torchclust.named_clusterings(net))["second.weight"].indices
        assert indices[4:].unique().numel() == 1
    export = to_tflite(net, images()[:1], file, calibration=[images()])
    assert export.sqnr_db is not None
    assert export.sqnr_db > 15
    rows = {row.shape: row for row in inspect_tflite(file) if row.dtype == "int8"}
    assert rows[(32, 3, 3, 16)].entropy_bits < 0.95  # 3 bits for 4 rows of 32, and which they are


def entropies(net: Net, folder: Path) -> dict[tuple[int, ...], float]:
    file = folder / "net.tflite"
    to_tflite(net, images()[:1], file, calibration=[images()[:4]])
    return {
        row.shape: row.entropy_bits for row in inspect_tflite(file) if row.operator == "CONV_2D"
    }


@pytest.fixture(scope="module")
def plain_entropies(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], float]:
    pytest.importorskip("litert_torch")
    return entropies(dead_net(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("k", "dtype", "aware"),
    [(4, "float32", False), (16, "int8", True), (64, "int8", False), (64, "float32", True)],
)
def test_clustered_is_never_larger(
    tmp_path: Path,
    plain_entropies: dict[tuple[int, ...], float],
    k: int,
    dtype: str,
    aware: bool,
) -> None:
    options: dict[str, Any] = {"inputs": images()} if aware else {}
    net = torchclust.cluster_(dead_net(), k, codebook_dtype=dtype, **options)
    bits = entropies(net, tmp_path)
    assert all(bits[shape] < plain_entropies[shape] for shape in plain_entropies)


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_of_no_importance_take_their_nearest_centroid(dtype: str, assignment: str) -> None:
    """Tokens that no batch held, inputs that were 0: they are left out of the fit, not set to 0."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    layer = nn.Linear(32, 64)
    layer.weight.data.copy_(weight)
    importance = torch.rand(64, 32) + 0.5
    importance[:, 20:] = 0
    importance[40:] = 0
    torchclust.cluster_(
        layer, 16, codebook_dtype=dtype, assignment=assignment, preserve_sparsity=True,
        importance={"weight": importance},
    )  # fmt: skip
    wrong = (layer.weight.detach() - weight).square() / weight.square().mean()
    seen = importance > 0
    assert wrong[~seen].mean() < 2 * wrong[seen].mean()
    if assignment == "nearest":
        assert torch.equal(layer.parametrizations.weight.original, weight)
        assert not layer.parametrizations.weight[0].sparsity_mask.any()


def test_a_sentinel_row_leaves_the_others_their_values() -> None:
    table = nn.Embedding(64, 16)
    with torch.no_grad():
        table.weight.mul_(0.02)
        table.weight[0] = -1e4
    before = table.weight.detach()[1:].clone()
    torchclust.cluster_(table, 16)
    assert table.weight[1:].unique().numel() == 15
    assert (table.weight[1:] - before).norm() < 0.2 * before.norm()
