"""What is learned: a block's outputs, or the whole model's, and the distance to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call, tensors_in
from torchclust.data_aware.blocks import Block
from torchclust.data_aware.divergence import divergence
from torchclust.data_aware.layers import Side


@dataclass(frozen=True)
class Task:
    """What a stage brings together: for batch ``i`` the clustered output and the float one."""

    output: Callable[[int], Any]
    targets: Sequence[Any]
    distance: Callable[[Any, Any], Tensor]

    def loss(self, i: int) -> Tensor:
        """Of one batch, differentiable."""
        return self.distance(self.output(i), self.targets[i])

    def error(self) -> float:
        """The mean loss."""
        with torch.no_grad():
            count = len(self.targets)
            return math.fsum(float(self.loss(i)) for i in range(count)) / count


def enter(block: Block, *sides: Side) -> None:
    """Move the sides' stored calls to where the block begins."""
    with torch.no_grad():
        for side in sides:
            side.enter(block)


def block_task(block: Block, student: Side, teacher: Side) -> Task:
    """Return the task of one block: the teacher's outputs on the teacher's own inputs."""
    with torch.no_grad():
        targets = [block.run(teacher.model, call) for call in teacher.stored]
    return Task(lambda i: block.run(student.model, student.stored[i]), targets, relative_distance)


def whole_task(model: nn.Module, teacher: nn.Module, found: Sequence[Call]) -> Task:
    """Return the task of the whole model: the teacher's outputs."""
    with torch.no_grad():
        targets = [call.of(teacher) for call in found]
    return Task(lambda i: found[i].of(model), targets, output_distance)


def relative_distance(output: Any, target: Any) -> Tensor:
    """Squared error over the target's variance, summed over the tensors of a nested structure.

    What the target masks, by infinity, does not count.
    """
    parts = []
    for y, t in zip(tensors_in(output), tensors_in(target), strict=True):
        wanted = t.detach().to(y.device).float()
        masked = wanted.isinf()
        wanted = wanted.masked_fill(masked, 0)
        spread = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
        parts.append((y.float().masked_fill(masked, 0) - wanted).square().mean() / spread)
    if not parts:
        raise ValueError("a block gives no floating-point tensor; name other blocks with blocks=")
    return torch.stack(parts).sum()


def output_distance(output: Any, target: Any) -> Tensor:
    """`relative_distance`, and for outputs `(n, classes)` the divergence of their softmaxes."""
    total = relative_distance(output, target)
    for y, t in zip(tensors_in(output), tensors_in(target), strict=True):
        if y.dim() == 2 and y.shape[1] > 1:
            total = total + divergence(y.float(), t.detach().to(y.device).float())
    return total
