"""Operators as people write them, and what the file has in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust.export import TFLiteExport, to_tflite, vela
from torchclust.export.layout import prepare

Function = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A function of maps behind a convolution, and a layer that reads what it makes."""

    def __init__(self, function: Function, x: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(x.shape[1], 8, 3, padding=1)
        self.function = function
        made = function(self.conv(x))
        layers = {
            2: nn.Linear,
            4: lambda n, m: nn.Conv2d(n, m, 1),
            3: lambda n, m: nn.Conv1d(n, m, 1),
        }
        self.head = layers[made.ndim](made.shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)))


def maps(size: int = 8, count: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, x: Tensor, folder: Path) -> TFLiteExport:
    return to_tflite(model, x[:1], folder / "a.tflite", calibration=[x])


def cpu_operators(result: TFLiteExport, accelerator: str = "ethos-u55-128") -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = vela(result.path, accelerator=accelerator)
    assert report.cpu_ops == len(report.cpu_operators)
    return [row.operator for row in report.cpu_operators]


AVERAGES: dict[str, Function] = {
    "mean": lambda y: y.mean((2, 3)),
    "mean kept": lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
    "mean of a mean": lambda y: y.mean(3).mean(2),
    "flattened mean": lambda y: y.flatten(2).mean(-1),
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_over_pixels_is_one_mean_on_the_npu(name: str, tmp_path: Path) -> None:
    x = maps()
    model = Around(AVERAGES[name], x)
    result = exported(model, x, tmp_path)
    assert result.operators["MEAN"] == 1
    assert "TRANSPOSE" not in result.operators
    assert cpu_operators(result) == []
    assert result.sqnr_db is not None
    assert result.sqnr_db > 38


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_those_of_the_model(name: str) -> None:
    x = maps()
    model = Around(AVERAGES[name], x).eval()
    prepared = prepare(model, x, last=False)
    torch.testing.assert_close(prepared.module(x[:1])[0], model(x[:1]), rtol=1e-5, atol=1e-6)


def test_a_mean_that_is_read_twice_keeps_its_steps() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.mean(3)
            return rows.mean(2) + rows.amax(2)

    x = maps(count=1)
    torch.testing.assert_close(prepare(Twice(), x, last=False).module(x)[0], Twice()(x))


class Residual(nn.Module):
    """A padding as other frameworks have it, "same" at stride 2, of a map with another reader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.side = nn.Conv2d(8, 8, 1, stride=2)
        self.conv = nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(F.pad(x, (1, 1, 1, 1))))
        return self.side(x) + self.conv(F.leaky_relu(F.pad(x, (0, 1, 0, 1)) * 0.5, 0.3))


def test_a_padded_map_is_not_transposed(tmp_path: Path) -> None:
    result = exported(Residual(), maps(), tmp_path)
    assert "TRANSPOSE" not in result.operators
    assert result.operators["PAD"] == 1
    assert result.sqnr_db is not None
    assert result.sqnr_db > 35
