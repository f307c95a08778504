"""A small network with a convolution, a norm and a linear layer, and a few steps of training."""

from typing import Any

import torch
from torch import Tensor, nn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return optimizer
