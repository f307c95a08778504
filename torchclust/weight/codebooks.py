"""From a weight's values to the tensors of its lookup: codebooks, indices, scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchclust.fitting.codebook import Codebook, fit_codebook
from torchclust.fitting.integer_codebook import fit_integer_codebook
from torchclust.weight.config import ClusterConfig

_LEAST_UNIT = -24  # log2: float16 has no smaller one, and 0 / 0 would be the codes after a cast


def fit_rows(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Fit the codebooks of a weight whose output channels are its rows; pure.

    Returns:
        What trains (centroids, or the positive codes' magnitudes), the indices, and the other
        tensors of the lookup by name.
    """
    fit = _fit_float if config.codebook_dtype == "float32" else _fit_integer
    return fit(rows, config, importance, seed)


def _fit_float(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    def fit(part: slice) -> Codebook:
        return fit_codebook(
            rows[part],
            config.n_clusters,
            init=config.init,
            max_iter=config.max_iter,
            importance=None if importance is None else importance[part],
            preserve_sparsity=config.preserve_sparsity,
            rate=config.rate,
            seed=seed,
        )

    if config.granularity == "tensor":
        codebook = fit(slice(None))
        centroids, indices = codebook.centroids, codebook.indices
    else:
        size = config.group_size if config.granularity == "group" else 1
        parts = [slice(start, start + (size or 1)) for start in range(0, len(rows), size or 1)]
        books = [fit(part) for part in parts]
        centroids = _stack_padded([book.centroids for book in books])
        indices = torch.cat([book.indices for book in books])
    zero = {"zero_mask": centroids == 0} if config.preserve_sparsity else {}
    return centroids, indices.byte(), zero


def _fit_integer(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    book = fit_integer_codebook(
        rows,
        config.n_clusters,
        init=config.init,
        max_iter=config.max_iter,
        importance=importance,
        preserve_sparsity=config.preserve_sparsity,
        rate=config.rate,
        seed=seed,
    )
    magnitudes, indices = book.codes[len(book.codes) // 2 + 1 :], book.indices
    if len(magnitudes) == 0:  # an all-zero weight: something must be there to train
        magnitudes, indices = book.codes.new_ones(1), indices + 1
    unit = torch.exp2(book.scale.double().mean().log2().round().clamp_min(_LEAST_UNIT))
    dtype = rows.dtype
    return (
        (magnitudes.double() * unit).to(dtype),
        indices.byte(),
        {"relative_scale": (book.scale.double() / unit).to(dtype), "unit": unit.to(dtype)},
    )


def _stack_padded(centroids: Sequence[Tensor]) -> Tensor:
    """One row a codebook; a shorter one repeats its last centroid, which no index refers to."""
    width = max(len(c) for c in centroids)
    return torch.stack([torch.cat([c, c[-1:].expand(width - len(c))]) for c in centroids])


def relative_error(weight: Tensor, clustered: Tensor) -> Tensor:
    """``||weight - clustered|| / ||weight||``, a float32 scalar that no magnitude overflows."""
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)  # squares overflow
    norm: Tensor = torch.linalg.vector_norm(weight / largest, dtype=torch.float64)
    error: Tensor = torch.linalg.vector_norm(
        clustered / largest - weight / largest, dtype=torch.float64
    )
    return torch.div(error, norm.clamp_min(torch.finfo(torch.float64).tiny)).float()
