"""The arithmetic: a tensor rounded to int8 and back within a range, and ranges that follow data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from torchclust.activations.record import (
    INPUT,
    Locating,
    numbered,
    operator_name,
)

Range: TypeAlias = tuple[float, float]
RANGES, PLAN, BATCHES = "activation_ranges", "activation_plan", "activation_batches"
GROUPS = "_activation_groups"  # from a call's name to its group, and whether its range is learned
_MOMENTUM = 0.01  # the share of each new batch, once a hundred have been averaged
_LEAST_WIDTH = 1e-9  # of a range: LiteRT's quantizer takes no smaller one


class Rounding(Locating):
    """One forward of a quantized module."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root
        self._groups: Mapping[str, tuple[int, bool]] = getattr(root, GROUPS)
        scales, zero_points = quantization(root.get_buffer(RANGES))
        self._scales, self._zero_points = scales.unbind(), zero_points.unbind()
        self._calls: Counter[str] = Counter()
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def inputs(self, tree: Any) -> Any:
        """The arguments, rounded."""
        return tree_map_only(Tensor, lambda x: self._round(f":{INPUT}", x), tree)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._round(f"{self.frames[-1]}:{operator_name(func)}", result)

    def follow(self) -> None:
        """Move the ranges towards this batch's."""
        if not self._seen:
            return
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
        found = self._groups.get(numbered(name, self._calls))
        if found is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        group, learned = found
        if learned and self._root.training:
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


def range_of(values: Iterable[Tensor], fixed: Range | None) -> Range:
    """Return the widest range of some tensors, or the fixed one of the operator."""
    if fixed is not None:
        return fixed
    ends = [value.detach().float().aminmax() for value in values]
    return min(float(e.min) for e in ends), max(float(e.max) for e in ends)


def average_over_ranks(target: Tensor) -> None:
    """Every process has seen other data; with one set of ranges, evaluation is the same on all."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(target)
        target /= distributed.get_world_size()
