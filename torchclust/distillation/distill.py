"""Recover a clustered model without labels: make it give what the float model gives.

First block by block, from the first layers to the last (Li et al., "BRECQ", 2021): a block is
trained on what really reaches it, the outputs of the clustered blocks before it, towards what the
float model's block gives. So each stage sees all errors made so far, needs a fraction of a network
in memory, and learns from every element of an activation rather than from a label per image, which
is why some hundred images are enough. Then all blocks together, on the model's outputs.

BatchNorm runs on its stored statistics, as in deployment. Before a block is trained its statistics
are matched to the float side's on the same images, if that lowers the block's error.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.blocks import Block, evaluating, find_blocks
from torchclust.data_aware import Side
from torchclust.model import named_clusterings, restore_
from torchclust.progress import progress as progress_bar
from torchclust.unlabelled import Call, calls, tensors_in

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LEAST_RMS = 0.01  # of a tensor: a bias of zeros must be able to move
_SAVED_EVERY = 50  # steps


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
    in the end-to-end pass.

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
            `torchclust.blocks.find_blocks` finds.
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
        >>> import copy, torchclust
        >>> linear = torch.nn.Linear
        >>> model = torch.nn.Sequential(linear(8, 32), torch.nn.ReLU(), linear(32, 4))
        >>> teacher, inputs = copy.deepcopy(model), torch.randn(64, 8)
        >>> model = torchclust.cluster_(model, 4, assignment="nearest", inputs=inputs)
        >>> model = distill_(model, teacher, inputs, steps=5)
    """
    _check(model, teacher, steps, lr)
    found = calls(model, batches)
    with evaluating(model, teacher), _gradients_put_back(model):
        holders = [clustering.module for _, clustering in named_clusterings(model)]
        plan = find_blocks(model, found[0], holders, blocks)
        _check_architecture(model, teacher, plan)
        state = _State(model, checkpoint, [steps, lr, seed, len(found), [b.paths for b in plan]])
        with progress_bar("Distilling", steps * (len(plan) + 1), shown=progress) as advance:
            student_side, teacher_side = Side(model, found), Side(teacher, found)
            for stage, block in enumerate(plan):
                _enter(block, student_side, teacher_side)
                if state.is_done(stage):
                    advance(steps)
                    continue
                task = _block_task(block, student_side, teacher_side)
                if state.is_new(stage):
                    match_norms_(block, student_side, teacher_side, task)
                parameters = [p for module in block.modules(model) for p in module.parameters()]
                _train(parameters, task, state, stage, advance)
            _train(
                model.parameters(), _whole_task(model, teacher, found), state, len(plan), advance
            )
        state.remove()
    return model


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
            return math.fsum(float(self.loss(i)) for i in range(len(self.targets)))


def _enter(block: Block, *sides: Side) -> None:
    with torch.no_grad():
        for side in sides:
            side.enter(block)


def _block_task(block: Block, student: Side, teacher: Side) -> Task:
    with torch.no_grad():
        targets = [block.run(teacher.model, call) for call in teacher.stored]
    return Task(lambda i: block.run(student.model, student.stored[i]), targets, relative_distance)


def _whole_task(model: nn.Module, teacher: nn.Module, found: Sequence[Call]) -> Task:
    with torch.no_grad():
        targets = [call.of(teacher) for call in found]
    return Task(lambda i: found[i].of(model), targets, output_distance)


def relative_distance(output: Any, target: Any) -> Tensor:
    """Squared error over the target's variance, summed over the tensors of a nested structure."""
    parts = []
    for y, t in zip(tensors_in(output), tensors_in(target), strict=True):
        wanted = t.detach().to(y.device).float()
        spread = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
        parts.append((y.float() - wanted).square().mean() / spread)
    if not parts:
        raise ValueError("a block gives no floating-point tensor; name other blocks with blocks=")
    return torch.stack(parts).sum()


def output_distance(output: Any, target: Any) -> Tensor:
    """`relative_distance`, and for outputs `(n, classes)` the divergence of their softmaxes."""
    total = relative_distance(output, target)
    for y, t in zip(tensors_in(output), tensors_in(target), strict=True):
        if y.dim() == 2 and y.shape[1] > 1:
            wanted = t.detach().to(y.device).float().log_softmax(1)
            total = total + nn.functional.kl_div(
                y.float().log_softmax(1), wanted, reduction="batchmean", log_target=True
            )
    return total


def _train(
    parameters: Iterable[nn.Parameter],
    task: Task,
    state: _State,
    stage: int,
    advance: Callable[[int], None],
) -> None:
    """Adam with a cosine; a stage that does not lower its error over all batches is undone.

    Picks up where the state says, and keeps it up to date.
    """
    steps, lr, seed = state.steps, state.lr, state.seed + stage
    trained = [p for p in dict.fromkeys(parameters) if p.requires_grad and p.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    order = [
        int(i)
        for _ in range(math.ceil(steps / len(task.targets)))
        for i in torch.randperm(len(task.targets), generator=generator)
    ]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained])
    first = state.begin(stage, optimizer)
    if first == 0:
        state.before, state.start = task.error(), [p.detach().clone() for p in trained]
        state.rates = [lr * max(_rms(p), _LEAST_RMS) for p in trained]
    advance(first)
    for step in range(first, steps):
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group, rate in zip(optimizer.param_groups, state.rates, strict=True):
            group["lr"] = rate * fall
        optimizer.zero_grad()
        with torch.enable_grad():
            task.loss(order[step]).backward()
        optimizer.step()
        advance(1)
        if (step + 1) % _SAVED_EVERY == 0 and step + 1 < steps:
            state.save(stage, step + 1, optimizer)
    if not task.error() < state.before:
        with torch.no_grad():
            for parameter, value in zip(trained, state.start, strict=True):
                parameter.copy_(value)
    state.finish(stage)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


class _State:
    """How far a call has come, in memory and, if there is a checkpoint, on disk.

    A file is written under another name and renamed, at the start of a stage and every 50 steps: it
    is always whole, and always of the moment between two steps.
    """

    def __init__(
        self, model: nn.Module, path: str | os.PathLike[str] | None, arguments: list[Any]
    ) -> None:
        self.model, self.arguments = model, json.dumps(arguments)
        self.path = None if path is None else Path(path)
        self.steps, self.lr, self.seed = arguments[:3]
        self.stage, self.step = 0, 0
        self.rates: list[float] = []
        self.before = math.inf
        self.start: list[Tensor] = []
        self._optimizer: dict[str, Any] | None = None
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def is_done(self, stage: int) -> bool:
        return stage < self.stage

    def is_new(self, stage: int) -> bool:
        return self.stage < stage or self._optimizer is None

    def begin(self, stage: int, optimizer: torch.optim.Optimizer) -> int:
        """Set the optimizer up for a stage; returns the step to go on with."""
        if self._optimizer is not None and self.stage == stage:
            optimizer.load_state_dict(self._optimizer)
        else:
            self.stage, self.step = stage, 0
        self._optimizer = None
        return self.step

    def save(self, stage: int, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        stored = {
            "arguments": self.arguments,
            "stage": stage,
            "step": step,
            "rates": self.rates,
            "before": self.before,
            "start": self.start,
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "model": self.model.state_dict(),
        }
        torch.save(stored, partial)
        os.replace(partial, self.path)

    def finish(self, stage: int) -> None:
        """The next stage is to come, and its optimizer is a new one."""
        self.stage, self.step, self.start = stage + 1, 0, []
        self.save(stage + 1, 0, None)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        try:
            stored = torch.load(path, weights_only=True, map_location="cpu")
            arguments = stored["arguments"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {str(path)!r} is not one of distill_ ({type(error).__name__}); "
                f"name another file, or delete it to start anew"
            ) from error
        if arguments != self.arguments:
            raise ValueError(
                f"checkpoint {str(path)!r} was left by another call: it has {arguments}, "
                f"this call {self.arguments}. Repeat that call, or delete the file to start anew"
            )
        restore_(self.model, stored["model"])
        self.stage, self.step, self.rates = stored["stage"], stored["step"], stored["rates"]
        device = next(self.model.parameters()).device
        self.before, self.start = stored["before"], [t.to(device) for t in stored["start"]]
        self._optimizer = stored["optimizer"]


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


@contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    """Leave every parameter's gradient as it was."""
    parameters = list(model.parameters())
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
