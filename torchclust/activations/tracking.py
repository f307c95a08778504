"""Modes that see every operator call, and hooks that tell them which module is running.

A `TorchFunctionMode` sees functional calls (``x + y``, ``torch.cat``, ``F.relu``) and modules alike
and works inside `torch.compile`; but it does not see where it is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


class Locating(TorchFunctionMode):
    """A mode that knows which module is running, as far as `track_` made the modules tell.

    Args:
        owner: what `track_` was given. A module inside two that are tracked tells each its own.
    """

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner = owner
        self.frames = [""]
        self.times: Counter[str] = Counter()

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module's forward begins."""
        self.frames.append(numbered(path, self.times))

    def leave(self) -> None:
        """It ends."""
        self.frames.pop()

    def __enter__(self) -> Any:
        _LOCAL.running.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _LOCAL.running.pop()


def track_(model: nn.Module, owner: object) -> None:
    """Make every module inside a model tell the owner's mode when its forward begins and ends."""
    for path, module in model.named_modules():
        if path:
            # First of all hooks: torch.nn.utils.prune computes its weight in one.
            entering = _Entering(owner, path)
            module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True)
            module.register_forward_hook(_Leaving(owner))


def untrack_(model: nn.Module, owner: object) -> None:
    """Undo `track_` for this owner."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Entering) and hook.owner is owner:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
        for number, after in list(module._forward_hooks.items()):
            if isinstance(after, _Leaving) and after.owner is owner:
                del module._forward_hooks[number]


@contextmanager
def tracked(model: nn.Module, owner: object) -> Iterator[None]:
    """`track_` for a while."""
    track_(model, owner)
    try:
        yield
    finally:
        untrack_(model, owner)


def modes_at_work() -> list[Locating]:
    """Those of this thread, innermost last."""
    return _LOCAL.running


def numbered(name: str, times: Counter[str]) -> str:
    """The name, with ``#n`` from its second use on."""
    times[name] += 1
    return name if times[name] == 1 else f"{name}#{times[name] - 1}"


class _Local(threading.local):
    """The modes at work in this thread, innermost last; DataParallel runs a replica per thread."""

    def __init__(self) -> None:
        self.running: list[Locating] = []


_LOCAL = _Local()


def _mode_of(owner: object) -> Locating | None:
    """The owner's mode that is at work; of a module that runs within itself the innermost."""
    return next((mode for mode in reversed(_LOCAL.running) if mode.owner is owner), None)


class _Entering:
    """Forward pre-hook of the module at ``path``."""

    def __init__(self, owner: object, path: str) -> None:
        self.owner, self.path = owner, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = _mode_of(self.owner)
        if mode is not None:
            mode.enter(self.path, module, args, kwargs)


class _Leaving:
    """Forward hook, the other end of `_Entering`."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = _mode_of(self.owner)
        if mode is not None:
            mode.leave()
