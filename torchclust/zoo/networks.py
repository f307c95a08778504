"""The networks that recipes name: small ones from the literature, mobile ones at full size.

Every builder takes `input_shape` (channels, height, width) and `n_classes` and returns an
untrained `nn.Module` from float32 images (N, C, H, W) to logits (N, n_classes). A recipe's
``model.name`` is a key of `MODELS`; the section's other keys are the builder's keyword arguments.
They use only layers that the int8 export keeps on the accelerator, and `torch.manual_seed` before
the call makes them reproducible.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from torchclust.zoo.mlperf_tiny import Shape, mlperf_ic, mlperf_kws, mlperf_sww, mlperf_vww

MNIST: Shape = (1, 28, 28)
IMAGENET: Shape = (3, 224, 224)


def seed_cnn(
    input_shape: Shape = MNIST, n_classes: int = 10, *, batch_norm: bool = False
) -> nn.Module:
    """Build conv 32 - pool - conv 64 - pool - dense 256 - dense `n_classes`.

    The network of the article that started this project: 3x3 kernels without padding, dropout 0.25
    after each pool, 431,242 parameters on MNIST. `batch_norm` puts a BatchNorm between each
    convolution and its ReLU.
    """
    channels, height, width = input_shape
    pixels = ((height - 2) // 2 - 2) // 2 * (((width - 2) // 2 - 2) // 2)
    layers: list[tuple[str, nn.Module | None]] = [
        ("conv1", nn.Conv2d(channels, 32, 3, bias=not batch_norm)),
        ("norm1", nn.BatchNorm2d(32) if batch_norm else None),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("drop1", nn.Dropout(0.25)),
        ("conv2", nn.Conv2d(32, 64, 3, bias=not batch_norm)),
        ("norm2", nn.BatchNorm2d(64) if batch_norm else None),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("drop2", nn.Dropout(0.25)),
        ("flatten", nn.Flatten()),
        ("dense1", nn.Linear(64 * pixels, 256)),
        ("relu3", nn.ReLU()),
        ("dense2", nn.Linear(256, n_classes)),
    ]
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers if layer is not None))


def mnist_convnet(input_shape: Shape = MNIST, n_classes: int = 10) -> nn.Module:
    """Build conv 5x5x32 - pool - conv 5x5x64 - pool - dense 100 - dense `n_classes`.

    Stands for TFMOT's "ConvNet" row, whose layers were never published, only its size: 0.57 MB as a
    zipped float file. This LeNet of 155,606 parameters (0.62 MB plain) is of that size.
    """
    channels, height, width = input_shape
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        *_conv(channels, 32, 5, padding=0, norm=False),
        nn.MaxPool2d(2),
        *_conv(32, 64, 5, padding=0, norm=False),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * pixels, 100),
        nn.ReLU(),
        nn.Linear(100, n_classes),
    )


def lenet_300_100(input_shape: Shape = MNIST, n_classes: int = 10) -> nn.Module:
    """Build LeNet-300-100, the perceptron of Deep Compression's Table 2: 266,610 parameters."""
    return _perceptron(input_shape, (300, 100), n_classes)


def arm_mlp(input_shape: Shape = MNIST, n_classes: int = 10) -> nn.Module:
    """Build the 784-128-64-10 perceptron of Arm's Ethos-U clustering study: 109,386 parameters."""
    return _perceptron(input_shape, (128, 64), n_classes)


def lenet_5(input_shape: Shape = MNIST, n_classes: int = 10) -> nn.Module:
    """Build Caffe's LeNet-5, as in Deep Compression's Table 3: 431,080 parameters.

    5x5 convolutions with 20 and 50 maps and no ReLU between them, then 500 hidden units.
    """
    channels, height, width = input_shape
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * pixels, 500),
        nn.ReLU(),
        nn.Linear(500, n_classes),
    )


def ds_cnn_l(input_shape: Shape = (1, 49, 10), n_classes: int = 12) -> nn.Module:
    """Build DS-CNN-L: conv 10x4x276, then five depthwise-separable blocks of 276 channels.

    The large keyword spotter of Zhang et al., "Hello Edge" (2017), on 49 frames of 10 MFCCs.
    The first convolution has stride 2 in time, the first block in both directions: maps of
    25 x 10, then 13 x 5. 410,700 parameters with BatchNorm folded, 28.3M MACs.
    """
    channels = input_shape[0]
    blocks = [_separable(276, 276, stride=2 if i == 0 else 1, relu=nn.ReLU) for i in range(5)]
    return nn.Sequential(
        nn.ZeroPad2d((1, 2, 4, 5)),
        nn.Conv2d(channels, 276, (10, 4), stride=(2, 1), bias=False),
        nn.BatchNorm2d(276),
        nn.ReLU(),
        *blocks,
        *_head(276, n_classes, dropout=0.2),
    )


def mobilenet_v1(
    input_shape: Shape = IMAGENET,
    n_classes: int = 1000,
    *,
    width: float = 1.0,
    stem_stride: int | None = None,
) -> nn.Module:
    """Build MobileNetV1 (Howard et al., 2017): 4,231,976 parameters and 569M MACs by default.

    `width` multiplies every channel count. The first convolution has `stem_stride`, by default the
    paper's 2, but 1 on inputs below 64 pixels, as is customary for small images, so that the last
    maps keep more than one pixel.
    """
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    plan += [(1024, 2), (1024, 1)]
    channels = _scaled(32, width)
    stride = stem_stride or (2 if min(input_shape[1:]) >= 64 else 1)
    layers = [*_conv(input_shape[0], channels, 3, stride=stride, relu=nn.ReLU6)]
    for outputs, stride in plan:
        layers.append(_separable(channels, _scaled(outputs, width), stride=stride, relu=nn.ReLU6))
        channels = _scaled(outputs, width)
    return nn.Sequential(*layers, *_head(channels, n_classes, dropout=0.001))


def mobilenet_v2(
    input_shape: Shape = IMAGENET,
    n_classes: int = 1000,
    *,
    width: float = 1.0,
    stem_stride: int | None = None,
) -> nn.Module:
    """Build MobileNetV2 (Sandler et al., 2018): 3,504,872 parameters and 300M MACs by default.

    `width` multiplies every channel count (the last one only above 1, as in the paper); small
    inputs as for `mobilenet_v1`.
    """
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    plan += [(6, 160, 3, 2), (6, 320, 1, 1)]
    channels = _scaled(32, width)
    stride = stem_stride or (2 if min(input_shape[1:]) >= 64 else 1)
    layers = [*_conv(input_shape[0], channels, 3, stride=stride, relu=nn.ReLU6)]
    for expansion, outputs, repeats, stride in plan:
        for i in range(repeats):
            block = _inverted(channels, _scaled(outputs, width), stride if i == 0 else 1, expansion)
            layers.append(block)
            channels = _scaled(outputs, width)
    last = _scaled(1280, max(1.0, width))
    layers += _conv(channels, last, 1, relu=nn.ReLU6)
    return nn.Sequential(*layers, *_head(last, n_classes, dropout=0.2))


def resnet8(input_shape: Shape = (3, 32, 32), n_classes: int = 10) -> nn.Module:
    """Build the residual network of MLPerf Tiny: three stages of one block, 16 to 64 channels.

    77,946 parameters (78,666 as published, which counts 240 biases before BatchNorm and its 480
    running statistics) and 12.5M MACs on 32x32.
    """
    return nn.Sequential(
        *_conv(input_shape[0], 16, 3),
        Residual(_basic(16, 16, 1), None, nn.ReLU()),
        Residual(_basic(16, 32, 2), nn.Conv2d(16, 32, 1, stride=2), nn.ReLU()),
        Residual(_basic(32, 64, 2), nn.Conv2d(32, 64, 1, stride=2), nn.ReLU()),
        *_head(64, n_classes, dropout=0.0),
    )


class Residual(nn.Module):
    """Add a `body`'s output to its input (to `shortcut` of it), then apply `activation`, if any."""

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the body's output shape."""
        y: Tensor = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.activation is None else self.activation(y)


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    norm: bool = True,
    relu: type[nn.Module] | None = nn.ReLU,
) -> list[nn.Module]:
    """Return convolution, BatchNorm and activation; the bias is there only without a norm."""
    pad = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=not norm)
    return [conv, *([nn.BatchNorm2d(outputs)] if norm else []), *([relu()] if relu else [])]


def _separable(inputs: int, outputs: int, *, stride: int, relu: type[nn.Module]) -> nn.Sequential:
    """Return a depthwise 3x3 and a pointwise convolution, each with BatchNorm and activation."""
    depthwise = _conv(inputs, inputs, 3, stride=stride, groups=inputs, relu=relu)
    return nn.Sequential(*depthwise, *_conv(inputs, outputs, 1, relu=relu))


def _inverted(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """Return an inverted residual block; the addition only where shapes agree."""
    hidden = inputs * expansion
    widen = _conv(inputs, hidden, 1, relu=nn.ReLU6) if expansion > 1 else []
    depthwise = _conv(hidden, hidden, 3, stride=stride, groups=hidden, relu=nn.ReLU6)
    body = nn.Sequential(*widen, *depthwise, *_conv(hidden, outputs, 1, relu=None))
    return Residual(body) if stride == 1 and inputs == outputs else body


def _basic(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return ResNet's body of two 3x3 convolutions; the last ReLU comes after the addition."""
    first = _conv(inputs, outputs, 3, stride=stride)
    return nn.Sequential(*first, *_conv(outputs, outputs, 3, relu=None))


def _head(channels: int, n_classes: int, *, dropout: float) -> list[nn.Module]:
    """Return global average pooling and the classifier."""
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    drop = [nn.Dropout(dropout)] if dropout else []
    return [*pool, *drop, nn.Linear(channels, n_classes)]


def _perceptron(input_shape: Shape, hidden: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return fully connected layers with ReLU between them."""
    sizes = [input_shape[0] * input_shape[1] * input_shape[2], *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))


def _scaled(channels: int, width: float) -> int:
    """Return `channels` x `width` as a multiple of 8, at most a tenth below the exact product.

    The rounding that both MobileNets' reference code uses.
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        seed_cnn,
        mnist_convnet,
        lenet_300_100,
        lenet_5,
        arm_mlp,
        ds_cnn_l,
        mobilenet_v1,
        mobilenet_v2,
        resnet8,
        mlperf_kws,
        mlperf_vww,
        mlperf_ic,
        mlperf_sww,
    )
}
