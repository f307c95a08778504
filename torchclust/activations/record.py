"""Naming every operator call of a model's forward, and recording what one forward did.

A call is named by where it happens: the module that is running, the operator, and how often either
came before, as in ``layer1.0.relu#1:relu``. So one ReLU used twice has two names, a branch that
runs in training only does not rename what happens elsewhere, and the name is the same for the
clustered model and for its stripped copy.

Names come from a `TorchFunctionMode`, which sees functional calls (``x + y``, ``torch.cat``,
``F.relu``) and modules alike and works inside `torch.compile`; hooks tell it which module is
running.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

INPUT = "input"
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
        results: numbers of the values that the model returned.
        children: the modules that the model called itself, each with its arguments.
    """

    calls: list[Call] = field(default_factory=list)
    results: tuple[int, ...] = ()
    children: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def values(self) -> dict[str, Tensor]:
        """Every floating-point tensor, by the name of its call; ``[i]`` where it made several."""
        found = {}
        for call in self.calls:
            tensors = [t for t in tree_leaves(call.result) if isinstance(t, Tensor)]
            for key, tensor in zip(output_keys(call.key, len(tensors)), tensors, strict=True):
                if tensor.is_floating_point():
                    found[key] = tensor
        return found


class Locating(TorchFunctionMode):
    """A mode that knows which module is running, as far as `track_` made the modules tell."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = [""]
        self._times: Counter[str] = Counter()

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module's forward begins."""
        self.frames.append(numbered(path, self._times))

    def leave(self) -> None:
        """It ends."""
        self.frames.pop()

    def __enter__(self) -> Any:
        _LOCAL.running.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _LOCAL.running.pop()


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Record:
    """Run a model once in eval mode and record it; mode and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    recording = _Recording()
    try:
        model.eval()
        with torch.random.fork_rng(_cuda_devices(model)), torch.no_grad(), _tracked(model):
            recording.start(args, kwargs)
            with _uncompiled(model), recording:
                output = model(*args, **kwargs)
    finally:
        for module, training in modes:
            module.training = training
    return recording.finish(output)


def track_(model: nn.Module) -> None:
    """Make every module inside a model tell the running mode when its forward begins and ends."""
    for path, module in model.named_modules():
        if path:
            # First of all hooks: torch.nn.utils.prune computes its weight in one.
            module.register_forward_pre_hook(_Entering(path), prepend=True, with_kwargs=True)
            module.register_forward_hook(_Leaving())


def untrack_(model: nn.Module) -> None:
    """Undo `track_`."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Entering):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
        for number, after in list(module._forward_hooks.items()):
            if isinstance(after, _Leaving):
                del module._forward_hooks[number]


def numbered(name: str, times: Counter[str]) -> str:
    """The name, with ``#n`` from its second use on."""
    times[name] += 1
    return name if times[name] == 1 else f"{name}#{times[name] - 1}"


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

    def __init__(self) -> None:
        super().__init__()
        self._record = Record()
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._made = 0
        self._calls: Counter[str] = Counter()

    def start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the model's inputs for the first values."""
        for tensor in tensors_in((args, kwargs)):
            key = numbered(f":{INPUT}", self._calls)
            self._add(Call(key, INPUT, (), self._number(tensor), (), (), {}, tensor))

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
            self._record.children.append((module, args, kwargs))
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

    def _number(self, tensor: Tensor) -> tuple[int, ...]:
        """A new number for a tensor; one that was changed in place is a new value."""
        self._numbers[id(tensor)] = self._made
        self._made += 1
        return (self._made - 1,)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Local(threading.local):
    """The modes at work in this thread, innermost last; DataParallel runs a replica per thread."""

    def __init__(self) -> None:
        self.running: list[Locating] = []


_LOCAL = _Local()


class _Entering:
    """Forward pre-hook of the module at ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _LOCAL.running:
            _LOCAL.running[-1].enter(self.path, module, args, kwargs)


class _Leaving:
    """Forward hook, the other end of `_Entering`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _LOCAL.running:
            _LOCAL.running[-1].leave()


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


@contextmanager
def _tracked(model: nn.Module) -> Iterator[None]:
    track_(model)
    try:
        yield
    finally:
        untrack_(model)
