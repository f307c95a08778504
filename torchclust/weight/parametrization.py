"""The parametrizations behind a clustered weight: what is stored, what trains, what is computed.

A `ClusteredWeight` is registered through `torch.nn.utils.parametrize`, so ``module.weight`` is
computed on access. Contract, for every configuration and at any moment:

1. the computed weight holds at most ``n_clusters`` distinct values per codebook (float32), or is
   ``scale[o] * code`` with at most ``n_clusters`` integer codes (int8);
2. ``"fixed"``: ``parametrizations.weight.original`` is the codebook and nothing of the weight's
   size trains; ``"nearest"``: it is the weight, and the codebook lies beside it as ``centroids``;
3. everything is a tensor in the state dict, the configuration too (as JSON bytes), so a state dict
   tells how to rebuild its model (`torchclust.restore_`) and fits into safetensors.

Trained tensors keep the weight's own magnitude: Adam moves every element by about the learning
rate, so a codebook kept in integer units would stand still and a scale of 0.002 would leap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.fitting.nearest import assign, count_below_in_units
from torchclust.fitting.worth import without_noise
from torchclust.weight.codebooks import fit_rows
from torchclust.weight.config import ClusterConfig
from torchclust.weight.evaluation_cache import EvaluationCache
from torchclust.weight.lookup import Memory, at_least_float32, grouped_sum, lookup

_PARAMETERS = ("centroids", "relative_scale")


class ClusteredWeight(nn.Module):
    """A weight as codebook and indices; subclasses say what a codebook is.

    Args:
        config: how the weight is clustered.
        tensors: ``original`` and the other tensors of its state dict, as `fit_weight` makes them.
        channel_dim: the weight's output-channel dimension: 1 for ConvTranspose, else 0.
        requires_grad: whether the codebook trains.
    """

    def __init__(
        self,
        config: ClusterConfig,
        tensors: Mapping[str, Tensor],
        *,
        channel_dim: int = 0,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.channel_dim = channel_dim
        self.shape = tensors["indices" if config.assignment == "fixed" else "original"].shape
        self.first_original: Tensor | None = tensors["original"]
        self._cached: EvaluationCache | None = None
        self._memory = Memory()
        for name, tensor in tensors.items():
            if name in _PARAMETERS:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad))
            elif name not in ("original", "config_json"):
                self.register_buffer(name, tensor)
        self.register_buffer("config_json", config_as_bytes(config).to(tensors["original"].device))

    def forward(self, original: Tensor) -> Tensor:
        """The weight. Without gradients the last result is returned while nothing has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            if self._cached is not None:  # assigning to a module's attribute takes its time
                self._cached = None
            return self._evaluate(original, self._memory)
        sources = [original, *self._parameters.values(), *self._buffers.values()]
        tensors = [tensor for tensor in sources if tensor is not None]
        if self._cached is None or not self._cached.holds(tensors):
            self._cached = None  # not two values at a time, nor the last step's
            self._memory = Memory()
            self._cached = EvaluationCache(self.value(original), tensors)
        return self._cached.value

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``module.weight`` fits anew; registering keeps the first fit."""
        if self.first_original is not None:
            return self.first_original
        fitted = fit_weight(weight, self.config, channel_dim=self.channel_dim)
        for name, tensor in fitted.items():
            if name != "original":
                getattr(self, name).data = tensor
        return fitted["original"]

    def trained(self, original: Tensor) -> Tensor:
        """The tensor that trains the codebook, given the registered ``original``."""
        return original if self.config.assignment == "fixed" else self._tensor("centroids")

    def indices_of(self, original: Tensor) -> Tensor:
        """Indices in the weight's shape, ``uint8``: as stored, or of the nearest centroids."""
        with torch.no_grad():
            return self._rows(self._indices(original, self._codebook(self.trained(original))))

    def codes(self, original: Tensor) -> Tensor | None:
        """The int8 codebook, ascending; None for a float codebook."""
        return None

    def scale(self) -> Tensor | None:
        """The positive scale of every output channel; None for a float codebook."""
        return None

    def value(self, original: Tensor) -> Tensor:
        """The weight in memory of its own, of which nothing is kept here."""
        return self._evaluate(original, None)

    def _evaluate(self, original: Tensor, memory: Memory | None) -> Tensor:
        codebook = self._codebook(self.trained(original))
        indices = self._indices(original.detach(), codebook.detach())
        if self.config.gradient == "mean":
            ones = torch.ones((), dtype=original.dtype, device=indices.device)
            shape = self._table(codebook.detach()).shape
            members = self._fold(grouped_sum(ones.expand(indices.shape), indices, shape))
            codebook = _scale_gradient(codebook, members.clamp_min(1).reciprocal())
        through = None if self.config.assignment == "fixed" else self._rows(original)
        return self._rows(lookup(self._table(codebook), indices, through, memory))

    def _indices(self, original: Tensor, codebook: Tensor) -> Tensor:
        """Indices with output channels first, as `lookup` wants them beside a table of rows."""
        if self.config.assignment == "fixed":
            return self._rows(self._tensor("indices"))
        indices = self._nearest(self._rows(original), codebook)
        if self.config.preserve_sparsity:
            zero = self._index_of_zero(codebook)
            indices = torch.where(self._rows(self._tensor("sparsity_mask")), zero, indices)
        return indices

    def _rows(self, tensor: Tensor) -> Tensor:
        """Output channels first, and back again: the same exchange of two dimensions."""
        return tensor if self.channel_dim == 0 else tensor.transpose(0, self.channel_dim)

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def _codebook(self, trained: Tensor) -> Tensor:
        """What the trained tensor stands for; ascending where assignments are sought in it."""
        raise NotImplementedError

    def _table(self, codebook: Tensor) -> Tensor:
        """The values that `lookup` reads: ``(k,)``, or one row for every output channel."""
        raise NotImplementedError

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Indices of the nearest values, by binary search over midpoints: O(n log k) time."""
        raise NotImplementedError

    def _index_of_zero(self, codebook: Tensor) -> Tensor:
        raise NotImplementedError

    def _fold(self, counts: Tensor) -> Tensor:
        """Members per table entry, summed to members per codebook entry."""
        raise NotImplementedError


class FloatClusteredWeight(ClusteredWeight):
    """The paper's codebook: values in the weight's dtype, ``(k,)`` or ``(codebooks, k)``."""

    def _codebook(self, trained: Tensor) -> Tensor:
        zero = self._buffers.get("zero_mask")
        codebook = trained if zero is None else trained.masked_fill(zero, 0)
        return codebook if self.config.assignment == "fixed" else codebook.sort(-1).values

    def _table(self, codebook: Tensor) -> Tensor:
        if self.config.granularity != "group":
            return codebook
        by_channel = codebook.repeat_interleave(self.config.group_size or 1, 0)
        return by_channel[: self.shape[self.channel_dim]]

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        if codebook.dim() == 1:
            return assign(rows, codebook)
        table = at_least_float32(self._table(codebook))
        limits = table[:, 1:] / 2 + table[:, :-1] / 2  # halved first: no overflow
        flat = at_least_float32(rows).flatten(1)
        found = torch.searchsorted(limits.contiguous(), flat.contiguous(), out_int32=True)
        return found.byte().view(rows.shape)

    def _index_of_zero(self, codebook: Tensor) -> Tensor:
        table = self._table(codebook)
        position = torch.searchsorted(table, table.new_zeros(*table.shape[:-1], 1)).byte()
        return position if table.dim() == 1 else position.view(-1, *[1] * (len(self.shape) - 1))

    def _fold(self, counts: Tensor) -> Tensor:
        if self.config.granularity != "group":
            return counts
        size = self.config.group_size or 1
        padded = nn.functional.pad(counts, (0, 0, 0, -len(counts) % size))
        return padded.view(-1, size, counts.shape[1]).sum(1)


class IntegerClusteredWeight(ClusteredWeight):
    """Integer codes, symmetric about 0 and with 0, times one scale per output channel.

    What trains are the ``h`` positive magnitudes, as ``code * unit``, and the channels' scales, as
    ``scale / unit``. The unit is the power of two nearest the mean scale, so the trained tensors
    keep the weight's magnitude and codes survive a cast to bfloat16 exactly. Rounding to the grid
    is straight-through. The codebook is ``-codes, 0, codes``: symmetric whatever training does.
    """

    def codes(self, original: Tensor) -> Tensor:
        """The int8 codebook, ascending."""
        with torch.no_grad():
            codes: Tensor = mirrored(self._codebook(self.trained(original))).unique()
            return codes.to(torch.int8)

    def scale(self) -> Tensor:
        """The positive scale of every output channel, ``(channels,)``."""
        return self._tensor("relative_scale").abs() * self._tensor("unit")

    def _codebook(self, trained: Tensor) -> Tensor:
        in_codes = trained / self._tensor("unit")
        on_grid = in_codes.detach().round().clamp(1, 127)
        codes = on_grid + (in_codes - in_codes.detach())  # the bracket is 0: straight-through
        return codes if self.config.assignment == "fixed" else codes.sort().values

    def _table(self, codebook: Tensor) -> Tensor:
        return self.scale()[:, None] * mirrored(codebook)

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        codes = mirrored(codebook).float()
        scale = self.scale().detach().float().clamp_min(torch.finfo(torch.float32).tiny)
        return count_below_in_units(rows, scale, (codes[1:] + codes[:-1]) / 2)

    def _index_of_zero(self, codebook: Tensor) -> Tensor:
        return torch.full((), len(codebook), dtype=torch.uint8, device=codebook.device)

    def _fold(self, counts: Tensor) -> Tensor:
        total = counts.sum(0)
        half = len(total) // 2
        return total[half + 1 :] + total[:half].flip(0)


def make_clustered_weight(
    config: ClusterConfig,
    tensors: Mapping[str, Tensor],
    *,
    channel_dim: int = 0,
    requires_grad: bool = True,
) -> ClusteredWeight:
    """The parametrization for a configuration, over tensors fitted or restored."""
    kind = FloatClusteredWeight if config.codebook_dtype == "float32" else IntegerClusteredWeight
    return kind(config, tensors, channel_dim=channel_dim, requires_grad=requires_grad)


def config_from_bytes(encoded: Tensor) -> ClusterConfig:
    """The configuration that a clustered state dict carries (``...0.config_json``)."""
    return ClusterConfig.from_json(bytes(encoded.tolist()).decode("ascii"))


def config_as_bytes(config: ClusterConfig) -> Tensor:
    """Return a configuration as the uint8 tensor that state dicts hold."""
    return torch.tensor(list(config.to_json().encode("ascii")), dtype=torch.uint8)


def fit_weight(
    weight: Tensor,
    config: ClusterConfig,
    *,
    channel_dim: int = 0,
    importance: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit a weight's codebooks; pure.

    Returns:
        The tensors of a `ClusteredWeight` by name. ``original`` is what the parametrization
        registers: the codebook with ``"fixed"``, the weight itself with ``"nearest"``.
        ``fit_error`` is ``||weight - clustered|| / ||weight||`` as fitted, a float32 scalar.
    """
    kept = without_noise(weight.detach(), importance)
    rows = kept.transpose(0, channel_dim)
    weights = None if importance is None else importance.detach().transpose(0, channel_dim)
    trained, indices, tensors = fit_rows(rows, config, weights, seed)
    if config.assignment == "fixed":
        tensors |= {"original": trained, "indices": indices.transpose(0, channel_dim).contiguous()}
    else:
        tensors |= {"original": kept.clone(), "centroids": trained}
        if config.preserve_sparsity:
            tensors["sparsity_mask"] = kept == 0
    with torch.no_grad():
        fitted = make_clustered_weight(config, tensors, channel_dim=channel_dim)
        clustered = fitted.value(tensors["original"])
    return tensors | {"fit_error": relative_error(weight.detach(), clustered)}


def relative_error(weight: Tensor, clustered: Tensor) -> Tensor:
    """``||weight - clustered|| / ||weight||``, a float32 scalar that no magnitude overflows."""
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)  # squares overflow
    norm: Tensor = torch.linalg.vector_norm(weight / largest, dtype=torch.float64)
    error: Tensor = torch.linalg.vector_norm(
        clustered / largest - weight / largest, dtype=torch.float64
    )
    return torch.div(error, norm.clamp_min(torch.finfo(torch.float64).tiny)).float()


def mirrored(codes: Tensor) -> Tensor:
    """Return the whole codebook of positive codes: ``-codes, 0, codes``."""
    return torch.cat([-codes.flip(0), codes.new_zeros(1), codes])


def _scale_gradient(tensor: Tensor, factor: Tensor) -> Tensor:
    """The same values to the bit, with the gradient multiplied."""
    return tensor.detach() + (tensor - tensor.detach()) * factor
