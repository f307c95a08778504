"""What a model makes of constants in every call is a constant of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import ExportError, TFLiteExport, to_tflite, vela
from torchclust.export.layout import prepare


class Waves(nn.Module):
    """Positions as sines and cosines of growing wavelengths, made in every call."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.zeros_like(x[:, :1]).bool().logical_not().cumsum(3, dtype=torch.float32)
        rates = 1000 ** (torch.arange(4, dtype=torch.float32) / 4)
        angles = steps / rates[:, None, None]
        return x + torch.cat([angles.sin(), angles.cos()], 1)


class Masked(nn.Module):
    """Swin's mask: regions are numbered in place, and pixels see their own region only."""

    def forward(self, x: Tensor) -> Tensor:
        region = x.new_zeros((8, 8))
        for number, rows in enumerate((slice(0, 4), slice(4, 6), slice(6, 8))):
            region[rows] = number
        flat = region.flatten()
        apart = flat[None] != flat[:, None]
        scores = x.flatten(2).transpose(1, 2) @ x.flatten(2)
        scores = scores.masked_fill(apart, -9.0).softmax(-1)
        return (x.flatten(2) @ scores).view(x.shape)


class Filled(nn.Module):
    """Writes what it computes into a tensor of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, 8, 8, 8)
        half = state[:, :4]
        half.copy_(x[:, :4])
        return state + x + half[:, :1]


class Counting(nn.Module):
    """Reads a constant, writes to it, and reads it again."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.full((8, 1), 2.0)
        view = weight.view(8, 1, 1)
        y = x * view
        weight += 1
        return y + x * view


class Counter(nn.Module):
    """Counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x / (self.calls + 1)


class Tossed(nn.Module):
    """Adds what is drawn anew in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(8, 1, 1) * 2


class Embedded(nn.Module):
    """A small network of fixed coordinates, as Swin V2's biases and EdgeNeXt's positions."""

    def __init__(self) -> None:
        super().__init__()
        rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="ij")
        self.register_buffer("at", torch.stack([rows, columns])[None])
        self.net = nn.Sequential(nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.at * 3)


class Projected(nn.Module):
    """The same by linear layers, which the converter computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + self.net(torch.ones(4, 2)).mean(0)[:, None, None]


class Heads(nn.Module):
    """Attention whose scores have a factor per head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.flatten(2).view(1, 4, 2, 64).transpose(2, 3)
        scores = self.scale * (heads @ heads.transpose(2, 3))
        return (scores.softmax(-1) @ heads).transpose(2, 3).reshape(x.shape)


def network(function: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), function, nn.Conv2d(8, 4, 1)).eval()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, folder: Path) -> TFLiteExport:
    x = images()
    return to_tflite(model, x[:1], folder / "a.tflite", calibration=[x])


@pytest.mark.parametrize(
    "kind", [Waves, Masked, Filled, Counting, Counter, Embedded, Projected, Heads]
)
def test_the_model_computes_what_it_did(kind: Callable[[], nn.Module]) -> None:
    model, x = network(kind()), images(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare(model, x, last=False)
    torch.testing.assert_close(prepared.module(2 * x)[0], model(2 * x))
    torch.testing.assert_close(prepared.module(x)[0], model(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def operators(kind: Callable[[], nn.Module]) -> list[str]:
    """What an export has in place of its own, by name."""
    prepared = prepare(network(kind()), images(1), last=False)
    return sorted(str(node.name) for node in prepared.module.traced.substitutes)


def test_what_is_written_from_inputs_is_left_alone() -> None:
    assert operators(Filled) == []


def test_what_is_drawn_is_no_constant() -> None:
    with pytest.raises(ExportError, match="draws random numbers"):
        operators(Tossed)


def test_a_constant_that_changes_between_two_reads_is_left_alone() -> None:
    assert "view" not in operators(Counting)


@pytest.mark.parametrize(
    ("kind", "gone"),
    [(Waves, {"CUMSUM", "DIV", "SIN", "COS", "POW"}), (Masked, {"PAD", "EQUAL", "NOT_EQUAL"})],
)
def test_constants_are_no_operators(
    kind: Callable[[], nn.Module], gone: set[str], tmp_path: Path
) -> None:
    result = exported(network(kind()), tmp_path)
    assert not gone & set(result.operators)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25


def test_positions_leave_nothing_to_the_processor(tmp_path: Path) -> None:
    report = vela(exported(network(Waves()), tmp_path).path)
    assert report.cpu_ops == 0


def test_weights_that_read_constants_keep_their_codes(tmp_path: Path) -> None:
    model = cluster_(network(Embedded()), 8, codebook_dtype="int8")
    result = exported(model, tmp_path)
    codes = {row.parameter: row.int8_codes for row in result.tensors}
    assert {"1.net.0.weight", "1.net.2.weight"} <= set(codes)
    assert all(count is not None and count <= 8 for count in codes.values())


def test_weights_whose_products_are_constants_are_said_to_be_gone(tmp_path: Path) -> None:
    model = cluster_(network(Projected()), 8, codebook_dtype="int8")
    with pytest.warns(UserWarning, match="1.net.0.weight' is not in the file.* is a constant"):
        result = exported(model, tmp_path)
    found = {row.parameter for row in result.tensors}
    assert "1.net.0.weight" not in found
    assert "1.net.2.weight" in found
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30


def test_a_factor_per_head_is_no_convolution(tmp_path: Path) -> None:
    result = exported(network(Heads()), tmp_path)
    assert result.operators["SOFTMAX"] == 1
    assert "DEPTHWISE_CONV_2D" not in result.operators
    assert "DIV" not in result.operators
