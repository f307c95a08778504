"""What both fits take: arguments checked, values sorted once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.fitting.moments import Floats
from torchclust.fitting.seeding import INITS

MAX_CLUSTERS = 65536

_BLOCK = 1 << 16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_request(n_clusters: int, init: str, max_iter: int, preserve_sparsity: bool) -> None:
    """Refuse what no fit can serve.

    Raises:
        TypeError: `n_clusters` or `max_iter` is not an int (a bool is not).
        ValueError: either is out of range, or `init` is unknown.
    """
    _check_int("n_clusters", n_clusters, "n_clusters=16")
    _check_int("max_iter", max_iter, "max_iter=300")
    if preserve_sparsity and n_clusters == 2:
        raise ValueError(
            "n_clusters must be at least 3 with preserve_sparsity, got 2: one centroid is 0, and "
            "negative and positive weights need one each. For example n_clusters=3"
        )
    if not 2 <= n_clusters <= MAX_CLUSTERS:
        raise ValueError(
            f"n_clusters must be between 2 and {MAX_CLUSTERS}, got {n_clusters}. "
            "For example n_clusters=16"
        )
    if max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}. 0 keeps the seeds")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")


def check_rate(rate: float) -> None:
    """Refuse a price that is none.

    Raises:
        TypeError: it is no number (a bool is none).
        ValueError: it is negative, NaN or infinite.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate must be a number, got {rate!r}. For example rate=0.05")
    if not 0 <= rate < float("inf"):
        raise ValueError(
            f"rate must be finite and at least 0, got {rate}: it is what a bit costs, in variances "
            "of the weights. For example rate=0.05"
        )


def as_float_tensor(name: str, given: Tensor | npt.ArrayLike) -> Tensor:
    """A detached tensor of a dtype that can be clustered; integers and lists become float64.

    Raises:
        TypeError: the dtype is complex, an 8-bit float or no number at all.
    """
    if isinstance(given, Tensor):
        data = given.detach()
        if not (data.is_floating_point() or data.is_complex()):
            data = data.to(torch.float64)
    else:
        array = np.asarray(given)
        if array.dtype.kind in "biu" or (array.dtype.itemsize > 8 and array.dtype.kind == "f"):
            array = array.astype(np.float64)
        if array.dtype.kind != "f":
            raise TypeError(f"{name} must hold real numbers, got an array of {array.dtype}")
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        data = torch.from_numpy(native if native.flags.writeable else native.copy())
        data = data.reshape(array.shape)
    if data.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {data.dtype}. "
            f"Convert it first:  {name}.to(torch.float32)"
        )
    return data


def checked_importance(given: Tensor | npt.ArrayLike | None, shape: Sequence[int]) -> Tensor | None:
    """`importance` as a tensor of the values' shape.

    Raises:
        ValueError: another shape, or an element that is negative, NaN or infinite.
    """
    if given is None:
        return None
    importance = as_float_tensor("importance", given)
    if tuple(importance.shape) != tuple(shape):
        raise ValueError(
            f"importance must have the shape of the values, {tuple(shape)}, "
            f"got {tuple(importance.shape)}"
        )
    if importance.numel():
        low, high = (float(bound) for bound in importance.aminmax())
        if not (low >= 0 and np.isfinite(high)):
            raise ValueError(
                f"importance must be finite and at least 0, got values from {low} to {high}. "
                "It weighs squared errors: pass squared gradients, not gradients"
            )
    return importance


def require_finite(name: str, data: Tensor) -> None:
    """Refuse a tensor with nothing in it, or with NaN or infinity.

    Raises:
        ValueError: either.
    """
    if data.numel() == 0:
        raise ValueError(
            f"{name} must not be empty, got shape {tuple(data.shape)}: "
            "leave a tensor without elements out"
        )
    low, high = data.aminmax()
    if not (low.isfinite() and high.isfinite()):
        bad = int((~data.isfinite()).sum())
        raise ValueError(
            f"{name} must be finite, got {bad} NaN or infinite of {data.numel()}. The usual cause "
            f"is a training that diverged: look at torch.isfinite({name})"
        )


def sort_values(data: Tensor, importance: Tensor | None) -> tuple[Floats, Floats | None]:
    """Ascending values and their positive importances, if any; those of importance 0 are left out.

    Returns:
        float32 copies, for float64 float64 ones. Importances that are all 0 count as all 1.
    """
    flat = flat_array(data)
    weights = None if importance is None else flat_array(importance)
    if weights is None or not weights.any():
        return np.sort(flat), None
    if flat.dtype == weights.dtype == np.float32:
        values, weights = _sorted_pairs(flat, weights)
    else:
        order = np.argsort(flat)
        values, weights = flat[order], weights[order]
    return (values, weights) if weights.all() else _without_dead(values, weights)


def flat_array(data: Tensor) -> Floats:
    """`(n,)` in float32, for float64 in float64; shares memory where it can."""
    wide = data if data.dtype == torch.float64 else data.to(torch.float32)
    flat: Floats = wide.reshape(-1).cpu().numpy()
    return flat


def _check_int(name: str, given: Any, example: str) -> None:
    if not isinstance(given, bool):
        try:
            operator.index(given)
        except TypeError:
            pass
        else:
            return
    kind = type(given).__name__
    raise TypeError(f"{name} must be an int, got {given!r} ({kind}). For example {example}")


def _without_dead(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Leave out values of weight 0, in place: two more copies are what memory peaks at."""
    kept = 0
    for start in range(0, len(values), _BLOCK):
        part = slice(start, start + _BLOCK)
        alive = weights[part] > 0
        into = slice(kept, kept + int(alive.sum()))  # ends before the next block begins
        values[into], weights[into] = values[part][alive], weights[part][alive]
        kept = into.stop
    return values[:kept], weights[:kept]


def _sorted_pairs(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Sort float32 pairs as one int64 each: four times faster than argsort.

    The upper half orders like the value (a negative float's bits, but for the sign, are flipped),
    the lower half is the weight's bits.
    """
    key = np.empty(len(values), dtype=np.int64)
    for start in range(0, len(values), _BLOCK):  # in blocks, so that temporaries stay small
        part = slice(start, start + _BLOCK)
        bits = values[part].view(np.int32)
        np.left_shift((bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64), 32, out=key[part])
        key[part] |= weights[part].view(np.uint32)
    key.sort()
    # Unpacked in place: a block of weights ends before the next block of keys begins.
    sorted_bits, sorted_weights = np.empty(len(key), dtype=np.int32), key.view(np.uint32)
    for start in range(0, len(key), _BLOCK):
        part = slice(start, start + _BLOCK)
        block = key[part].copy()
        sorted_weights[start : start + len(block)] = block & 0xFFFFFFFF
        bits = (block >> 32).astype(np.int32)
        sorted_bits[part] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return sorted_bits.view(np.float32), sorted_weights[: len(key)].view(np.float32)
