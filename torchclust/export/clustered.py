"""Clustered parameters on both ends: their codes in the model, their place in the file."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torchclust.export.backends import ExportError
from torchclust.export.codes import (
    Array,
    Matched,
    Trained,
    match,
    most_codes,
    quantize_codebook,
    recover,
    rounded_codes,
)
from torchclust.export.layout import Prepared
from torchclust.export.rewrites.transposed import spread
from torchclust.model.clustering import Clustering, named_clusterings

_TRIFLE = 1e-5  # of the largest row: below a hundredth of a step of the output that they share
_FEW = 3  # values that an ordinary parameter may hold too: zeros, ones, a sign
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class HasMatrix(Protocol):
    """A weight as a converter holds it: ``matrix`` is (output channels, spatial..., inputs)."""

    @property
    def matrix(self) -> Array:
        """The values, two-dimensional."""


WeightT = TypeVar("WeightT", bound=HasMatrix)


@dataclass(frozen=True, eq=False)
class Placed(Generic[WeightT]):
    """A clustered parameter and the weight that the converter made of it."""

    weight: WeightT
    matched: Matched


def trained_codes(model: nn.Module, prepared: Prepared) -> list[Trained]:
    """What every clustered parameter's codes are, in the converted module's column order.

    Clusterings are asked where the model has them; of the other parameters, stripped or never
    clustered, the values tell which. Vectors have no codes: a bias is 32 bits wide in a file, of a
    scale that its layer's input decides.
    """
    plain = {n: p for n, p in prepared.original.named_parameters() if p.ndim > 1}
    axes = {name: _channel_axis(prepared.original, name) for name in plain}
    clusterings = dict(named_clusterings(model))
    found = [
        _from_clustering(name, clusterings[name], p.numpy(), axes[name])
        if name in clusterings
        else recover(name, p.numpy(), axes[name])
        for name, p in plain.items()
    ]
    known = [_spread(t, prepared.dilations.get(t.name)) for t in found if t is not None]
    return [_with_columns(t, prepared.columns.get(t.name)) for t in known]


def find_clustered(
    weights: Iterable[WeightT],
    trained: Sequence[Trained],
    used: frozenset[str],
    other_sizes: Iterable[int] = (),
) -> list[Placed[WeightT]]:
    """Find every clustered parameter among the converted model's weights, by value.

    Args:
        weights: all weights of the float file or graph, BatchNorm folded.
        trained: the clustered parameters.
        used: names of the parameters that the model's graph reads; others need not be found.
        other_sizes: those of the file's constants that are among no ``weights``.

    Raises:
        ExportError: a parameter that the model uses is in no weight of the file, or would have
            more codes than clusters there.
    """
    found: list[Placed[WeightT]] = []
    mirrored: list[str] = []
    weights = sorted(weights, key=lambda w: not w.matrix.any())
    for weight in weights:
        candidates = sorted(trained, key=lambda t: _is_placed(found, t))
        if not weight.matrix.any():  # a multiple of anything: only of what is nowhere else
            candidates = [t for t in candidates if not _is_placed(found, t)]
        matches = (match(weight.matrix, t) for t in candidates)
        matched = next((m for m in matches if m is not None), None)
        if matched is None:
            continue
        if _has_its_count(matched):
            found.append(Placed(weight, _without_trifles(matched)))
        else:
            mirrored.append(matched.trained.name)
    unclaimed = (w for w in weights if all(p.weight is not w for p in found))
    left = {*other_sizes, *(w.matrix.size for w in unclaimed)}
    for t in trained:
        if t.name in used and t.name not in mirrored and not _is_there(found, t):
            _report_unplaced(t, left)
    return found


def _without_trifles(matched: Matched) -> Matched:
    """Give each row that BatchNorm shrank to a trifle the one code of its codebook nearest to 0.

    Nothing is left of its weights, so their codes would only cost bits.
    """
    codes, groups = matched.codes.copy(), matched.groups
    peaks = matched.scales * np.abs(codes.astype(np.int16)).max(axis=1, initial=0)
    for row in np.flatnonzero(peaks <= _TRIFLE * peaks.max(initial=0.0)):
        shared = matched.codes[groups == groups[row]]
        codes[row] = shared.flat[np.abs(shared.astype(np.int64)).argmin()]
    return dataclasses.replace(matched, codes=codes)


def _from_clustering(name: str, clustering: Clustering, weight: Array, axis: int) -> Trained:
    config, scale = clustering.config, clustering.scale
    groups = np.zeros(weight.shape[axis], np.int64)
    if config.granularity != "tensor":
        groups = np.arange(len(groups)) // (config.group_size or 1)
    if scale is None:
        codes = quantize_codebook(weight, groups, axis)
    else:
        # The scale is the weight's own, so the quotient is the code but for one rounding.
        by_channel = scale.detach().cpu().float().numpy()
        by_channel = by_channel.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        codes = rounded_codes(weight, np.where(by_channel > 0, by_channel, np.float32(1)))
    symmetric = scale is not None
    return Trained(name, weight, codes, groups, clustering.n_clusters, symmetric, axis)


def _channel_axis(model: nn.Module, name: str) -> int:
    return int(isinstance(model.get_submodule(name.rpartition(".")[0]), _TRANSPOSED))


def _with_columns(trained: Trained, columns: Tensor | None) -> Trained:
    if columns is None:
        return trained
    order = columns.numpy()
    return dataclasses.replace(
        trained, weight=trained.weight[:, order], codes=trained.codes[:, order]
    )


def _spread(trained: Trained, dilation: tuple[int, ...] | None) -> Trained:
    """A kernel whose dilation is written out; where 0 was no code of its own, it is one now."""
    if dilation is None:
        return trained
    weight, codes = (
        spread(torch.from_numpy(a), dilation).numpy() for a in (trained.weight, trained.codes)
    )
    count = trained.n_clusters + int((trained.codes != 0).all())
    return dataclasses.replace(trained, weight=weight, codes=codes, n_clusters=count)


def _is_placed(found: Sequence[Placed[WeightT]], trained: Trained) -> bool:
    return any(placed.matched.trained is trained for placed in found)


def _is_there(found: Sequence[Placed[WeightT]], trained: Trained) -> bool:
    """Whether a parameter is placed, or its like: layers copied from each other are one there."""
    return _is_placed(found, trained) or any(
        np.array_equal(placed.matched.trained.weight, trained.weight) for placed in found
    )


def _report_unplaced(trained: Trained, sizes_left: set[int]) -> None:
    """An error for a tensor that is clustered; what only looks so (a constant) may well be none."""
    if not any(trained.weight.size % size == 0 for size in sizes_left):
        warnings.warn(
            f"{trained.name!r} is not in the file: what it computes reaches no output, is a "
            f"constant since it depends on no input, or is multiplied by zero, as by the BatchNorm "
            f"of a branch that was never trained",
            stacklevel=4,
        )
        return
    lost = (
        f"no weight of the converted file is {trained.name!r} {trained.weight.shape} up to a "
        f"factor per channel, so its codes cannot be kept"
    )
    if not trained.recovered:
        raise ExportError(
            f"{lost}: the model computes another weight from it, as weight standardization does. "
            f"Put that one into a plain layer before clustering, or leave this one out:  "
            f'cluster_(model, {{"*": {trained.n_clusters}, "{trained.name}": None}})'
        )
    if trained.n_clusters > _FEW:
        warnings.warn(f"{lost}, if it was clustered: it holds few values", stacklevel=4)


def _has_its_count(matched: Matched) -> bool:
    """Whether there are no more codes than clusters.

    Of a tensor that is clustered anything else is an error; one that only looks so, as a fixed
    filter that blurs, is rounded like any other.
    """
    trained = matched.trained
    count = most_codes(matched.codes, matched.groups)
    if count <= trained.n_clusters:
        return True
    cause = (
        f"{trained.name!r} would have {count} codes for {trained.n_clusters} clusters: BatchNorm "
        f"(or another factor that is folded into it) is negative for {matched.negative} of its "
        f"{len(matched.codes)} channels, which mirrors their codes"
    )
    remedy = (
        f"An int8 codebook is symmetric and immune:  "
        f'cluster_(model, {trained.n_clusters}, codebook_dtype="int8")'
    )
    if not trained.recovered:
        raise ExportError(f"{cause}.\n{remedy}")
    if trained.n_clusters > _FEW:
        warnings.warn(f"{cause}, if it was clustered: it holds few values. {remedy}", stacklevel=4)
    return False
