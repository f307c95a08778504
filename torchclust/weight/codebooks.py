"""From a weight's values to the tensors of its lookup: codebooks, indices, scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchclust.fitting.arguments import require_finite
from torchclust.fitting.channels import GRID
from torchclust.fitting.codebook import fit_codebook
from torchclust.fitting.even import even_step
from torchclust.fitting.integer_codebook import fit_integer_codebook
from torchclust.fitting.nearest import assign, count_below_in_units, in_rows
from torchclust.fitting.stacked import fit_stacked
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
    if config.codebook_dtype == "float32":
        return _fit_float(rows, config, importance, seed)
    fit = _space_integers if config.trains_at_a_price and rows.any() else _fit_integer
    return fit(rows, config, importance, seed)


def _fit_float(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    def fit(part: slice) -> tuple[Tensor, Tensor]:
        weights = None if importance is None else importance[part]
        if config.trains_at_a_price:
            return _spaced(rows[part], config, weights)
        book = fit_codebook(
            rows[part],
            config.n_clusters,
            init=config.init,
            max_iter=config.max_iter,
            importance=weights,
            preserve_sparsity=config.preserve_sparsity,
            rate=config.rate,
            seed=seed,
        )
        return book.centroids, book.indices

    if config.granularity == "tensor":
        centroids, indices = fit(slice(None))
    else:
        size = (config.group_size if config.granularity == "group" else None) or 1
        whole = len(rows) - len(rows) % size if can_be_stacked(config, importance) else 0
        parts = [slice(start, start + size) for start in range(whole, len(rows), size)]
        found = [fit(part) for part in parts]
        if whole:
            stacked = stack_fits(rows[:whole].split(size), config)
            found = [*zip(*stacked, strict=True), *found]
        centroids = _stack_padded([c for c, _ in found])
        indices = torch.cat([i for _, i in found])
    zero = {"zero_mask": centroids == 0} if config.preserve_sparsity else {}
    return centroids, indices.byte(), zero


def _spaced(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Evenly spaced centroids through 0, and the nearest of them."""
    half = config.half
    step = even_step(rows, half, config.rate, importance)
    places = torch.arange(-half, half + 1, dtype=torch.float64, device=rows.device)
    limits = torch.finfo(rows.dtype)
    centroids = (step * places).clamp(limits.min, limits.max).to(rows.dtype)
    return centroids, assign(rows, centroids)


def _space_integers(
    rows: Tensor, config: ClusterConfig, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Evenly spaced codes, in steps as wide for every channel as its weights are large.

    Errors count in units of the tensor, so that the steps of all channels share one price.
    """
    flat = in_rows(rows.double())
    size = flat.square().mean(1).sqrt()
    size = torch.where(size > 0, size, size[size > 0].median())[:, None]
    weights = size.square().expand_as(flat)
    if importance is not None:
        weights = weights * importance.double().reshape(flat.shape)
    half = config.half
    spacing = GRID // half
    scale = (even_step(flat / size, half, config.rate, weights) / spacing * size.squeeze(1)).float()
    codes = spacing * torch.arange(-half, half + 1, device=rows.device)
    indices = count_below_in_units(rows, scale, (codes[1:] + codes[:-1]).float() / 2)
    return _trained(codes[half + 1 :], scale, indices, rows.dtype)


def can_be_stacked(config: ClusterConfig, importance: Tensor | None) -> bool:
    """Whether many such fits are one call of `torchclust.fitting.stacked`."""
    plain = config.init == "optimal" and not config.rate and not config.preserve_sparsity
    return plain and config.codebook_dtype == "float32" and importance is None


def stack_fits(parts: Sequence[Tensor], config: ClusterConfig) -> tuple[Tensor, Tensor]:
    """Codebooks of weights, or of parts of one, all of one shape.

    Returns:
        `(parts, k)` centroids, the last repeated where a part has fewer; `(parts, ...)` indices.

    Raises:
        ValueError: NaN or infinity in one of them.
    """
    rows = torch.stack([part.reshape(-1) for part in parts])
    require_finite("values", rows)
    centroids, indices = fit_stacked(rows, config.n_clusters)
    width = int(indices.max()) + 1
    return centroids[:, :width], indices.view(len(parts), *parts[0].shape)


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
    return _trained(magnitudes, book.scale, indices, rows.dtype)


def _trained(
    magnitudes: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Integers and scales as they train: of the weight's own magnitude."""
    unit = torch.exp2(scale.double().mean().log2().round().clamp_min(_LEAST_UNIT))
    return (
        (magnitudes.double() * unit).to(dtype),
        indices.byte(),
        {"relative_scale": (scale.double() / unit).to(dtype), "unit": unit.to(dtype)},
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
