"""Many small fits in one pass: rows of equal length, each with a codebook of its own.

A network has thousands of channels, or hundreds of small layers, and of a fit of a thousand values
numpy spends most of the time on being called. Here the sorting, the dynamic programme and the
assignment of many rows are one call each; every row gets what `fit_codebook` gives it, bit by bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchclust.fitting.arguments import flat_array
from torchclust.fitting.codebook import fit_codebook
from torchclust.fitting.moments import Float64s, Floats, Ints, outward_sums, powers_of_two
from torchclust.fitting.nearest import assign_rows
from torchclust.fitting.partition import (
    EXACT,
    TABLE,
    cheapest_path,
    cost_of_runs,
    divide_and_conquer,
    table_of_costs,
)
from torchclust.fitting.threads import in_blocks

_AT_ONCE = 1 << 12  # values in a block: what a step of the programme works on stays in the cache
_ENTRIES = 1 << 16  # of the tables of costs of a block


def fit_stacked(rows: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Fit every row as ``fit_codebook(row, n_clusters)``.

    Args:
        rows: `(b, n)`, floating, finite.
        n_clusters: 2 to 256.

    Returns:
        `(b, n_clusters)` ascending centroids, the last repeated where a row has fewer, and the
        indices, uint8, in the rows' shape; on their device.

    >>> centroids, indices = fit_stacked(torch.tensor([[0.0, 4.0, 5.0], [7.0, 7.0, 1.0]]), 2)
    >>> centroids
    tensor([[0.0000, 4.5000],
            [1.0000, 7.0000]])
    >>> indices
    tensor([[0, 1, 1],
            [1, 1, 0]], dtype=torch.uint8)
    """
    length = rows.shape[1]
    size = _AT_ONCE if length > TABLE else _ENTRIES * length // (length + 1) ** 2
    flat = rows.detach().cpu()
    fits = in_blocks(lambda part: _fit(flat[part], n_clusters), flat, size)
    centroids, indices = zip(*fits, strict=True)
    return torch.cat(centroids).to(rows.device), torch.cat(indices).to(rows.device)


def _fit(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A block. Long rows, and those in which values tie, are fitted one by one."""
    centroids = torch.zeros(len(rows), k, dtype=rows.dtype, device="cpu")
    indices = torch.zeros(rows.shape, dtype=torch.uint8, device="cpu")
    together = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    if rows.shape[1] <= EXACT:
        ordered = np.sort(flat_array(rows).reshape(rows.shape), axis=1)
        together = torch.from_numpy((ordered[:, 1:] > ordered[:, :-1]).all(axis=1))
    if together.any():
        found = torch.from_numpy(_centroids(ordered[together.numpy()], min(k, rows.shape[1])))
        found = found.to(rows.dtype) + 0.0  # no -0.0
        centroids[together] = _padded(found, k)
        indices[together] = assign_rows(rows[together], found)
    for row in np.flatnonzero(~together.numpy()):
        book = fit_codebook(rows[row], k)
        centroids[row], indices[row] = _padded(book.centroids, k), book.indices
    return centroids, indices


def _padded(centroids: Tensor, k: int) -> Tensor:
    """With the last centroid, to which no index refers, in the places that are left."""
    missing = k - centroids.shape[-1]
    return torch.cat([centroids, *[centroids[..., -1:]] * missing], -1)


def _centroids(values: Floats, k: int) -> Float64s:
    """`(b, k)` means of the best runs of ascending, distinct values."""
    if k == values.shape[1]:
        return np.asarray(values, np.float64)
    bounds, sums, scale, centre = _best_runs(values, k)
    weight, first, _ = np.diff(np.take_along_axis(sums, bounds[None], axis=2), axis=2)
    mean = (first / weight + centre) / scale
    low = np.take_along_axis(values, bounds[:, :-1], axis=1)
    high = np.take_along_axis(values, bounds[:, 1:] - 1, axis=1)
    clipped: Float64s = np.minimum(np.maximum(mean, low), high)
    return clipped


def _best_runs(values: Floats, k: int) -> tuple[Ints, Float64s, Float64s, Float64s]:
    """`(b, k + 1)` bounds; prefix sums, scale and centre as `Moments` has them."""
    count, length = values.shape
    scale = powers_of_two(np.maximum(np.abs(values[:, :1]), np.abs(values[:, -1:])))
    centre = values[:, length // 2, None].astype(np.float64) * scale
    u = values.astype(np.float64) * scale - centre
    sums = np.empty((3, count, length + 1))
    sums[0] = np.arange(length + 1)
    sums[1:] = outward_sums(np.stack([u, u * u]), length // 2)
    if length > TABLE:
        bounds = divide_and_conquer(cost_of_runs(sums[:, :, :1], sums), sums, k)
    else:
        table = table_of_costs(np.ones(length), u)
        path = cheapest_path(table[..., 0], [table] * (k - 1), length)
        bounds = np.concatenate([np.zeros((count, 1), dtype=np.int64), path], axis=1)
    return bounds, sums, scale, centre
