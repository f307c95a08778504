"""Recover a clustered model without labels: make it give what the float model gives.

First block by block, from the first layers to the last (Li et al., "BRECQ", 2021): a block is
trained on what really reaches it, the outputs of the clustered blocks before it, towards what the
float model's block gives. So each stage sees all errors made so far, needs a fraction of a network
in memory, and learns from every element of an activation rather than from a label per image, which
is why some hundred images are enough. Then all blocks together, on the model's outputs.

In: a clustered model, its float teacher, inputs. `data_aware.blocks` cuts both into blocks,
`tasks` says what each has to match, `steps` trains it. Out: the same model, recovered.

BatchNorm runs on its stored statistics, as in deployment. Before a block is trained its statistics
are matched to the float side's on the same images, if that lowers the block's error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from torchclust.data_aware.batches import calls
from torchclust.data_aware.blocks import Block, evaluating, find_blocks
from torchclust.data_aware.layers import Side
from torchclust.distillation.norms import match_norms_
from torchclust.distillation.steps import State, gradients_put_back, train
from torchclust.distillation.tasks import block_task, enter, whole_task
from torchclust.model.clustering import named_clusterings
from torchclust.progress import progress as progress_bar

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def distill_(
    model: ModuleT,
    teacher: nn.Module,
    batches: Iterable[Any] | Tensor,
    *,
    steps: int = 150,
    lr: float = 5e-3,
    progress: bool = True,
    blocks: Sequence[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> ModuleT:
    """Train a clustered model to match the float model, block by block, then end to end; in place.

    No label is read. Everything that trains is trained: codebooks and scales, the weights behind
    ``"nearest"`` lookups (``"fixed"`` assignments stay, so ``"nearest"`` recovers more), biases,
    norms, and what is not clustered. Activations that `torchclust.activations` rounds are rounded
    in the end-to-end pass. Weights that are assigned anew at a ``rate`` pay for their bits.

    Args:
        model: clustered, best with ``cluster_(model, ..., inputs=batches)``.
        teacher: the model as it was, ``copy.deepcopy(model)`` before clustering. It stays exactly
            as it is, mode and statistics included.
        batches: unlabelled inputs, a few hundred, as for ``cluster_(inputs=)``: an iterable of
            batches, which are also the batches of training, or one tensor, cut into batches of 32.
            They are all kept in memory, with their activations at one block.
        steps: optimizer steps for each block, and for the end-to-end pass; both together cost about
            two ordinary trainings of as many steps.
        lr: Adam's rate as a share of each tensor's own root mean square, so that it means the same
            for weights, scales and norms; it falls to 0 along a cosine.
        progress: show a bar on a terminal, if rich is there.
        blocks: paths of the modules that are the blocks, instead of those that
            `torchclust.data_aware.blocks.find_blocks` finds.
        checkpoint: a file that the state is written to on the way. A call that finds it there, with
            the same arguments, continues from it and ends at the same values to the bit as one that
            was never interrupted. It is removed at the end.
        seed: of the order of batches.

    Returns:
        The same object, in the mode it was in.

    Raises:
        TypeError, ValueError: arguments out of range, no clustering, a teacher that is the model
            or of another architecture, inputs that cannot be used, another call's checkpoint.

    Example:
        >>> import copy, torch, torchclust
        >>> linear = torch.nn.Linear
        >>> model = torch.nn.Sequential(linear(8, 32), torch.nn.ReLU(), linear(32, 4))
        >>> teacher, inputs = copy.deepcopy(model), torch.randn(64, 8)
        >>> model = torchclust.cluster_(model, 4, assignment="nearest", inputs=inputs)
        >>> model = torchclust.distill_(model, teacher, inputs, steps=5)
    """
    _check(model, teacher, steps, lr)
    found = calls(model, batches)
    with evaluating(model, teacher), gradients_put_back(model):
        holders = [clustering.module for _, clustering in named_clusterings(model)]
        plan = find_blocks(model, found[0], holders, blocks)
        _check_architecture(model, teacher, plan)
        state = State(model, checkpoint, [steps, lr, seed, len(found), [b.paths for b in plan]])
        with progress_bar("Distilling", steps * (len(plan) + 1), shown=progress) as advance:
            student_side, teacher_side = Side(model, found), Side(teacher, found)
            for stage, block in enumerate(plan):
                enter(block, student_side, teacher_side)
                if state.is_done(stage):
                    advance(steps)
                    continue
                task = block_task(block, student_side, teacher_side)
                if state.is_new(stage):
                    match_norms_(block, student_side, teacher_side, task)
                parameters = [p for module in block.modules(model) for p in module.parameters()]
                train(parameters, task, state, stage, advance)
            train(model.parameters(), whole_task(model, teacher, found), state, len(plan), advance)
        state.remove()
    return model


def _check(model: nn.Module, teacher: nn.Module, steps: int, lr: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if next(named_clusterings(model), None) is None:
        raise ValueError(
            "nothing to distill: the model is not clustered. Cluster it first:  "
            "cluster_(model, inputs=batches)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing to distill: every parameter of the model is frozen. Let codebooks, biases and "
            "norms train:  model.requires_grad_(True)"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError(
            "the teacher shares parameters with the model, so there is nothing to learn from it. "
            "Copy the float model before clustering:  teacher = copy.deepcopy(model)"
        )


def _check_architecture(model: nn.Module, teacher: nn.Module, plan: Sequence[Block]) -> None:
    known = {name for name, _ in teacher.named_modules()}
    missing = [
        name
        for name, _ in model.named_modules()
        if name not in known and "parametrizations" not in name.split(".")
    ]
    if missing:
        raise ValueError(
            f"the teacher is not this model before clustering: it has no module {missing[0]!r}. "
            f"Copy the float model before clustering:  teacher = copy.deepcopy(model)"
        )
