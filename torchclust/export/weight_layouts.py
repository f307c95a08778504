"""In which order, and in which pieces, a converter may hold a parameter: shapes only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt


@dataclass(frozen=True)
class WeightLayout:
    """A piece of a parameter as rows of output channels.

    ``order``: the parameter's axes, that of the rows first. ``flip``: how the kernel is turned.
    ``rows``, ``columns``: of the first and of the last axis, what belongs to the piece.
    """

    order: tuple[int, ...]
    flip: tuple[slice, ...]
    rows: slice
    columns: slice

    def of(self, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The piece of an array of the parameter's shape, as a matrix."""
        return self._piece(array).reshape(shape)

    def first_row(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The first row of that matrix, (1, n)."""
        return self._piece(array)[:1].reshape(1, -1)

    def _piece(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.transpose(self.order)[self.flip][self.rows, ..., self.columns]


def weight_layouts(
    whole: tuple[int, ...], shape: tuple[int, ...], channel_axis: int
) -> Iterator[WeightLayout]:
    """Every layout of a parameter that fits a (channels, n) matrix of the file.

    Convolutions go to (O, spatial, I), transposed ones from (I, O, spatial) with the kernel as it
    is or turned over; a grouped convolution may be cut into blocks of output channels, a transposed
    one into blocks of input channels.

    >>> [layout.rows for layout in weight_layouts((4, 2), (2, 2), 0)][:2]
    [slice(0, 2, None), slice(2, 4, None)]
    """
    rank = len(whole)
    orders = [(0, *range(2, rank), 1), (1, *range(2, rank), 0)]
    flips: list[tuple[slice, ...]] = [()]
    if rank > 2:
        flips.append((slice(None), *[slice(None, None, -1)] * (rank - 2)))
    for order, flip in itertools.product(orders, flips):
        moved = tuple(whole[axis] for axis in order)
        for rows, columns in _blocks(moved, shape, channel_axis > 0):
            yield WeightLayout(order, flip, rows, columns)


def _blocks(
    whole: tuple[int, ...], shape: tuple[int, ...], by_column: bool
) -> Iterator[tuple[slice, slice]]:
    """Rows and last columns of the equal blocks that a weight is cut into; itself where it fits."""
    count, rest = divmod(math.prod(whole), math.prod(shape))
    if rest or count == 0:
        return
    for number in range(count):
        if whole[0] == count * shape[0]:
            yield slice(number * shape[0], (number + 1) * shape[0]), slice(None)
        elif by_column and whole[0] == shape[0] and whole[-1] % count == 0:
            width = whole[-1] // count
            yield slice(None), slice(number * width, (number + 1) * width)
