"""The part of a LightningModule that becomes a file: what it is called with, what stands in for it.

Both by its `forward` alone, so that nothing else of the module has to know. In a module that has
no such part, it is the module itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.recipes.section import RecipeError

Forward = Callable[..., Any]


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """Keep the inputs of every call meanwhile, on the CPU."""
    calls: list[tuple[Tensor, ...]] = []
    original, before = network.forward, vars(network).get("forward")
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).args
        for value in given:
            if not isinstance(value, Tensor):
                raise RecipeError(
                    f"module.exports: {type(network).__name__} is called with {value!r} among its "
                    "inputs; a file takes tensors only, so wrap the network in one that does"
                )
        calls.append(tuple(value.detach().cpu().clone() for value in given))
        return original(*args, **kwargs)

    network.forward = forward
    try:
        yield calls
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before


def joined(calls: Sequence[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    """Return the first `count` samples of the recorded calls, one tensor per input."""
    shapes = {tuple(tuple(value.shape[1:]) for value in call) for call in calls}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise RecipeError(
            f"module.exports: the network gets inputs of several shapes, {one} and {other}; a file "
            "takes one: pad or cut them in the data"
        )
    return tuple(torch.cat(values)[:count] for values in zip(*calls, strict=True))


def stand_in_(network: nn.Module, forward: Forward) -> list[int]:
    """Let `forward` compute what the network is called for; returns a list that grows by calls.

    What holds weights within it must no longer be used by itself: it is not what is in the file.
    """
    calls: list[int] = []
    signature = inspect.signature(network.forward)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*signature.bind(*args, **kwargs).args)

    for name, part in network.named_modules():
        if name and next(part.parameters(recurse=False), None) is not None:
            part.forward = _refusing(name)
    network.forward = counting
    return calls


def _refusing(name: str) -> Forward:
    def forward(*_: Any, **__: Any) -> Any:
        raise RecipeError(
            f"module.exports: test_step calls {name!r} by itself, and the file holds it only as a "
            "part of the whole; name the submodule that test_step calls as module.exports"
        )

    return forward
