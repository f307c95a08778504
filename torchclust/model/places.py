"""Where a module keeps its tensors, and which of them our parametrization computes.

Everything else in this room asks here, so that torch's own storage (``parametrizations``, the
``_orig`` of pruning, the ``_g`` and ``_v`` of weight_norm) is known in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from torchclust.weight.clustered import ClusteredWeight


def parameters_behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """From which the tensor is computed; the tensor itself where it is plain."""
    if isinstance(module, torch.jit.ScriptModule):
        return [getattr(module, name)]
    if name in parametrizations_of(module):
        return list(parametrizations_of(module)[name].parameters())
    stored = [module._parameters.get(name + suffix) for suffix in _suffixes(module, name)]
    return [parameter for parameter in stored if parameter is not None]


def underlying(module: nn.Module, name: str) -> Tensor:
    """A parameter from which the tensor is computed; the tensor itself where it is plain."""
    behind = parameters_behind(module, name)
    return behind[0] if name in parametrizations_of(module) else behind[-1]


def computed_from(module: nn.Module, stored: str) -> str:
    """The tensor that a parameter is stored for: ``weight`` for ``weight_orig`` of pruning.

    The parameter's own name where it is just a parameter, whatever that name ends with.
    """
    for suffix in ("_orig", "_g", "_v"):
        name = stored.removesuffix(suffix)
        if name != stored and name not in module._parameters and suffix in _suffixes(module, name):
            return name
    return stored


def _suffixes(module: nn.Module, name: str) -> tuple[str, ...]:
    """Under which endings a tensor's parameters are stored."""
    if any(
        isinstance(h, WeightNorm) and h.name == name for h in module._forward_pre_hooks.values()
    ):
        return ("_g", "_v")
    value = module.__dict__.get(name)  # computed anew by a hook, from pruning or spectral_norm
    return ("_orig",) if isinstance(value, Tensor) else ("",)


def trains(module: nn.Module, name: str) -> bool:
    """Whether the tensor's parameter takes gradients."""
    return underlying(module, name).requires_grad


def parametrizations_of(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    """Return a module's parametrization lists by tensor name; empty where it has none."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    found = module._modules.get("parametrizations")
    ours = isinstance(found, nn.ModuleDict) and all(
        isinstance(holder, parametrize.ParametrizationList) for holder in found.values()
    )
    return found if ours else {}  # type: ignore[return-value]


def clustered_weight(module: nn.Module, name: str) -> ClusteredWeight | None:
    """Return our parametrization of a tensor, or None."""
    holder = parametrizations_of(module)
    first = holder[name][0] if name in holder else None
    return first if isinstance(first, ClusteredWeight) else None


def is_covered(module: nn.Module, name: str) -> bool:
    """Whether another parametrization, such as LoRA's, stands on top of a tensor's clustering."""
    return clustered_weight(module, name) is not None and len(parametrizations_of(module)[name]) > 1


def is_pruned(module: nn.Module, name: str) -> bool:
    """Whether `torch.nn.utils.prune` computes the tensor."""
    return name + "_mask" in module._buffers and computed_from(module, name + "_orig") == name


def clustered_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Iterate over ``(name, module, tensor_name)`` of what is clustered, ties included."""
    for path, module in list(model.named_modules()):
        for name in list(parametrizations_of(module)):
            if clustered_weight(module, name) is not None:
                yield join(path, name), module, name


def join(path: str, name: str) -> str:
    """Return a parameter's name from its module's path and its own."""
    return f"{path}.{name}" if path else name
