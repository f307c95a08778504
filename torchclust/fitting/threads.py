"""Large tensors on the CPU shared out among as many threads as torch uses, and when not to.

For work that torch and numpy do in one thread, outside the interpreter's lock. A call should take
some ten microseconds or more: at its end the threads meet at that lock, and one that finds it taken
sleeps for longer than a shorter call takes.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_PLAIN = (Tensor, torch.nn.Parameter)

WORTHWHILE = 1 << 21  # elements from which a second thread is worth waking


def must_be_traceable(*tensors: Tensor) -> bool:
    """Whether only plain torch operators will do, neither numpy nor memory of one's own.

    Under a compiler, ``torch.export``, ``torch.jit.trace``, ``torch.func``'s transforms, whatever
    watches operators (``FakeTensorMode``), and for tensors of another type than torch's own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


def in_blocks(
    function: Callable[[slice], T], tensor: Tensor, alone: int, shared: int | None = None
) -> list[T]:
    """Results of `function` for blocks of neighbouring rows, in order.

    Args:
        function: of a slice of rows; called in torch's current inference or no-grad mode.
        tensor: what is to be cut along its first dimension.
        alone: elements in a block, about, but at least one row, where one thread does everything.
        shared: the same where several share the blocks; None: `alone`. Each takes a few runs of
            neighbouring blocks.
    """
    threads = torch.get_num_threads()
    if threads == 1 or tensor.numel() < WORTHWHILE:
        return [function(block) for block in _blocks(tensor, alone)]
    blocks = _blocks(tensor, shared or alone)
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    size = -(-len(blocks) // (4 * threads))

    def run(start: int) -> list[T]:
        with mode():
            return [function(block) for block in blocks[start : start + size]]

    runs = _pool(threads).map(run, range(0, len(blocks), size))
    return list(itertools.chain.from_iterable(runs))


def _blocks(tensor: Tensor, elements: int) -> list[slice]:
    rows = len(tensor)
    step = max(1, elements * rows // max(1, tensor.numel()))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="torchclust")


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked child: it starts its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
