"""Where a module keeps its tensors, and which of them our parametrization computes.

Everything else in this room asks here, so that torch's own storage (``parametrizations``, the
``_orig`` of pruning, the ``_g`` and ``_v`` of weight_norm) is known in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchclust.weight.clustered import ClusteredWeight


def parameters_behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """From which the tensor is computed; the tensor itself where it is plain."""
    if parametrize.is_parametrized(module, name):
        return list(parametrizations_of(module)[name].parameters())
    stored = [module._parameters.get(name + suffix) for suffix in ("", "_orig", "_g", "_v")]
    return [parameter for parameter in stored if parameter is not None]


def underlying(module: nn.Module, name: str) -> Tensor:
    """A parameter from which the tensor is computed; the tensor itself where it is plain."""
    if parametrize.is_parametrized(module, name):
        return next(parametrizations_of(module)[name].parameters())
    for candidate in (name, name + "_orig", name + "_v"):
        parameter = module._parameters.get(candidate)
        if parameter is not None:
            return parameter
    raise AssertionError(f"{name} is no tensor of {module}")


def trains(module: nn.Module, name: str) -> bool:
    """Whether the tensor's parameter takes gradients."""
    return underlying(module, name).requires_grad


def parametrizations_of(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    """Return a module's parametrization lists by tensor name; empty where it has none."""
    found = module._modules.get("parametrizations")
    return found if isinstance(found, nn.ModuleDict) else {}  # type: ignore[return-value]


def clustered_weight(module: nn.Module, name: str) -> ClusteredWeight | None:
    """Return our parametrization of a tensor, or None."""
    holder = parametrizations_of(module)
    first = holder[name][0] if name in holder else None
    return first if isinstance(first, ClusteredWeight) else None


def clustered_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Iterate over ``(name, module, tensor_name)`` of what is clustered, ties included."""
    for path, module in list(model.named_modules()):
        for name in list(parametrizations_of(module)):
            if clustered_weight(module, name) is not None:
                yield join(path, name), module, name


def join(path: str, name: str) -> str:
    """Return a parameter's name from its module's path and its own."""
    return f"{path}.{name}" if path else name
