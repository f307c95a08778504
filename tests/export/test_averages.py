"""Averages over a whole map become sums, and compute what they did; all else stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchclust.export.executorch.averages import average_by_sum
from torchclust.export.executorch.observed import trace


class Mean(nn.Module):
    def __init__(self, dim: tuple[int, ...] | None, keepdim: bool = False) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() if self.dim is None else x.mean(self.dim, self.keepdim)


@pytest.mark.parametrize(
    ("module", "sums"),
    [
        (nn.AdaptiveAvgPool2d(1), 1),
        (Mean((2, 3)), 1),
        (Mean((-1,), keepdim=True), 1),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1)), 2),
        (nn.AdaptiveAvgPool2d((1, 2)), 0),
        (nn.AvgPool2d(2), 0),
        (Mean(None), 0),
        (nn.MaxPool2d((6, 4)), 0),
    ],
)
def test_averages_are_sums(module: nn.Module, sums: int) -> None:
    x = torch.randn(1, 3, 6, 4)
    graph = trace(module, (x,)).module(check_guards=False)
    average_by_sum(graph)  # type: ignore[arg-type]
    found = [str(node.target) for node in graph.graph.nodes]  # type: ignore[union-attr]
    assert found.count("aten.sum.dim_IntList") == found.count("aten.mul.Tensor") == sums
    torch.testing.assert_close(graph(x), module(x))
