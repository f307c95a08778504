"""Clustering in several processes: fit once, be equal everywhere, send no indices in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchclust.weight.clustered import ClusteredWeight

ResultT = TypeVar("ResultT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def on_rank_zero(
    work: Callable[[], ResultT], is_rank_zero: bool, broadcast: Callable[[Any], Any]
) -> ResultT:
    """What ``work`` returns or raises on rank 0, on every rank: none is left waiting for it.

    Args:
        work: called on rank 0 only; its result can be pickled.
        is_rank_zero: whether this process is the one.
        broadcast: sends rank 0's argument to all, and is called by all.
    """
    outcome: Any = None
    if is_rank_zero:
        try:
            outcome = work()
        except Exception as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    result: ResultT = outcome
    return result


def on_every_rank(work: Callable[[], None], world_size: int) -> None:
    """Do the same everywhere, and raise everywhere what any rank raised: none waits for another."""
    raised: Exception | None = None
    try:
        work()
    except Exception as error:
        raised = error
    if world_size > 1:
        outcomes: list[tuple[str, str] | None] = [None] * world_size
        dist.all_gather_object(outcomes, raised and (type(raised).__name__, str(raised)))
        failed = next(((rank, one) for rank, one in enumerate(outcomes) if one is not None), None)
        if raised is None and failed is not None:
            rank, (kind, text) = failed
            raise RuntimeError(f"rank {rank} could not cluster its module: {kind}: {text}")
    if raised is not None:
        raise raised


def keep_indices_local_(model: ModuleT) -> ModuleT:
    """Stop DDP from sending indices with every forward; it made them equal when it was built.

    Args:
        model: a clustered model in `DistributedDataParallel`, as ``WeightClustering`` has it, or as
            wrapped by hand: ``ddp = keep_indices_local_(DistributedDataParallel(model))``. Not with
            ``broadcast_buffers=False``, which leaves each process the indices that it fitted. A
            model that is not wrapped stays as it is.

    Returns:
        The same object.
    """
    if isinstance(model, DistributedDataParallel):
        model.parameters_to_ignore |= {
            f"{path}.{name}"
            for path, module in model.module.named_modules()
            if isinstance(module, ClusteredWeight)
            for name, _ in module.named_buffers()
        }
        # Private (torch 2.13): it lists anew what is sent, as DDP does before each time it sends.
        # Without it DDP would, where nothing is left, try to send an empty list, and fail.
        model._assign_modules_buffers()  # type: ignore[no-untyped-call]
    return model
