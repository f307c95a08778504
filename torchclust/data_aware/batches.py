"""Batches without labels: what a model is called with, taken from whatever a user iterates over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.progress import each

_LABELS = frozenset({"label", "labels", "target", "targets"})
_BATCH = 32  # samples cut from one plain tensor at a time


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module; tensors in them may be nested in any structure."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def of(self, module: nn.Module) -> Any:
        """Call a module with copies: one that works in place must not change what is kept."""
        device = _device_of(module)
        args, kwargs = _map_tensors((self.args, dict(self.kwargs)), lambda t: _copy(t, device))
        return module(*args, **kwargs)

    def kept(self) -> Call:
        """The same call with detached tensors of their own."""
        args, kwargs = _map_tensors((self.args, dict(self.kwargs)), lambda t: t.detach().clone())
        return Call(args, kwargs)


def calls(model: nn.Module, batches: Iterable[Any] | Tensor) -> list[Call]:
    """Read unlabelled batches once and keep them all.

    Args:
        model: says how many inputs it takes: as many leading items of a tuple or list are used as
            its ``forward`` has required arguments, so labels behind them are left out. To give
            optional arguments too, nest them, ``((x, mask), y)``, or use a dict.
        batches: any iterable of tensors, tuples, lists, or dicts of keyword arguments (those that
            ``forward`` does not know are left out, and ``label(s)`` and ``target(s)`` always); or
            one tensor, which is cut along its first dimension into batches of 32.

    Raises:
        ValueError: no batch, too few items in one, NaN or infinity in an input.
    """
    split = batches.split(_BATCH) if isinstance(batches, Tensor) else batches
    signature = inspect.signature(model.forward)
    found = [_call(batch, signature, number) for number, batch in enumerate(each(split))]
    if not found:
        raise ValueError(
            "there is no batch of inputs. An iterator that was read before gives nothing any "
            "more; pass a list or a DataLoader"
        )
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Every floating-point tensor of a nested structure, in order."""
    found: list[Tensor] = []
    _map_tensors(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return [tensor for tensor in found if tensor.is_floating_point()]


def _call(batch: Any, signature: inspect.Signature, number: int) -> Call:
    parameters = signature.parameters.values()
    call = _by_name(batch, signature) if isinstance(batch, Mapping) else None
    if call is None:
        required = [
            p
            for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        call = Call(_leading(batch, max(1, len(required)), number))
    for tensor in tensors_in((call.args, dict(call.kwargs))):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"batch {number} of the inputs holds NaN or infinity")
    return call


def _by_name(batch: Mapping[str, Any], signature: inspect.Signature) -> Call:
    parameters = signature.parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Call(
        (),
        {k: v for k, v in batch.items() if k not in _LABELS and (any_name or k in parameters)},
    )


def _leading(batch: Any, count: int, number: int) -> tuple[Any, ...]:
    if not isinstance(batch, tuple | list):
        batch = (batch,)
    elif batch and isinstance(batch[0], tuple | list):  # ((x, mask), y)
        return tuple(batch[0])
    if len(batch) < count:
        raise ValueError(
            f"batch {number} of the inputs has {len(batch)} items, the model takes {count}"
        )
    return tuple(torch.as_tensor(item) if hasattr(item, "__array__") else item
                 for item in batch[:count])  # fmt: skip


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(item, function) for item in value)
    if isinstance(value, Mapping):
        mapped = {key: _map_tensors(item, function) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    return value


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor.detach().clone() if device is None else tensor.detach().to(device, copy=True)


def _device_of(module: nn.Module) -> torch.device | None:
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    return None if first is None else first.device
