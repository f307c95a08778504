"""Tensors as bit patterns: the dtypes that a packed file knows, there and back without loss."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]


class Dtype(NamedTuple):
    """An element type: torch's name, bytes per unit, units per element (2 for complex)."""

    name: str
    unit: int
    units: int = 1

    @property
    def size(self) -> int:
        """Bytes per element."""
        return self.unit * self.units

    @property
    def bits(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The unsigned integer of a unit's size."""
        return np.dtype(f"u{self.unit}")

    @property
    def torch(self) -> torch.dtype:
        """torch's own dtype; AttributeError where this torch lacks it."""
        found = getattr(torch, self.name)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def is_scalable(self) -> bool:
        """Whether a channel scale times an int8 code is defined in it."""
        return self.name in ("float32", "float64", "float16", "bfloat16")


DTYPES = (
    Dtype("float32", 4),
    Dtype("float64", 8),
    Dtype("float16", 2),
    Dtype("bfloat16", 2),
    Dtype("int8", 1),
    Dtype("uint8", 1),
    Dtype("int16", 2),
    Dtype("int32", 4),
    Dtype("int64", 8),
    Dtype("bool", 1),
    Dtype("complex64", 4, 2),
    Dtype("complex128", 8, 2),
    Dtype("float8_e4m3fn", 1),
    Dtype("float8_e5m2", 1),
    Dtype("uint16", 2),
    Dtype("uint32", 4),
    Dtype("uint64", 8),
)
"""In the order of their numbers in the file; only ever appended to."""

_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_bits(tensor: Tensor) -> Bits:
    """A tensor's bits, one dimension in C order; shares the memory where that is possible."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg()
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    flat = dense.contiguous().reshape(-1)
    size = flat.element_size()
    found: Bits = flat.view(_SIGNED[size]).numpy().view(f"u{size}")
    return found


def to_tensor(bits: Bits, dtype: Dtype) -> Tensor:
    """The tensor of any shape whose bits these are (of complex ones the last dimension halves)."""
    if not bits.size:
        shape = bits.shape if dtype.units == 1 else (*bits.shape[:-1], bits.shape[-1] // 2)
        return torch.empty(shape, dtype=dtype.torch)
    signed = _SIGNED[dtype.unit]
    name = "uint8" if signed == torch.uint8 else f"int{8 * dtype.unit}"
    return torch.from_numpy(np.ascontiguousarray(bits).view(name)).view(dtype.torch)


def dtype_of(tensor: Tensor) -> Dtype | None:
    """The tensor's element type; None if packed files have none such."""
    return _BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
