"""The training of one task, step by step, and the file that an interrupted run goes on from."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.distillation.price import Price
from torchclust.distillation.tasks import Task
from torchclust.model.restore import restore_

_LEAST_RMS = 0.01  # of a tensor: a bias of zeros must be able to move
_SAVED_EVERY = 50  # steps


def train(
    parameters: Iterable[nn.Parameter],
    task: Task,
    state: State,
    stage: int,
    advance: Callable[[int], None],
) -> None:
    """Adam with a cosine; a stage is undone that does not lower the error and the price of bits.

    Picks up where the state says, and keeps it up to date.
    """
    steps, lr, seed = state.steps, state.lr, state.seed + stage
    trained = [p for p in dict.fromkeys(parameters) if p.requires_grad and p.is_floating_point()]
    if not trained:  # a frozen block gives what it gives
        advance(steps)
        state.finish(stage)
        return
    price = Price.of(state.model, trained)
    changing = [*trained, *price.state]
    generator = torch.Generator().manual_seed(seed)
    order = [
        int(i)
        for _ in range(math.ceil(steps / len(task.targets)))
        for i in torch.randperm(len(task.targets), generator=generator)
    ]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained])
    first = state.begin(stage, optimizer)
    if first == 0:
        state.before = task.error() + price.due()
        state.start = [tensor.detach().clone() for tensor in changing]
        state.rates = [lr * max(_rms(p), _LEAST_RMS) for p in trained]
    advance(first)
    for step in range(first, steps):
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group, rate in zip(optimizer.param_groups, state.rates, strict=True):
            group["lr"] = rate * fall
        optimizer.zero_grad()
        with torch.enable_grad():
            task.loss(order[step]).backward()
        price.charge_()
        optimizer.step()
        advance(1)
        if (step + 1) % _SAVED_EVERY == 0 and step + 1 < steps:
            state.save(stage, step + 1, optimizer)
    if not task.error() + price.due() < state.before:
        with torch.no_grad():
            for tensor, value in zip(changing, state.start, strict=True):
                tensor.copy_(value)
    state.finish(stage)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


class State:
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
        """Whether the stage was finished before."""
        return stage < self.stage

    def is_new(self, stage: int) -> bool:
        """Whether the stage starts at its first step."""
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
        """Write where training stands, whole or not at all."""
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
        """Delete the file: the work is done."""
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


@contextmanager
def gradients_put_back(model: nn.Module) -> Iterator[None]:
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
