"""The table lookup and its adjoint, the group-by-index sum: all that a clustered step adds.

A table holds the values of one codebook a row, ``(rows, k)``. Indices are ``uint8``: with one row
they have the weight's shape and all refer to it; with several, their first dimension picks the row
(one per output channel). Deep Compression section 3 in two functions: `lookup` is the forward pass,
`grouped_sum` is Eq. 3. Each is the other's adjoint, so gradients of any order work.

On the CPU both run in blocks that stay in the cache: the indices are widened to the int32 that
torch's gather wants one block at a time, never as a whole (four more bytes per weight, and page
faults that cost more than the gather itself). Large tensors are shared out among as many threads as
torch uses; sums are added in the order of the shares, so their bits do not depend on the threads.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

from torchclust.fitting.nearest import in_rows
from torchclust.fitting.threads import in_blocks, must_be_traceable

_BLOCK = 1 << 15  # indices at a time: widened they stay in the cache, and torch starts no threads
_SHARED = 4  # as many at a time where threads share a gather: fewer hand-overs between them
_DOUBLE = {
    torch.float32: torch.int64,
    torch.float16: torch.int32,
    torch.bfloat16: torch.int32,
    torch.uint8: torch.int16,
}
_LANES = 2048  # accumulators per centroid on an accelerator, so that atomics rarely meet


class Memory:
    """The memory of one result, to be written again as soon as nobody refers to it any more.

    A fresh tensor of more than a few MB comes from the kernel as pages that are zeroed on first
    touch: two to three times the gather itself, in every step. Whether views, autograd's saved
    tensors or numpy arrays still need the last result is what its storage's use count says.
    """

    def __init__(self) -> None:
        self._storage: torch.UntypedStorage | None = None
        self._lock = threading.Lock()  # two threads must not both find it free

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # a copy, also in another process, has memory of its own

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor on the CPU, in the old memory if that is free."""
        size = shape.numel() * dtype.itemsize
        out = torch.empty(0, dtype=dtype, device="cpu")
        with self._lock:
            kept = self._storage
            if kept is None or kept.nbytes() != size or kept.is_shared() or _users(kept) > 1:
                kept = self._storage = torch.UntypedStorage(size, device="cpu")
            out.set_(kept, 0, shape)  # type: ignore[call-overload]
        return out


def lookup(
    table: Tensor, indices: Tensor, through: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """Replace every index by its value in the table.

    Args:
        table: ``(k,)``, or ``(rows, k)`` with ``rows == indices.shape[0]``; floating or ``uint8``.
        indices: ``uint8``, any shape, each below ``k``.
        through: a tensor of the indices' shape that receives the result's gradient unchanged (the
            straight-through estimator), so that a weight can train behind its lookup.
        memory: where the last result of the same call lies; on the CPU it is written again if
            nobody holds that result.

    Returns:
        A contiguous tensor of the indices' shape and the table's dtype. Its gradient reaches the
        table summed by index; every value is an element of the table to the bit.
    """
    if must_be_traceable(table, indices):
        value = _plain_lookup(table, indices)
        return value if through is None else value + (through - through.detach())
    if through is None:
        return _apply(_Lookup, table, indices, memory)
    return _apply(_LookupThrough, table, indices, through, memory)


def grouped_sum(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Sum values by index: entry ``[r, j]`` is the sum of row ``r``'s values whose index is ``j``.

    Args:
        values: floating, the indices' shape.
        indices: ``uint8``; with a two-dimensional ``shape`` their first dimension is the row.
        shape: the table's, ``(k,)`` or ``(rows, k)``.

    Returns:
        A tensor of ``shape`` in the dtype of ``values``. With one codebook sums are carried
        in float32 within a block of 32,768 values and in float64 over the blocks on the CPU; on
        other devices in float32, spread over many accumulators, without a copy to the host.
    """
    if must_be_traceable(values, indices) or values.device.type != "cpu":
        return _scatter_sum(values, indices, shape)
    if len(shape) == 1:
        flat, index = values.detach().reshape(-1), indices.reshape(-1)
        if len(flat) <= _BLOCK:
            return torch.bincount(index, at_least_float32(flat), shape[0]).to(values.dtype)

        def add(block: slice) -> Tensor:
            weights = at_least_float32(flat[block])
            return torch.bincount(index[block], weights=weights, minlength=shape[0])

        sums = torch.stack(in_blocks(add, index, _BLOCK))
        return sums.sum(0, dtype=torch.float64).to(values.dtype)
    flat, index = in_rows(values.detach()), in_rows(indices)
    total = at_least_float32(torch.zeros(shape, dtype=values.dtype, device="cpu"))

    def add_rows(block: slice) -> None:
        total[block].scatter_add_(1, index[block].long(), at_least_float32(flat[block]))

    in_blocks(add_rows, index, _BLOCK)
    return total.to(values.dtype)


# No `setup_context`: torch reads the signature of `forward` anew in every call of a function that
# has one, which takes longer than the lookup in a small layer.


class _Lookup(torch.autograd.Function):
    """`lookup` as autograd sees it; the adjoint of `_GroupedSum`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, indices: Tensor, memory: Memory | None) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = table.shape
        return _gather(table, indices, memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (indices,) = ctx.saved_tensors
        return _apply(_GroupedSum, grad, indices, ctx.shape), None, None


class _GroupedSum(torch.autograd.Function):
    """`grouped_sum` as autograd sees it; the adjoint of `_Lookup`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(indices)
        return grouped_sum(values, indices, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (indices,) = ctx.saved_tensors
        return _apply(_Lookup, grad, indices, None), None, None


class _LookupThrough(torch.autograd.Function):
    """A lookup whose gradient also passes straight through to a weight behind it."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, indices: Tensor, through: Tensor, memory: Memory | None
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = table.shape
        return _gather(table, indices, memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        for_table = _apply(_GroupedSum, grad, indices, ctx.shape) if wanted else None
        return for_table, None, grad if ctx.needs_input_grad[2] else None, None


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # untyped in torch
    return result


def _gather(table: Tensor, indices: Tensor, memory: Memory | None) -> Tensor:
    if table.device.type != "cpu":
        return _plain_lookup(table, indices)
    if table.dim() == 1 and indices.numel() <= _BLOCK:
        return table.index_select(0, indices.reshape(-1).int()).view(indices.shape)
    out = (memory or Memory()).empty(indices.shape, table.dtype)
    table = table.detach()
    if table.dim() == 1:
        source, index, flat = _in_pairs(table, indices.reshape(-1).contiguous(), out.view(-1))

        def gather(block: slice) -> None:
            torch.index_select(source, 0, index[block].int(), out=flat[block])

    else:
        index, flat = in_rows(indices), out.view(len(out), -1)

        def gather(block: slice) -> None:
            torch.gather(table[block], 1, index[block].long(), out=flat[block])

    in_blocks(gather, index, _BLOCK, _SHARED * _BLOCK)
    return out


def _in_pairs(table: Tensor, index: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same lookup of two neighbours at a time, where it is large and its halves are aligned.

    A gather's time goes into addresses, not bytes. Two uint8 indices, i and j, are one of 16 bits,
    and two values one of twice their size, at ``i + 256 j`` in a table of all pairs; of its 256 k
    entries k squared are ever read, so it stays in the first-level cache. The others are NaN, or 0
    in a table of integers.
    """
    double = _DOUBLE.get(table.dtype)
    odd = index.numel() % 2 or index.storage_offset() % 2
    if double is None or odd or sys.byteorder != "little" or index.numel() < 1024 * len(table):
        return table, index, out
    unread = torch.nan if table.is_floating_point() else 0
    pairs = table.new_full((len(table), 256, 2), unread)
    pairs[:, : len(table), 0] = table
    pairs[:, :, 1] = table[:, None]
    return pairs.view(double).view(-1), index.view(torch.uint16), out.view(double)


def _plain_lookup(table: Tensor, indices: Tensor) -> Tensor:
    """The lookup in one differentiable expression, for compilers and for other devices."""
    if table.dim() == 1:
        return table[indices.long()]
    index = in_rows(indices).long()
    return torch.gather(table, 1, index).view(indices.shape)


def _scatter_sum(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """`grouped_sum` without a data-dependent step, so nothing waits for the host.

    With one codebook all the atomic additions would fall on k addresses; ``_LANES`` copies of the
    table, one for each of as many neighbouring elements, keep them apart.
    """
    wide = at_least_float32(values)
    if len(shape) == 2:
        sums = wide.new_zeros(shape).scatter_add_(1, in_rows(indices).long(), in_rows(wide))
        return sums.to(values.dtype)
    flat, index = wide.reshape(-1), indices.reshape(-1).long()
    lanes = min(_LANES, max(1, flat.numel() // 64))
    whole = flat.numel() - flat.numel() % lanes
    sums = wide.new_zeros(shape[0], lanes)
    sums.scatter_add_(0, index[:whole].view(-1, lanes), flat[:whole].view(-1, lanes))
    total = sums.sum(1)
    if whole < flat.numel():
        total.scatter_add_(0, index[whole:], flat[whole:])
    return total.to(values.dtype)


def at_least_float32(values: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is that already."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _users(storage: torch.UntypedStorage) -> int:
    """How many tensors and handles share a storage; torch's CUDA graphs ask the same."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def with_gradient_times(tensor: Tensor, factor: Tensor) -> Tensor:
    """The same values to the bit, with the gradient multiplied."""
    return tensor.detach() + (tensor - tensor.detach()) * factor
