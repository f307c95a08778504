"""Norm statistics, matched so that a clustered block's outputs have the teacher's moments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.data_aware.blocks import Block
from torchclust.data_aware.layers import Side
from torchclust.distillation.tasks import Task


def match_norms_(block: Block, student: Side, teacher: Side, task: Task) -> None:
    """Re-estimate a block's BatchNorm statistics, one after the other, if the error then falls.

    Not simply the images' own statistics, which a few hundred estimate badly: the float model's
    stored ones, moved by as much as its inputs' mean and variance on these images differ from the
    clustered model's.
    """
    names = [
        f"{path}.{name}" if name else path
        for path in block.paths
        for name, m in student.model.get_submodule(path).named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    norms = [student.model.get_submodule(name) for name in names]
    kept = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    before = task.error()
    with torch.no_grad():
        for name, norm in zip(names, norms, strict=True):
            reference = teacher.model.get_submodule(name)
            there, here = _statistics(block, teacher, reference), _statistics(block, student, norm)
            if there is None or here is None:
                continue
            assert isinstance(norm, _BatchNorm)
            assert isinstance(reference, _BatchNorm)
            ratio = (here[1] + norm.eps) / (there[1] + norm.eps)
            offset = (reference.running_mean - there[0]) * ratio.sqrt()  # type: ignore[operator]
            norm.running_mean.copy_(here[0] + offset)  # type: ignore[union-attr]
            norm.running_var.copy_(reference.running_var * ratio)  # type: ignore[union-attr,operator]
        if not task.error() < before:
            for buffer, value in kept:
                buffer.copy_(value)


def _statistics(block: Block, side: Side, norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and variance per channel of what reaches a norm within a block; None if nothing does."""
    sums: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().transpose(0, 1).flatten(1).double()
        part = torch.stack([x.new_full((len(x),), x.shape[1]), x.sum(1), x.square().sum(1)])
        sums[:] = [sums[0] + part if sums else part]

    handle = norm.register_forward_pre_hook(note)
    try:
        for call in side.stored:
            block.run(side.model, call)
    finally:
        handle.remove()
    if not sums:
        return None
    count, total, squares = sums[0]
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
