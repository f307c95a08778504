"""Optimizers and schedulers under a change of model: lower their rates, move their state over.

Lightning builds both from one method, `configure_optimizers`; what is here changes the result so
that it looks as if that method had known about the clustering. Nothing here knows Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "eta_min", "default_min_lr")
"""Where torch.optim.lr_scheduler keeps absolute rates (2.13); all else in it is relative, so a
schedule whose rates are multiplied goes on as the multiple of what it would have been."""


def scale_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiply every group's own rate, and the rates from which schedulers derive theirs.

    Floors and peaks are multiplied too (``eta_min``, ``min_lr``, ``max_lr``): a schedule keeps its
    shape. Schedulers inside `SequentialLR` and `ChainedScheduler` follow. A scheduler that is not
    torch's follows as far as it reads its rates from the groups or from ``base_lrs``.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in _GROUP_RATES:
                if key in group:
                    group[key] = _times(group[key], factor)
    for scheduler in _with_nested(schedulers):
        for name in _SCHEDULER_RATES:
            if name in vars(scheduler):
                setattr(scheduler, name, _times(vars(scheduler)[name], factor))


def rates_of(optimizers: Iterable[Optimizer]) -> set[float]:
    """The rates that the groups start from."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {float(group.get("initial_lr", group["lr"])) for group in groups}


def of_plain_model_(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Let optimizers forget what a stripped model has no more: a checkpoint of both then fits.

    That are parameters which are gone, and state in a codebook's shape.
    """
    present = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) in present]
            group["params"] = sorted(kept, key=lambda p: present[id(p)])  # a plain model's order
        for parameter, state in list(optimizer.state.items()):
            sizes = {v.shape for v in state.values() if isinstance(v, Tensor) and v.dim()}
            if id(parameter) not in present or sizes - {parameter.shape}:
                del optimizer.state[parameter]


def carry_over(
    before: Sequence[Optimizer], after: Sequence[Optimizer], fresh: Collection[int]
) -> None:
    """Give rebuilt optimizers what the old ones had come to: group options and state.

    Args:
        before: the optimizers of the model as it was.
        after: those built for the model as it is, in the same order with the same groups.
        fresh: ids of the parameters that start without state, whatever they were before.

    Raises:
        ValueError: the numbers of optimizers or groups differ.
    """
    if [len(o.param_groups) for o in before] != [len(o.param_groups) for o in after]:
        raise ValueError(
            f"configure_optimizers built parameter groups {_sizes(before)} before clustering and "
            f"{_sizes(after)} after it, so rates and state cannot be carried over. Clustering "
            f"changes parameters' names and shapes (a codebook is one-dimensional): group them "
            f"by module, or cluster before training with start_epoch=0"
        )
    for old, new in zip(before, after, strict=True):
        for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
            new_group.update(
                {k: v for k, v in old_group.items() if k not in ("params", "param_names")}
            )
        if isinstance(old, LBFGS):
            continue  # its state is one flat vector over all parameters
        trained = {id(p) for group in new.param_groups for p in group["params"]} - set(fresh)
        new.state.update({p: state for p, state in old.state.items() if id(p) in trained})


def _with_nested(schedulers: Iterable[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _with_nested(getattr(scheduler, "_schedulers", ()))


def _times(rate: Any, factor: float) -> Any:
    if isinstance(rate, list | tuple):
        return [_times(one, factor) for one in rate]
    return rate * factor if isinstance(rate, int | float | Tensor) else rate


def _sizes(optimizers: Sequence[Optimizer]) -> str:
    return ", ".join(str([len(g["params"]) for g in o.param_groups]) for o in optimizers)
