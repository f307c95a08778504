"""The looked-up weight, kept between evaluations until something it comes from changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class EvaluationCache:
    """A computed weight and what it was computed from.

    Tensors are compared by identity, storage and version counter, and the small ones on the CPU by
    value as well: an edit through ``.data`` leaves the version counter as it was.
    """

    def __init__(self, value: Tensor, sources: Sequence[Tensor]) -> None:
        self.value = value
        self._stamp = list(_stamps([value, *sources]))
        self._refs = [weakref.ref(source) for source in sources]
        self._copies = [(i, s.clone()) for i, s in enumerate(sources) if is_small(s)]
        self._inference = torch.is_inference_mode_enabled()

    def holds(self, sources: Sequence[Tensor]) -> bool:
        """Whether the kept weight is still what the sources give."""
        return (
            self._inference == torch.is_inference_mode_enabled()
            and len(sources) == len(self._refs)
            and all(r() is s for r, s in zip(self._refs, sources, strict=True))
            and self._stamp == list(_stamps([self.value, *sources]))
            and all(torch.equal(copy, sources[i]) for i, copy in self._copies)
        )


def _stamps(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        yield tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def is_small(tensor: Tensor) -> bool:
    """Whether comparing a tensor with a copy is cheaper than trusting its version."""
    return tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.numel() <= 65536
