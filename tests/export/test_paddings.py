"""Zeros around a map become the convolution's own padding, where torch has such a padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust.export.executorch.observed import trace
from torchclust.export.executorch.paddings import pad_inside


class Padded(nn.Module):
    def __init__(self, pad: tuple[int, ...], mode: str = "constant", value: float = 0) -> None:
        super().__init__()
        self.pad, self.mode, self.value = pad, mode, value
        self.conv = nn.Conv2d(3, 4, 3, 2, padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        value = self.value if self.mode == "constant" else None
        y: Tensor = self.conv(F.pad(x, self.pad, self.mode, value))
        return y


class Twice(Padded):
    """The padded map has another reader."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, self.pad)
        return self.conv(y) + y.mean()


@pytest.mark.parametrize(
    ("module", "padding"),
    [
        (Padded((1, 1, 2, 2)), [2, 2]),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3, groups=3)), [1, 1]),
        (Twice((1, 1, 2, 2)), [2, 2]),
        (Padded((0, 1, 0, 1)), [0, 1]),
        (Padded((1, 1, 2, 1)), [0, 1]),
        (Padded((-1, -1, 0, 0)), [0, 1]),
        (Padded((1, 1)), [0, 1]),
        (Padded((1, 1, 1, 1), value=0.5), [0, 1]),
        (Padded((1, 1, 1, 1), mode="reflect"), [0, 1]),
    ],
)
def test_zeros_are_the_convolutions_own(module: nn.Module, padding: list[int]) -> None:
    x = torch.randn(1, 3, 8, 10)
    graph = trace(module, (x,)).module(check_guards=False)
    pad_inside(graph)  # type: ignore[arg-type]
    (conv,) = (n for n in graph.graph.nodes if "conv2d" in str(n.target))  # type: ignore[union-attr]
    read = [n for n in graph.graph.nodes if "pad" in str(n.target)]  # type: ignore[union-attr]
    moved = padding != [0, 1]
    assert conv.args[4] == padding
    assert bool(read) == (not moved or isinstance(module, Twice))
    torch.testing.assert_close(graph(x), module(x))
