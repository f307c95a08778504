"""Why a tensor is not clustered by default, and why some cannot be at all."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchclust.model.places import parametrizations_of
from torchclust.model.rules import UNUSUAL

CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *CONV_TRANSPOSE)
_CLUSTERABLE: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, *_CONV), r"weight"),
    ((nn.RNNBase, nn.RNNCellBase), r"weight_(ih|hh).*"),
    ((nn.MultiheadAttention,), r"(in|q|k|v)_proj_weight"),
)
"""By default: these modules' tensors whose whole name matches. Attention's out-projection is a
Linear of its own."""


def why_skipped(module: nn.Module, name: str) -> str | None:
    """Why a tensor is clustered only where a rule names it; None where it is by default."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # refused, and not in silence
    if not any(
        isinstance(module, classes) and re.fullmatch(pattern, name)
        for classes, pattern in _CLUSTERABLE
    ):
        return UNUSUAL
    if isinstance(module, _CONV) and 1 < module.groups == module.in_channels:
        return "depthwise convolution"
    return None


def why_refused(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Why a tensor cannot be clustered whatever rules say; None where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "its module is compiled by TorchScript; cluster the Python module, strip it, and "
            "script or trace that"
        )
    unreadable = why_unreadable(parameter)
    if unreadable is not None:
        return unreadable
    if parameter.is_meta:
        return "it is on the meta device and has no values; load the weights first"
    if hasattr(type(parameter), "__tensor_flatten__"):  # what torch calls a wrapper subclass
        return (
            f"it is a {type(parameter).__name__}, which keeps its values in a form of its own "
            f"(sharded or quantized); cluster the plain model before it is sharded or quantized"
        )
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, and only floating-point weights are clustered"
    return _why_module_refuses(module, name)


def why_unreadable(parameter: Tensor) -> str | None:
    """Why nothing can be computed from a tensor's values; None where it can."""
    if is_lazy(parameter):
        return "it is lazy and has no values yet; run one batch through the model first"
    if parameter.layout != torch.strided:
        return f"it is {parameter.layout}; cluster it in dense form, before it is made sparse"
    if parameter.is_floating_point() and parameter.element_size() < 2:
        return f"its dtype is {parameter.dtype}; cluster it in bfloat16, before it is converted"
    return None


def _why_module_refuses(module: nn.Module, name: str) -> str | None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and name == "weight":
        if module.sparse:
            return (
                "sparse=True gives gradients by row, and a shared centroid has none; "
                "build the embedding with sparse=False"
            )
        if module.max_norm is not None:
            return (
                "max_norm rescales rows in place, which would break up the clusters; "
                "build the embedding with max_norm=None"
            )
    stored_apart = name + "_orig" in module._parameters and name in module.__dict__
    if stored_apart and name + "_mask" not in module._buffers:
        return (
            "a forward hook recomputes it (spectral_norm?); remove that first, or use "
            "torch.nn.utils.parametrizations"
        )
    if "parametrizations" in module._modules and not parametrizations_of(module):
        return (
            "its module has a child named 'parametrizations', which is where torch keeps what "
            "computes a weight; rename the child"
        )
    return None


def why_not_subclassed(cls: type[nn.Module]) -> str | None:
    """Why torch cannot derive from a class, as its parametrizations do; None where it can."""
    if isinstance(cls.__init_subclass__, types.BuiltinMethodType):
        return None
    try:
        type(f"Parametrized{cls.__name__}", (cls,), {})
    except Exception as error:
        return (
            f"torch.nn.utils.parametrize derives a class from its module's, and that fails: {error}"
        )
    return None


def overlaps(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Which of the parameters share memory with another one: name -> the other's name.

    One parameter in two places is tied and stays so; two parameters over the same memory (a
    transposed or sliced view) would part for ever as soon as one of them becomes a lookup.
    """
    ends = sorted((*_extent(p), name) for name, p in parameters.items() if _has_memory(p))
    found: dict[str, str] = {}
    for position, (_, end, name) in enumerate(ends):
        for start, _, other in ends[position + 1 :]:
            if start >= end:
                break
            if _meet(parameters[name], parameters[other]):
                found.setdefault(name, other)
                found.setdefault(other, name)
    return found


def _has_memory(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout == torch.strided
    return plain and not parameter.is_meta and parameter.numel() > 0


def _extent(parameter: Tensor) -> tuple[int, int]:
    size = parameter.element_size()
    last = sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + (last + 1) * size


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether an element of one lies where one of the other does; columns side by side do not."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    places = torch.cat([places.unique() for places in map(_places, (one, other))])
    return len(places.unique()) < len(places)


def _places(parameter: Tensor) -> Tensor:
    axes: Iterator[tuple[int, int]] = zip(parameter.shape, parameter.stride(), strict=True)
    places = torch.tensor(parameter.storage_offset(), device="cpu")
    for length, stride in axes:
        places = places.unsqueeze(-1) + torch.arange(length, device="cpu") * stride
    return places
