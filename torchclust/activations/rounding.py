"""The arithmetic: a tensor rounded to int8 and back within a range, and ranges that follow data."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn

from torchclust.activations.arguments import map_inputs
from torchclust.activations.record import operator_name
from torchclust.activations.tracking import Locating, numbered

Range: TypeAlias = tuple[float, float]
RANGES, PLAN, BATCHES = "activation_ranges", "activation_plan", "activation_batches"
NAMES = "_activation_names"
_MOMENTUM = 0.01  # the share of each new batch, once a hundred have been averaged
_LEAST_WIDTH = 1e-9  # of a range: LiteRT's quantizer takes no smaller one


@dataclass(frozen=True, eq=False)
class Names:
    """What a quantized module knows by name.

    Attributes:
        groups: from a call to its group, and whether its range is learned.
        uses: how often a module ran with the example inputs, where more than once.
        places: of the parameters of its forward.
    """

    groups: Mapping[str, tuple[int, bool]]
    uses: Mapping[str, int]
    places: Mapping[str, int]


class Rounding(Locating):
    """One forward of a quantized module."""

    def __init__(self, root: nn.Module) -> None:
        self._names: Names = getattr(root, NAMES)
        super().__init__(owner=self._names)
        self._root = root
        scales, zero_points = quantization(root.get_buffer(RANGES))
        self._scales, self._zero_points = scales.unbind(), zero_points.unbind()
        self._calls: Counter[str] = Counter()
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, rounded."""
        return map_inputs(self._round, self._names.places, args, kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = f"{self.frames[-1]}:{operator_name(func)}"
        return self._round(numbered(name, self._calls), result)

    def finish(self) -> None:
        """Move the ranges towards this batch's, in training; say what was left in float."""
        self._warn_of_more_uses()
        if self._root.training:
            self._follow()

    def _warn_of_more_uses(self) -> None:
        if torch.compiler.is_compiling():  # which takes no warnings
            return
        for path, count in self._names.uses.items():
            if self.times[path] > count:
                warnings.warn(
                    f"{path!r} runs more often than with the example inputs, {count} times: what "
                    f"it computes beyond that is not rounded. Give quantize_activations_ the "
                    f"longest inputs",
                    stacklevel=6,  # where the model is called
                )
                return

    def _follow(self) -> None:
        ranges, batches = self._root.get_buffer(RANGES), self._root.get_buffer(BATCHES)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for group, low, high in self._seen:
            before = merged.get(group, (low, high))
            merged[group] = (torch.minimum(before[0], low), torch.maximum(before[1], high))
        with torch.no_grad():
            target = ranges.clone()
            for group, (low, high) in merged.items():
                target[group, 0], target[group, 1] = low, high
            average_over_ranks(target)
            target = torch.where(target.isfinite(), target, ranges)
            ranges.lerp_(target, (batches + 1).reciprocal().clamp_min(_MOMENTUM).to(ranges))
            batches += 1

    def _round(self, name: str, result: Any) -> Any:
        found = self._names.groups.get(name)
        if found is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        group, learned = found
        if learned and self._root.training and result.numel():
            self._seen.append((group, *result.detach().aminmax()))
        return torch.fake_quantize_per_tensor_affine(
            result, self._scales[group], self._zero_points[group], -128, 127
        )


def quantization(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points, as ai-edge-quantizer's ``tensor_zp_scale_from_min_max`` has them."""
    low, high = ranges.detach().float().unbind(1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = (high - low).clamp_min(_LEAST_WIDTH) / 255
    return scales, (-128 - low / scales).round().clamp(-128, 127).int()


def ends_of(values: Tensor) -> Tensor:
    """The least and the largest value, as a tensor of two; NaN where there is none."""
    if not values.numel():
        return torch.full((2,), torch.nan, device=values.device)
    return torch.stack(values.detach().float().aminmax())


def widest(ends: Iterable[Tensor]) -> Range:
    """From the least of some `ends_of` to the largest; NaN if one of them is."""
    low, high = torch.stack([e.cpu() for e in ends]).unbind(1)
    return float(low.amin()), float(high.amax())


def average_over_ranks(target: Tensor) -> None:
    """Every process has seen other data; with one set of ranges, evaluation is the same on all."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(target)
        target /= distributed.get_world_size()
