"""What a trace's operators say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

Substitute: TypeAlias = Callable[..., Any]

_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")
MOVES = (*_RESHAPES, "permute", "transpose", "unsqueeze", "squeeze")
# Operators that look at a tensor's shape only.
_OF_SHAPE = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


def operator(node: Any) -> str:
    """The operator's name without overload: ``max_pool2d`` of ``aten.max_pool2d.default``."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    return str(getattr(node.target, "_opname", ""))


def is_constant(node: fx.Node, constants: Container[fx.Node]) -> bool:
    """Whether an operator gives the same in every call, if ``constants`` do."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded in _tags(node):
        return False
    return operator(node) in _OF_SHAPE or all(n in constants for n in node.all_input_nodes)


def computed(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """What a constant operator gives; None of what is no tensor."""

    def operand(n: fx.Node) -> Tensor:
        return constants[n] if n in constants else torch.zeros(shape(n), dtype=n.meta["val"].dtype)

    if not callable(node.target):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    value = node.target(*args, **kwargs)
    return value if isinstance(value, Tensor) else None


def is_integer(node: fx.Node) -> bool:
    """Whether an operator gives integers, as indices are."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and not value.is_floating_point()


def writes(node: fx.Node) -> bool:
    """Whether an operator writes into an operand."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _tags(node: fx.Node) -> Container[Any]:
    tags: Container[Any] = getattr(node.target, "tags", ())
    return tags


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    return {**given, **node.kwargs}


def numbers(value: Any, axes: int) -> list[int]:
    """An argument with a number for each axis; torch takes one for all."""
    given = [value] if isinstance(value, int) else list(value)
    return [int(n) for n in (given * axes if len(given) == 1 else given)]


def source(node: Any) -> fx.Node | None:
    """The first tensor argument of an operator."""
    argument = node.args[0] if isinstance(node, fx.Node) and node.args else None
    if isinstance(argument, (list, tuple)):
        argument = argument[0] if argument else None
    return argument if isinstance(argument, fx.Node) else None


def returned(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    """What a trace returns, flat: operators, and what is None or a number."""
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    return tuple(node.args[0])


def is_tensor(node: Any) -> bool:
    """Whether an operator gives one tensor, of whatever shape."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def shape(node: Any) -> tuple[int, ...]:
    """The shape of an operator's result; () of what is no tensor."""
    return tuple(node.meta["val"].shape) if is_tensor(node) else ()


def flattened_map(node: fx.Node | None) -> fx.Node | None:
    """The map that ``node`` is the flattening of, (N, C, ...) as (N, C * ...); else None."""
    if operator(node) not in _RESHAPES:
        return None
    before = source(node)
    whole = shape(before)
    return before if len(whole) > 2 and shape(node) == (whole[0], math.prod(whole[1:])) else None


def flattened_pixels(node: fx.Node | None) -> fx.Node | None:
    """The map (N, C, H, W) that ``node`` is as (N, C, H * W); else None."""
    before = source(node) if operator(node) in _RESHAPES else None
    whole = shape(before)
    is_map = len(whole) == 4 and shape(node) == (*whole[:2], whole[2] * whole[3])
    return before if is_map else None


def is_nonnegative(node: fx.Node | None) -> bool:
    """Whether nothing below zero can come from an operator, as behind a ReLU."""
    while operator(node) in ("dropout", "clone", "contiguous", "max_pool2d", "avg_pool2d"):
        node = source(node)
    if operator(node) in ("hardtanh", "hardtanh_"):
        return node is not None and float(arguments(node)["min_val"]) >= 0
    return operator(node) in (
        "relu",
        "relu_",
        "relu6",
        "relu6_",
        "sigmoid",
        "hardsigmoid",
        "softmax",
    )


def identity(x: Tensor, *_: object, **__: object) -> Tensor:
    """The substitute of an operator that another one's does as well."""
    return x
