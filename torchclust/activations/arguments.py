"""The tensors that a forward is called with, named alike however they are handed over.

`f(x, y)`, `f(x, y=y)` and `f(y=y, x=x)` are one call. So a name goes by the place of the parameter,
``:input``, ``:input#1``, and an optional one that is left out renames nothing. Inside a list or a
dict the way there follows, as in ``:input['left'][0]``: dicts have no order to count by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

INPUT = "input"


def places(forward: Callable[..., Any]) -> dict[str, int]:
    """At which position each parameter of a bound forward can be given, by its name.

    >>> places(lambda x, y=None, *more, flag=True: x)
    {'x': 0, 'y': 1}
    """
    parameters = inspect.signature(forward).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {name: position for position, name in enumerate(positional)}


def map_inputs(
    function: Callable[[str, Tensor], Tensor],
    where: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put ``function(name, tensor)`` in the place of every tensor among arguments.

    Args:
        function: called in the order in which the tensors are given.
        where: `places` of the forward that is called.
        args, kwargs: what it is called with.

    >>> import torch
    >>> names = []
    >>> x, y = torch.ones(2), [torch.zeros(3)]
    >>> _ = map_inputs(lambda n, t: names.append(n) or t, {"x": 0, "y": 1}, (), {"y": y, "x": x})
    >>> names
    [':input#1[0]', ':input']
    """
    positional = tuple(_mapped(function, _numbered(i), x) for i, x in enumerate(args))
    named = {
        key: _mapped(function, _numbered(where[key]) if key in where else f":{INPUT}[{key!r}]", x)
        for key, x in kwargs.items()
    }
    return positional, named


def _numbered(place: int) -> str:
    return f":{INPUT}#{place}" if place else f":{INPUT}"


def _mapped(function: Callable[[str, Tensor], Tensor], name: str, tree: Any) -> Any:
    """One level after the other: not every type that torch takes apart says what leads inside."""
    if isinstance(tree, Tensor):
        return function(name, tree)
    children, spec = tree_flatten(tree, is_leaf=lambda node: node is not tree)
    if spec.is_leaf():
        return tree
    keys = tree if isinstance(tree, Mapping) else range(len(children))
    parts = zip(keys, children, strict=True)
    return tree_unflatten([_mapped(function, f"{name}[{k!r}]", x) for k, x in parts], spec)
