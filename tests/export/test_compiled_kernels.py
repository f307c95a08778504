"""Kernels that the compiler makes itself, equal groups and layers, and cores without a channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust.export import to_tflite, vela

ACCELERATORS = ("ethos-u55-128", "ethos-u65-512", "ethos-u85-256")


class Enlarged(nn.Module):
    """An Ethos-U55 doubles a map in four convolutions of 1, 3, 3 and 9."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)


class Equal(nn.Module):
    """Two layers of the same weights, which share a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 1, bias=False) for _ in range(2))
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x)[:, :8], self.second(x)[:, 8:]], 1)


def grouped() -> nn.Module:
    """A convolution of four groups, three of them equal."""
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
    conv.weight.data[4:8] = conv.weight.data[:4]
    conv.weight.data[12:] = conv.weight.data[:4]
    return conv


def narrow() -> nn.Module:
    """One output channel, which leaves the second core of a U65 without any."""
    return nn.Sequential(nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(1, 16, 1))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("kind", [Enlarged, Equal, grouped, narrow])
def test_compiled_files_are_verified(
    kind: Callable[[], nn.Module], accelerator: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), kind(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    report = vela(result.path, accelerator=accelerator)
    assert report.cpu_ops == 0
    assert report.verified is not None
