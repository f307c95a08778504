"""Naming every operator call of a model's forward, and recording what one forward did.

A call is named by where it happens: the module that is running, the operator, and how often either
came before, as in ``layer1.0.relu#1:relu``. So one ReLU used twice has two names, a branch that
runs in training only does not rename what happens elsewhere, and the name is the same for the
clustered model and for its stripped copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchclust.activations.arguments import INPUT, map_inputs, places
from torchclust.activations.tracking import Locating, modes_at_work, numbered, tracked

_UNCHANGED = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("contiguous", "clone", "detach", "to", "float", "type", "type_as", "requires_grad"),
)
"""Operators that hand on their first argument's values, when evaluating."""


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call on data that derives from the model's inputs.

    Attributes:
        key: its name.
        operator: ``add`` for ``torch.add``, ``Tensor.add_`` and ``+``; `INPUT` for an input.
        inputs: numbers of the values that it read, each once.
        outputs: numbers of those that it made.
        constants: the tensors that it read besides: weights, buffers.
        args, kwargs: its arguments.
        result: what it returned.
    """

    key: str
    operator: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


@dataclass
class Record:
    """What one forward did.

    Attributes:
        calls: in order.
        values: what was observed of every floating-point tensor, by the name of its call; ``[i]``
            where that made several.
        results: numbers of the values that the model returned.
        children: the modules that the model called itself, each with its arguments.
        uses: how often each module ran.
    """

    calls: list[Call] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    results: tuple[int, ...] = ()
    children: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    uses: Mapping[str, int] = field(default_factory=dict)


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    observe: Callable[[Tensor], Any],
) -> Record:
    """Run a model once in eval mode and record it; mode, random state and inputs stay as they were.

    Args:
        model: any module.
        args, kwargs: what it is called with.
        observe: what is to be known of a tensor. It is asked as soon as the tensor is computed:
            later an operator may have changed it in place.
    """
    modes = [(module, module.training) for module in model.modules()]
    recording = _Recording(observe)
    try:
        model.eval()
        with (
            torch.random.fork_rng(_cuda_devices(model)),
            torch.no_grad(),
            tracked(model, recording),
        ):
            own_args, own_kwargs = recording.start(places(model.forward), args, kwargs)
            with _uncompiled(model), recording:
                output = model(*own_args, **own_kwargs)
    finally:
        for module, training in modes:
            module.training = training
    return recording.finish(output)


def is_recording() -> bool:
    """Whether a forward is being recorded in this thread."""
    return any(isinstance(mode, _Recording) for mode in modes_at_work())


def operator_name(function: Any) -> str:
    """``add`` for ``torch.add``, ``Tensor.add_`` and ``Tensor.__add__``."""
    return str(getattr(function, "__name__", "")).strip("_")


def output_keys(key: str, count: int) -> list[str]:
    """Names of a call's outputs: its own where there is one."""
    return [key] if count == 1 else [f"{key}[{i}]" for i in range(count)]


class _Recording(Locating):
    """Follows the data from the model's inputs on; what is computed from weights alone is left out.

    Tensors are known by identity, so every one is kept alive until the end.
    """

    def __init__(self, observe: Callable[[Tensor], Any]) -> None:
        super().__init__(owner=self)
        self._observe = observe
        self._record = Record(uses=self.times)
        self._given: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._made = 0
        self._calls: Counter[str] = Counter()

    def start(
        self, where: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the model's inputs for the first values, and return copies to call it with."""

        def first(name: str, tensor: Tensor) -> Tensor:
            copied = tensor.clone()
            self._given[id(copied)] = tensor
            self._add(Call(name, INPUT, (), self._number(copied), (), (), {}, copied))
            return copied

        return map_inputs(first, where, args, kwargs)

    def finish(self, output: Any) -> Record:
        """The record, once the model has returned."""
        found = (self._numbers.get(id(t)) for t in tensors_in(output))
        self._record.results = tuple(number for number in found if number is not None)
        return self._record

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note the modules that the model itself calls."""
        if len(self.frames) == 1:
            # As they were given: the module may change its own in place.
            own = tree_map_only(Tensor, lambda x: self._given.get(id(x), x), (args, kwargs))
            self._record.children.append((module, *own))
        super().enter(path, module, args, kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = operator_name(func)
        key = numbered(f"{self.frames[-1]}:{operator}", self._calls)
        read = tensors_in((args, kwargs))
        inputs = dict.fromkeys(self._numbers[id(t)] for t in read if id(t) in self._numbers)
        constants = tuple(t for t in read if id(t) not in self._numbers)
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if inputs and outputs:
            if operator in _UNCHANGED:
                self._numbers[id(outputs[0])] = next(iter(inputs))
                self._alive.append(result)
            else:
                numbers = tuple(n for t in outputs for n in self._number(t))
                self._add(
                    Call(key, operator, tuple(inputs), numbers, constants, args, kwargs, result)
                )
        return result

    def _add(self, call: Call) -> None:
        self._record.calls.append(call)
        self._alive.append((call.args, call.kwargs, call.result))
        made = tensors_in(call.result)
        for key, tensor in zip(output_keys(call.key, len(made)), made, strict=True):
            if tensor.is_floating_point():
                self._record.values[key] = self._observe(tensor)

    def _number(self, tensor: Tensor) -> tuple[int, ...]:
        """A new number for a tensor; one that was changed in place is a new value."""
        self._numbers[id(tensor)] = self._made
        self._made += 1
        return (self._made - 1,)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let compiled modules run as they are written: a compiler sees no tensor's identity."""
    if any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
