"""Small networks with every construct that the exporter claims to take, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU6,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.body = nn.Sequential(
            conv_norm(inputs, wide, 1),
            conv_norm(wide, wide, 3, stride, wide),
            conv_norm(wide, outputs, 1, act=None),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(inputs, outputs, 3, stride, act=nn.ReLU),
            conv_norm(outputs, outputs, 3, act=None),
        )
        same = stride == 1 and inputs == outputs
        self.side = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.side(x))


def head(channels: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def mobilenet_v1() -> nn.Module:
    layers = [conv_norm(3, 16, 3, 2)]
    for inputs, outputs, stride in ((16, 24, 1), (24, 32, 2), (32, 32, 1)):
        layers += [conv_norm(inputs, inputs, 3, stride, inputs), conv_norm(inputs, outputs, 1)]
    return nn.Sequential(*layers, *head(32))


def mobilenet_v2() -> nn.Module:
    blocks = [
        InvertedResidual(16, 16, 1, 2),
        InvertedResidual(16, 24, 2, 4),
        InvertedResidual(24, 24, 1, 4),
    ]
    return nn.Sequential(conv_norm(3, 16, 3, 2), *blocks, conv_norm(24, 64, 1), *head(64))


def resnet() -> nn.Module:
    stem = conv_norm(3, 16, 3, act=nn.ReLU)
    return nn.Sequential(stem, Basic(16, 16, 1), Basic(16, 32, 2), *head(32))


def randomize_norms(model: nn.Module, *, tiny: bool = True) -> nn.Module:
    """Random statistics; gammas of both signs, and some so small that they fold to next to 0."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.1, 0.5)
                sign = torch.randint_like(norm.weight, 0, 2) * 2 - 1
                norm.weight.uniform_(0.5, 1.5).mul_(sign)
                norm.bias.normal_(0, 0.5)
                if tiny:
                    norm.weight[:4] = torch.tensor([0.0, 1e-40, -1e-12, 1e-6])
    return model


class SqueezeExcite(nn.Module):
    """With hard-swish and hard-sigmoid; the converter folds the latter's 1/6 into weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.act = nn.Hardswish()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(16, 8, 1)
        self.excite = nn.Conv2d(8, 16, 1)
        self.gate = nn.Hardsigmoid()
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x * self.gate(self.excite(F.relu(self.squeeze(self.pool(x)))))
        return self.head(self.pool(x)).flatten(1)


class EncoderDecoder(nn.Module):
    """Concatenation, upsampling, transposed convolution, an image as output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.down(x))
        up = F.relu(self.norm(self.up(z)))
        return self.out(torch.cat([up, F.interpolate(z, scale_factor=2.0)], 1))


class Sequence1d(nn.Module):
    """1-D convolutions with BatchNorm, flattened into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, stride=2)
        self.head = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).flatten(1))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)
        self.vector = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor | tuple[Tensor]]:
        z = F.adaptive_avg_pool2d(self.image(image), 1).flatten(1) + self.vector(vector)
        return {"logits": self.head(z), "features": (z,)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.table(x))))


def flattened() -> nn.Module:
    """Maps flattened in NCHW order before a Linear, with dropout between."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(8 * 7 * 7, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def norm_after_activation() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), *head(8, 4)
    )


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), *head(6, 4))


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what its file may hold beyond int8 operators on the NPU."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 16, 16),)
    vocabulary: int = 0
    on_cpu: tuple[str, ...] = ()
    transposes: int = 0
    reads: tuple[tuple[int, ...], ...] = ((1, 16, 16, 3),)
    writes: tuple[tuple[int, ...], ...] = field(default=())

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return (torch.randint(0, self.vocabulary, self.shapes[0], generator=generator),)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


CASES = {
    "squeeze_excite": Case(SqueezeExcite, writes=((1, 10),)),
    "encoder_decoder": Case(EncoderDecoder, writes=((1, 16, 16, 4),)),
    "conv1d": Case(Sequence1d, ((1, 4, 20),), reads=((1, 20, 4),), writes=((1, 5),)),
    "embedding": Case(
        Embedded,
        ((1, 6),),
        vocabulary=50,
        on_cpu=("EMBEDDING_LOOKUP", "QUANTIZE"),
        reads=((1, 6),),
        writes=((1, 5),),
    ),
    "lstm": Case(Recurrent, ((1, 4, 8),), reads=((1, 4, 8),), writes=((1, 5),)),
    "two_in_two_out": Case(
        TwoInTwoOut,
        ((1, 3, 16, 16), (1, 5)),
        reads=((1, 16, 16, 3), (1, 5)),
        writes=((1, 3), (1, 8)),
    ),
    "tied": Case(
        Tied,
        ((1, 6),),
        vocabulary=40,
        on_cpu=("EMBEDDING_LOOKUP", "QUANTIZE"),
        reads=((1, 6),),
        writes=((1, 6, 40),),
    ),
    "flattened": Case(flattened, writes=((1, 5),)),
    "norm_after_activation": Case(norm_after_activation, writes=((1, 4),)),
    "grouped": Case(grouped, ((1, 4, 16, 16),), reads=((1, 16, 16, 4),), writes=((1, 4),)),
}
MUST_SHOW = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2, "resnet": resnet}
