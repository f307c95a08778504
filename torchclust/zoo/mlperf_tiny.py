"""The networks of MLPerf Tiny (Banbury et al., 2021), so that its reference weights load into them.

Layers, sizes and "same" padding are those of the reference models, which were written in another
framework: padding that is not even goes to the bottom and to the right. Parameters are named
alike in all five: ``stem``, ``dw.0``, ``pw.0`` ..., ``fc``, each with a ``conv`` (``linear``) and
a ``bn``. `batch_norm=False` leaves the norms out, for weights into which they have been folded.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]
_EPS, _MOMENTUM = 1e-3, 0.01  # of the reference's BatchNorm


class Conv(nn.Module):
    """Convolution, BatchNorm and ReLU; padded so that a stride of s divides the size by s."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = True,
        relu: bool = True,
        same: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(outputs, _EPS, _MOMENTUM) if norm else None
        self.relu, self.same = relu, same

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, `inputs`, H, W) to (N, `outputs`, ceil(H / stride), ceil(W / stride))."""
        if self.same:
            x = F.pad(x, [*self._missing(x.shape[3], 1), *self._missing(x.shape[2], 0)])
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return F.relu(x) if self.relu else x

    def _missing(self, size: int, dim: int) -> tuple[int, int]:
        kernel, stride = self.conv.kernel_size[dim], self.conv.stride[dim]
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return missing // 2, missing - missing // 2


class Dense(nn.Module):
    """Linear, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, norm: bool = True, relu: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.bn = nn.BatchNorm1d(outputs, _EPS, _MOMENTUM) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, `inputs`) to (N, `outputs`)."""
        x = self.linear(x)
        x = x if self.bn is None else self.bn(x)
        return F.relu(x) if self.relu else x


class KeywordSpotting(nn.Module):
    """`mlperf_kws` as a module."""

    def __init__(self, input_shape: Shape, n_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        norm = batch_norm
        self.stem = Conv(input_shape[0], 64, (10, 4), stride=2, norm=norm)
        self.dw = nn.ModuleList(Conv(64, 64, (3, 3), groups=64, norm=norm) for _ in range(4))
        self.pw = nn.ModuleList(Conv(64, 64, norm=norm) for _ in range(4))
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, frames, coefficients) to logits."""
        x = self.stem(x)
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class VisualWakeWords(nn.Module):
    """`mlperf_vww` as a module."""

    PLAN = (
        (16, 1),
        (32, 2),
        (32, 1),
        (64, 2),
        (64, 1),
        (128, 2),
        *[(128, 1)] * 5,
        (256, 2),
        (256, 1),
    )

    def __init__(self, input_shape: Shape, n_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        norm, channels = batch_norm, 8
        self.stem = Conv(input_shape[0], channels, (3, 3), stride=2, norm=norm)
        self.dw, self.pw = nn.ModuleList(), nn.ModuleList()
        for outputs, stride in self.PLAN:
            depthwise = Conv(channels, channels, (3, 3), stride=stride, groups=channels, norm=norm)
            self.dw.append(depthwise)
            self.pw.append(Conv(channels, outputs, norm=norm))
            channels = outputs
        self.fc = nn.Linear(channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) in [0, 1] to logits."""
        x = self.stem(x)
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class ImageClassification(nn.Module):
    """`mlperf_ic` as a module."""

    def __init__(
        self, input_shape: Shape, n_classes: int, *, filters: int, batch_norm: bool
    ) -> None:
        super().__init__()
        norm, widths = batch_norm, (filters, 2 * filters, 4 * filters)
        self.stem = Conv(input_shape[0], filters, (3, 3), norm=norm)
        self.conv1, self.conv2, self.short = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip((filters, *widths), widths, strict=False):
            stride = outputs // inputs
            self.conv1.append(Conv(inputs, outputs, (3, 3), stride=stride, norm=norm))
            self.conv2.append(Conv(outputs, outputs, (3, 3), norm=norm, relu=False))
            if stride > 1:
                shortcut = Conv(inputs, outputs, stride=stride, norm=False, relu=False)
                self.short.append(shortcut)
        self.fc = nn.Linear(widths[-1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) in [0, 1] to logits."""
        x = self.stem(x * 255)
        for first, second, shortcut in zip(
            self.conv1, self.conv2, (nn.Identity(), *self.short), strict=True
        ):
            x = F.relu(shortcut(x) + second(first(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class AnomalyDetection(nn.Module):
    """`mlperf_ad` as a module."""

    def __init__(self, inputs: int, *, batch_norm: bool) -> None:
        super().__init__()
        sizes = [inputs, *[128] * 4, 8, *[128] * 4]
        layers = [Dense(a, b, norm=batch_norm) for a, b in itertools.pairwise(sizes)]
        self.fc = nn.Sequential(*layers, Dense(sizes[-1], inputs, norm=False, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, `inputs`) to its reconstruction."""
        reconstruction: Tensor = self.fc(x)
        return reconstruction


class StreamingWakeWord(nn.Module):
    """`mlperf_sww` as a module."""

    def __init__(self, input_shape: Shape, n_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        channels, norm = (input_shape[0], 128, 128, 128, 32), batch_norm
        self.dw, self.pw = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs, frames in zip(channels, channels[1:], (3, 5, 10, 15), strict=False):
            depthwise = Conv(
                *(inputs, inputs, (frames, 1)),
                groups=inputs,
                bias=False,
                norm=False,
                relu=False,
                same=False,
            )
            self.dw.append(depthwise)
            self.pw.append(Conv(inputs, outputs, bias=not norm, norm=norm))
        self.fc = nn.Linear(channels[-1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, energies, frames, 1) to logits."""
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def mlperf_kws(
    input_shape: Shape = (1, 49, 10), n_classes: int = 12, *, batch_norm: bool = True
) -> nn.Module:
    """Build the keyword spotter: DS-CNN of 64 channels, 22,604 weights and biases once folded."""
    return KeywordSpotting(input_shape, n_classes, batch_norm=batch_norm)


def mlperf_vww(
    input_shape: Shape = (3, 96, 96), n_classes: int = 2, *, batch_norm: bool = True
) -> nn.Module:
    """Build the visual wake words network: MobileNetV1, a quarter wide, 210,850 once folded."""
    return VisualWakeWords(input_shape, n_classes, batch_norm=batch_norm)


def mlperf_ic(
    input_shape: Shape = (3, 32, 32),
    n_classes: int = 10,
    *,
    filters: int = 16,
    batch_norm: bool = True,
) -> nn.Module:
    """Build the image classifier: ResNet-8, 77,706 once folded; it takes [0, 1], not 0 to 255."""
    return ImageClassification(input_shape, n_classes, filters=filters, batch_norm=batch_norm)


def mlperf_ad(inputs: int = 640, *, batch_norm: bool = True) -> nn.Module:
    """Build the anomaly detector: autoencoder 640-128-128-128-128-8-128-128-128-128-640."""
    return AnomalyDetection(inputs, batch_norm=batch_norm)


def mlperf_sww(
    input_shape: Shape = (40, 30, 1), n_classes: int = 3, *, batch_norm: bool = True
) -> nn.Module:
    """Build the streaming wake word detector: four depthwise and pointwise layers over time."""
    return StreamingWakeWord(input_shape, n_classes, batch_norm=batch_norm)
