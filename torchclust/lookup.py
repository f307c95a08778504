"""The table lookup and its adjoint, the group-by-index sum: all that a clustered step adds.

A table holds the values of one codebook a row, ``(rows, k)``. Indices are ``uint8``: with one row
they have the weight's shape and all refer to it; with several, their first dimension picks the row
(one per output channel). Deep Compression section 3 in two functions: `lookup` is the forward pass,
`grouped_sum` is Eq. 3. Each is the other's adjoint, so gradients of any order work.

Both run in blocks that stay in the cache: the indices are widened to the int32 that torch's gather
wants one block at a time, never as a whole (four more bytes per weight, and page faults that cost
more than the gather itself).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 17  # elements; float32 values and int32 indices of a block fit a core's cache
_LANES = 2048  # accumulators per centroid on an accelerator, so that atomics rarely meet


def lookup(table: Tensor, indices: Tensor, through: Tensor | None = None) -> Tensor:
    """Replace every index by its value in the table.

    Args:
        table: ``(k,)``, or ``(rows, k)`` with ``rows == indices.shape[0]``; floating.
        indices: ``uint8``, any shape, each below ``k``.
        through: a tensor of the indices' shape that receives the result's gradient unchanged (the
            straight-through estimator), so that a weight can train behind its lookup.

    Returns:
        A contiguous tensor of the indices' shape and the table's dtype. Its gradient reaches the
        table summed by index; every value is an element of the table to the bit.
    """
    if _must_be_traceable():
        value = _plain_lookup(table, indices)
        return value if through is None else value + (through - through.detach())
    if through is None:
        return _apply(_Lookup, table, indices)
    return _apply(_LookupThrough, table, indices, through)


def grouped_sum(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Sum values by index: entry ``[r, j]`` is the sum of row ``r``'s values whose index is ``j``.

    Args:
        values: floating, the indices' shape.
        indices: ``uint8``; with a two-dimensional ``shape`` their first dimension is the row.
        shape: the table's, ``(k,)`` or ``(rows, k)``.

    Returns:
        A tensor of ``shape`` in the dtype of ``values``. Sums are carried in float64 on the CPU;
        on other devices in float32, spread over many accumulators, without a copy to the host.
    """
    if _must_be_traceable() or values.device.type != "cpu":
        return _scatter_sum(values, indices, shape)
    if len(shape) == 2:
        return _grouped_sum_by_row(values, indices, shape)
    flat, index, k = values.reshape(-1), indices.reshape(-1), shape[0]
    total = torch.zeros(k, dtype=torch.float64)
    for block in _blocks(flat.numel()):
        weights = _at_least_float32(flat[block])
        total += torch.bincount(index[block], weights=weights, minlength=k)
    return total.to(values.dtype)


class _Lookup(torch.autograd.Function):
    """`lookup` as autograd sees it; the adjoint of `_GroupedSum`."""

    @staticmethod
    def forward(table: Tensor, indices: Tensor) -> Tensor:
        return _gather(table, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        table, indices = inputs
        ctx.save_for_backward(indices)
        ctx.shape = table.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        return _apply(_GroupedSum, grad, indices, ctx.shape), None


class _GroupedSum(torch.autograd.Function):
    """`grouped_sum` as autograd sees it; the adjoint of `_Lookup`."""

    @staticmethod
    def forward(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        return grouped_sum(values, indices, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.Size], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (indices,) = ctx.saved_tensors
        return _apply(_Lookup, grad, indices), None, None


class _LookupThrough(torch.autograd.Function):
    """A lookup whose gradient also passes straight through to a weight behind it."""

    @staticmethod
    def forward(table: Tensor, indices: Tensor, through: Tensor) -> Tensor:
        return _gather(table, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        table, indices, _ = inputs
        ctx.save_for_backward(indices)
        ctx.shape = table.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (indices,) = ctx.saved_tensors
        for_table = grouped_sum(grad, indices, ctx.shape) if ctx.needs_input_grad[0] else None
        return for_table, None, grad if ctx.needs_input_grad[2] else None


def _must_be_traceable() -> bool:
    """Under a compiler, ``torch.export``, or ``torch.func``'s transforms: plain torch operators."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # untyped in torch
    return result


def _gather(table: Tensor, indices: Tensor) -> Tensor:
    if table.device.type != "cpu":
        return _plain_lookup(table, indices)
    out = torch.empty(indices.shape, dtype=table.dtype)
    flat, values = out.view(-1), table.reshape(-1)
    if table.dim() == 1:
        index = indices.reshape(-1)
        for block in _blocks(index.numel()):
            torch.index_select(values, 0, index[block].int(), out=flat[block])
        return out
    index, out2 = indices.flatten(1), out.view(out.shape[0], -1)
    for rows in _row_blocks(index):
        keys = _keys(index[rows], table.shape[1], rows.start)
        torch.index_select(values, 0, keys.view(-1), out=out2[rows].view(-1))
    return out


def _grouped_sum_by_row(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    flat, index, k = values.flatten(1), indices.flatten(1), shape[1]
    total = torch.empty(shape, dtype=values.dtype)
    for rows in _row_blocks(index):
        count = rows.stop - rows.start
        sums = torch.bincount(
            _keys(index[rows], k, 0).view(-1),
            weights=_at_least_float32(flat[rows]).reshape(-1),
            minlength=count * k,
        )
        total[rows] = sums.view(count, k).to(values.dtype)
    return total


def _plain_lookup(table: Tensor, indices: Tensor) -> Tensor:
    """The lookup in one differentiable expression, for compilers and for other devices."""
    if table.dim() == 1:
        return table[indices.long()]
    index = indices.flatten(1).long()
    return torch.gather(table, 1, index).view(indices.shape)


def _scatter_sum(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """`grouped_sum` without a data-dependent step, so nothing waits for the host.

    With one codebook all the atomic additions would fall on k addresses; ``_LANES`` copies of the
    table, one for each of as many neighbouring elements, keep them apart.
    """
    wide = _at_least_float32(values)
    if len(shape) == 2:
        sums = wide.new_zeros(shape).scatter_add_(1, indices.flatten(1).long(), wide.flatten(1))
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


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _keys(indices: Tensor, k: int, first_row: int) -> Tensor:
    """Positions in the flattened table: the index plus its row's offset, int32."""
    offsets = torch.arange(first_row, first_row + indices.shape[0], dtype=torch.int32) * k
    return indices.int().add_(offsets[:, None])


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


def _row_blocks(indices: Tensor) -> Iterator[slice]:
    rows, columns = indices.shape
    step = max(1, _BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
