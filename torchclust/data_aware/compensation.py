"""Assign weights to a codebook so that the layer's output changes least, not the weights.

For inputs x the squared output error of a weight row w replaced by q is quadratic in q with the
inputs' second moment H as its matrix. Rounding column by column and spreading each column's error
over those to come is Frantar et al., "GPTQ" (2022); coordinate descent then revisits every column
with all others known, and never makes the error larger. Between its sweeps the codebook and the
channel scales, on which the error depends quadratically too, are solved for. With a price on bits
every choice weighs the error it adds against the bits of the index (Conzelmann and Bamler, "CERWU",
2025), counted anew after every sweep.

Everything here is float32 matrices, ``(d, rows)``: a weight's columns come first, so that the
column at work is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchclust.weight.bits import bits_of

_SWEEPS = 8
_CG_STEPS = 8
_LEAST_WEIGHT = 1e-6  # of a row, that is: beside a mean of 1
_COLUMNS = 64  # columns between two updates of all that follow


@dataclass(frozen=True, eq=False)
class Target:
    """The squared output error of some rows: ``trace((q - w)' H (q - w))`` up to a constant.

    Attributes:
        hessian: `(d, d)`, symmetric positive definite.
        pull: `(d, rows)`, ``H w`` with w the best unconstrained weight.
        row_weight: `(rows,)`, how much a row's error counts against the others'.
    """

    hessian: Tensor
    pull: Tensor
    row_weight: Tensor

    def error(self, q: Tensor) -> float:
        """The weighted error of ``(d, rows)`` weights, up to a constant."""
        by_row = (q * (self.hessian @ q - 2 * self.pull)).sum(0, dtype=torch.float64)
        return float((by_row * self.row_weight).sum())


@dataclass(frozen=True, eq=False)
class Book:
    """A codebook as what it is fitted by: parameters, and linear maps to every row's values.

    Attributes:
        values: float: `(codebooks, k)`; int8: the `(1, h)` positive codes.
        row_book: `(rows,)` int64, which codebook a row has.
        scale: `(rows,)` of an int8 codebook, else None.
        pinned: bool, the shape of `values`: those that may not move.
    """

    values: Tensor
    row_book: Tensor
    scale: Tensor | None
    pinned: Tensor

    def table(self, values: Tensor | None = None) -> Tensor:
        """`(rows, k)` ascending values of every row; linear in the parameters."""
        values = self.values if values is None else values
        if self.scale is None:
            return values[self.row_book]
        return self.scale[:, None] * self._mirrored(values)

    def adjoint(self, table: Tensor) -> Tensor:
        """The transpose of `table`."""
        if self.scale is None:
            return torch.zeros_like(self.values).index_add_(0, self.row_book, table)
        total, half = (self.scale[:, None] * table).sum(0), self.values.shape[1]
        return (total[half + 1 :] - total[:half].flip(0))[None]

    def bits(self, indices: Tensor) -> Tensor:
        """`(rows, k)` what each value's index costs, by how often `(d, rows)` indices name it."""
        books = int(self.row_book.max()) + 1
        counts = torch.zeros(books, self.table().shape[1], device=indices.device)
        rows = torch.zeros(len(self.row_book), counts.shape[1], device=indices.device)
        rows.scatter_add_(1, indices.T, torch.ones_like(indices.T, dtype=rows.dtype))
        counts.index_add_(0, self.row_book, rows)
        if self.scale is not None:  # as the codes are symmetric, so is what they cost
            counts = (counts + counts.flip(1)) / 2
        return bits_of(counts)[self.row_book]

    def sorted(self, indices: Tensor) -> tuple[Book, Tensor]:
        """Ascending again, with the indices that go with it."""
        values, order = self.values.sort(1)
        book = replace(self, values=values, pinned=self.pinned.gather(1, order))
        if self.scale is not None:
            order = self._mirrored_order(order)
        moved = order.argsort(1).expand(int(self.row_book.max()) + 1, -1)
        return book, moved[self.row_book].T.gather(0, indices)

    @staticmethod
    def _mirrored(values: Tensor) -> Tensor:
        return torch.cat([-values.flip(1), values.new_zeros(1, 1), values], 1)

    @staticmethod
    def _mirrored_order(order: Tensor) -> Tensor:
        half = order.shape[1]
        middle = order.new_full((1, 1), half)
        return torch.cat([half - 1 - order.flip(1), middle, half + 1 + order], 1)


def compensate(
    targets: Sequence[Target],
    book: Book,
    zeros: Tensor | None = None,
    price: float = 0.0,
    indices: Tensor | None = None,
) -> tuple[Book, Tensor]:
    """Choose indices, codebook and scales for the least output error.

    Args:
        targets: one per convolution group, rows in order; a plain layer has one.
        book: where the codebook starts; int8 codes stay integers in 1..127.
        zeros: `(d, rows)` bool, weights that must stay zero, or None.
        price: of a bit, in units of the error.
        indices: `(d, rows)` of the codebook as it was fitted: what bits cost at first.

    Returns:
        The book, and `(d, rows)` int64 indices into the rows of its table.
    """
    parts = list(_parts(targets))
    bits = None if indices is None or not price else price * book.bits(indices)
    indices = torch.cat(
        [_feedback(t, book.table()[r], _cut(zeros, r), _cost(t, bits, r)) for t, r in parts], 1
    )
    best = (float("inf"), book, indices)
    for sweep in range(_SWEEPS + 1):
        table = book.table()
        bits = price * book.bits(indices) if price else None
        indices = torch.cat(
            [
                _descend(t, table[r], indices[:, r], _cut(zeros, r), _cost(t, bits, r))
                for t, r in parts
            ],
            1,
        )
        error = sum(t.error(table[r].T.gather(0, indices[:, r])) for t, r in parts)
        if price:
            paid = book.bits(indices).T.gather(0, indices)
            error += price * float(paid.sum(dtype=torch.float64))
        if error < best[0]:
            best = (error, book, indices)
        if sweep < _SWEEPS:
            book = _rescaled(book, indices, parts)
            book, indices = _on_grid(_solved(book, indices, parts)).sorted(indices)
            book = _rescaled(book, indices, parts)
    return best[1], best[2]


_Part = tuple[Target, slice]


def _parts(targets: Sequence[Target]) -> Iterator[_Part]:
    start = 0
    for target in targets:
        rows = target.pull.shape[1]
        yield target, slice(start, start + rows)
        start += rows


def _cut(zeros: Tensor | None, rows: slice) -> Tensor | None:
    return None if zeros is None else zeros[:, rows]


def _cost(target: Target, bits: Tensor | None, rows: slice) -> Tensor | None:
    """What the values' bits cost, relative to what a row's error counts."""
    if bits is None:
        return None
    return bits[rows] / target.row_weight.clamp_min(_LEAST_WEIGHT)[:, None]


def _feedback(target: Target, table: Tensor, zeros: Tensor | None, cost: Tensor | None) -> Tensor:
    """GPTQ: round the columns one by one; what is left of each goes to the columns after it.

    Columns with the largest inputs come first, while there are many left to make up for them.
    """
    order = target.hessian.diagonal().argsort(descending=True)
    hessian = target.hessian[order][:, order].double()
    lower = torch.linalg.cholesky(hessian)
    w = torch.cholesky_solve(target.pull[order].double(), lower).float()
    spread = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    indices = torch.empty(w.shape, dtype=torch.int64, device=w.device)
    rounding = _Rounding(table, cost)
    for start in range(0, len(w), _COLUMNS):
        stop = min(start + _COLUMNS, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            zero = None if zeros is None else zeros[order[j]]
            indices[j] = rounding(w[j], zero, spread[j, j].square())
            errors[j - start] = (w[j] - rounding.value(indices[j])) / spread[j, j]
            w[j + 1 : stop] -= spread[j, j + 1 : stop, None] * errors[j - start]
        w[stop:] -= spread[start:stop, stop:].T @ errors
    return torch.empty_like(indices).index_copy_(0, order, indices)


def _descend(
    target: Target, table: Tensor, indices: Tensor, zeros: Tensor | None, cost: Tensor | None
) -> Tensor:
    """One sweep of coordinate descent: every column to its best codes, the others as they are."""
    hessian, rounding = target.hessian, _Rounding(table, cost)
    indices = indices.clone()
    q = table.T.gather(0, indices)
    slope = target.pull - hessian @ q
    step = hessian.diagonal().reciprocal()
    for start in range(0, len(q), _COLUMNS):
        stop = min(start + _COLUMNS, len(q))
        near, moves = slope[start:stop].clone(), torch.empty_like(q[start:stop])
        for j in range(start, stop):
            wanted = q[j] + near[j - start] * step[j]
            indices[j] = rounding(wanted, None if zeros is None else zeros[j], step[j])
            moves[j - start] = rounding.value(indices[j]) - q[j]
            near -= hessian[start:stop, j, None] * moves[j - start]
        slope -= hessian[:, start:stop] @ moves
    return indices


class _Rounding:
    """The best value of each row's table: the nearest, or that of the least error plus cost."""

    def __init__(self, table: Tensor, cost: Tensor | None) -> None:
        self.table, self.cost = table.contiguous(), cost
        self.limits = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
        self.zero = self.table.abs().argmin(1)

    def __call__(self, wanted: Tensor, zeros: Tensor | None, per_error: Tensor) -> Tensor:
        """Indices for one column, whose squared distances are errors of ``1 / per_error`` each."""
        if self.cost is None:
            found = torch.searchsorted(self.limits, wanted.contiguous()[:, None])[:, 0]
        else:
            away = (wanted[:, None] - self.table).square()
            found = (away + per_error * self.cost).argmin(1)
        return found if zeros is None else torch.where(zeros, self.zero, found)

    def value(self, indices: Tensor) -> Tensor:
        return self.table.gather(1, indices[:, None])[:, 0]


def _rescaled(book: Book, indices: Tensor, parts: Sequence[_Part]) -> Book:
    """The best positive scale of every row of an int8 codebook, in closed form."""
    if book.scale is None:
        return book
    codes = book._mirrored(book.values).expand(len(book.row_book), -1)
    found = []
    for target, rows in parts:
        c = codes[rows].T.gather(0, indices[:, rows])
        along, size = (c * target.pull).sum(0), (c * (target.hessian @ c)).sum(0)
        best = along / size.clamp_min(torch.finfo(size.dtype).tiny)
        found.append(torch.where((along > 0) & (size > 0), best, book.scale[rows]))
    return replace(book, scale=torch.cat(found))


def _solved(book: Book, indices: Tensor, parts: Sequence[_Part]) -> Book:
    """The best codebook for these indices: conjugate gradients on its normal equations."""

    def collect(columns: list[Tensor]) -> Tensor:
        sums = torch.zeros_like(book.table(), dtype=torch.float64)
        sums.scatter_add_(1, indices.T, torch.cat(columns, 1).T.double())
        return book.adjoint(sums.to(book.values.dtype)).masked_fill(book.pinned, 0)

    def curvature(values: Tensor) -> Tensor:
        table = book.table(values)
        return collect(
            [t.hessian @ table[r].T.gather(0, indices[:, r]) * t.row_weight for t, r in parts]
        )

    values = book.values.clone()
    residual = collect([t.pull * t.row_weight for t, _ in parts]) - curvature(values)
    direction, size = residual.clone(), residual.square().sum()
    for _ in range(_CG_STEPS):
        bent = curvature(direction)
        along = (direction * bent).sum()
        if not (along > 0 and size > 0):
            break
        values += size / along * direction
        residual -= size / along * bent
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return replace(book, values=values)


def _on_grid(book: Book) -> Book:
    """An int8 codebook's codes as integers, the largest near 127 so that rounding hurts least."""
    if book.scale is None:
        return book
    return replace(book, values=book.values.round().clamp(1, 127))
