"""Kernels that the compiler makes itself, equal groups and layers, and cores without a channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust.export import (
    CompiledFileError,
    NotVerifiedError,
    to_tflite,
    vela,
    verify_compiled,
)
from torchclust.export.graph import read_graph

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


def multiplied() -> nn.Module:
    """Depthwise operations of every second output channel, and a layer of one input channel."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Conv2d(32, 1, 3), nn.Conv2d(1, 16, 3)
    )


def striding() -> nn.Module:
    """Strides that only a U85 computes: an operation for each place of the kernel."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, stride=4, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(32, 16, 2, stride=(1, 5), padding=(0, 2), groups=2),
    )


def narrow() -> nn.Module:
    """One output channel, which leaves the second core of a U65 without any."""
    return nn.Sequential(nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(1, 16, 1))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("kind", [Enlarged, Equal, grouped, multiplied, narrow])
def test_compiled_files_are_verified(
    kind: Callable[[], nn.Module], accelerator: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), kind(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    report = vela(result.path, accelerator=accelerator)
    assert report.cpu_ops == 0
    assert report.verified is not None, report.not_verified


def test_strides_that_only_the_u85_computes_are_verified(tmp_path: Path) -> None:
    """Each place of a kernel is there, by itself and with the layer's scales; none is missing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), striding()).eval()
    x = torch.randn(4, 3, 16, 16)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    report = vela(result.path, accelerator="ethos-u85-256")
    assert (report.cpu_ops, report.not_verified) == (0, "")
    assert report.verified is not None
    assert [row.streams for row in report.verified] == [1, 2 * 9, 2 * 4]


def test_every_second_channel_is_compared_with_its_own_weights_and_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, original = torch.randn(4, 3, 8, 8), tmp_path / "a.tflite"
    to_tflite(nn.Conv2d(3, 6, 3, groups=3).eval(), x[:1], original, calibration=[x])
    compiled = vela(original).path
    content = bytearray(original.read_bytes())
    (weight,) = (graph := read_graph(content)).weights()
    bias = graph.bias(weight.operator)
    assert bias is not None
    bias[[0, 1]] = bias[[1, 0]]
    original.write_bytes(content)
    with pytest.raises(CompiledFileError, match="other scales in"):
        verify_compiled(compiled, original)
    weight.matrix[[2, 3]] = weight.matrix[[3, 2]]
    original.write_bytes(content)
    with pytest.raises(CompiledFileError, match=r"other weights in .*: 9 of"):
        verify_compiled(compiled, original)
    to_tflite(nn.Conv2d(3, 6, 5, groups=3).eval(), x[:1], original, calibration=[x])
    with pytest.raises(NotVerifiedError, match=r"has a depthwise convolution of shape 3x3x3x1"):
        verify_compiled(compiled, original)
