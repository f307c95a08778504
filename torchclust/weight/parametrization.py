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

import torch
from torch import Tensor, nn

from torchclust.fitting.nearest import (
    assign,
    count_below,
    count_below_in_rows,
    count_below_in_units,
)
from torchclust.weight.bits import bits_of
from torchclust.weight.clustered import ClusteredWeight, fit_as
from torchclust.weight.config import ClusterConfig
from torchclust.weight.lookup import at_least_float32, lookup


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

    def _bits_by(self, members: Tensor) -> Tensor:
        return self._table(bits_of(members))

    def _places(self, codebook: Tensor) -> Tensor:
        return at_least_float32(self._table(codebook))

    def _count_below(self, rows: Tensor, limits: Tensor) -> Tensor:
        return (count_below if limits.dim() == 1 else count_below_in_rows)(rows, limits)

    def members_of(self, indices: Tensor, codebook: Tensor) -> Tensor:
        """`(k,)` or `(codebooks, k)`."""
        return self._fold(self._counts(indices, self._table(codebook)))

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        if codebook.dim() == 1:
            return assign(rows, codebook)
        table = at_least_float32(self._table(codebook))
        limits = table[:, 1:] / 2 + table[:, :-1] / 2  # halved first: no overflow
        return self._count_below(rows, limits)

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

    def indices_of(self, original: Tensor) -> Tensor:
        """Positions in `codes`: magnitudes that training has merged, or sorted anew, are one."""
        indices = super().indices_of(original)
        with torch.no_grad():
            stored = mirrored(self._codebook(self.trained(original)))
            place = stored.unique(return_inverse=True)[1]
        if torch.equal(place, torch.arange(len(place), device=place.device)):
            return indices
        return lookup(place.byte(), indices)

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

    def _bits_by(self, members: Tensor) -> Tensor:
        """Of a magnitude, and one more for the sign."""
        bits = bits_of(members)
        return torch.cat([bits[1:].flip(0) + 1, bits[:1], bits[1:] + 1])

    def _places(self, codebook: Tensor) -> Tensor:
        return mirrored(codebook).float()

    def _count_below(self, rows: Tensor, limits: Tensor) -> Tensor:
        return count_below_in_units(rows, self._divisors(), limits)

    def _in_units_of_weight(self, pull: Tensor) -> Tensor:
        return pull.div_(self._divisors().view(-1, *[1] * (pull.dim() - 1)))

    def _divisors(self) -> Tensor:
        """The channels' scales, none of them 0."""
        return self.scale().detach().float().clamp_min(torch.finfo(torch.float32).tiny)

    def price_unit(self) -> Tensor:
        """The channels' scales: an int8 codebook's price is in squared codes."""
        return self.scale().detach()

    def members_of(self, indices: Tensor, codebook: Tensor) -> Tensor:
        """`(h + 1,)` of the magnitudes, 0 first."""
        counts = self._counts(indices, mirrored(codebook))
        return torch.cat([counts[len(codebook), None], self._fold(counts[None])])

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        codes = self._places(codebook)
        return self._count_below(rows, (codes[1:] + codes[:-1]) / 2)

    def _index_of_zero(self, codebook: Tensor) -> Tensor:
        return torch.full((), len(codebook), dtype=torch.uint8, device=codebook.device)

    def _fold(self, counts: Tensor) -> Tensor:
        total = counts.sum(0)
        half = len(total) // 2
        return total[half + 1 :] + total[:half].flip(0)


def kind_of(config: ClusterConfig) -> type[ClusteredWeight]:
    """Which parametrization a configuration asks for."""
    return FloatClusteredWeight if config.codebook_dtype == "float32" else IntegerClusteredWeight


def make_clustered_weight(
    config: ClusterConfig,
    tensors: Mapping[str, Tensor],
    *,
    channel_dim: int = 0,
    requires_grad: bool = True,
) -> ClusteredWeight:
    """The parametrization for a configuration, over tensors fitted or restored."""
    return kind_of(config)(config, tensors, channel_dim=channel_dim, requires_grad=requires_grad)


def fit_weight(
    weight: Tensor,
    config: ClusterConfig,
    *,
    channel_dim: int = 0,
    importance: Tensor | None = None,
    seed: int = 0,
    book: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Fit a weight's codebooks, as `torchclust.weight.clustered.fit_as` says; pure."""
    return fit_as(
        kind_of(config),
        weight,
        config,
        channel_dim=channel_dim,
        importance=importance,
        seed=seed,
        book=book,
    )


def mirrored(codes: Tensor) -> Tensor:
    """Return the whole codebook of positive codes: ``-codes, 0, codes``."""
    return torch.cat([-codes.flip(0), codes.new_zeros(1), codes])
