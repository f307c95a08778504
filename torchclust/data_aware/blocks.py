"""The blocks of a model: parts that run one after the other, found by watching one forward pass.

A block is a chain of modules, each fed by the one before it and by nothing else that could change
from batch to batch. It starts with a module that holds clustered weights and takes in what follows
without any (norm, activation, pooling). A residual or attention block is one module and stays
whole; containers of several are opened. So errors are measured where they matter: behind the
shortcut's addition.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MOST = {True: 3, False: 6}  # clustered weights in one block: of a container, of another module


@dataclass(frozen=True)
class Block:
    """Modules that run one after the other, each once per forward pass of the model.

    Attributes:
        paths: of the modules. Each but the first is called with what the one before it gave.
        beside: constants that each is called with behind that.
        chained: whether the first is called with what the block before gave.
    """

    paths: tuple[str, ...]
    beside: tuple[Call, ...]
    chained: bool

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The block's modules in a model of this architecture."""
        return [model.get_submodule(path) for path in self.paths]

    def run(self, model: nn.Module, call: Call) -> Any:
        """Run the block alone."""
        first, *rest = self.modules(model)
        value = call.of(first)
        for module, beside in zip(rest, self.beside[1:], strict=True):
            value = module(value, *beside.args, **beside.kwargs)
        return value

    def fed(self, value: Any) -> Call:
        """What a chained block is called with, where the block before gave `value`."""
        return Call((value, *self.beside[0].args), self.beside[0].kwargs)

    def input_of(self, model: nn.Module, call: Call) -> Call:
        """Run the model up to this block and return what the block is called with."""
        return first_call(model.get_submodule(self.paths[0]), lambda: call.of(model))


@dataclass(frozen=True)
class _Run:
    """One call of a module: what came out, and its sole input, each with its version.

    The version tells whether the tensor was changed in place between two modules. `beside` are the
    other arguments, if they are constants; else there is no sole input.
    """

    path: str
    result: Any
    result_version: int
    fed: Any
    fed_version: int
    beside: Call

    def follows(self, before: _Run) -> bool:
        same = self.fed is not None and self.fed is before.result
        return same and self.fed_version == before.result_version


def find_blocks(
    model: nn.Module, call: Call, holders: Collection[nn.Module], names: Sequence[str] | None = None
) -> list[Block]:
    """Find the blocks of a model, in the order in which they run.

    Args:
        model: runs `call` once, without gradients, in the mode it is in.
        holders: modules that hold clustered weights.
        names: paths of the modules that are to be the blocks, instead of those found.

    Raises:
        ValueError: `names` holds one that is no module, or that does not run exactly once.
    """
    held = set(map(id, holders))
    if names is None:
        units = dict(_units(model, "", held, root=True))
    else:
        units = {name: _module_at(model, name) for name in names}
    runs = _trace(model, call, units)
    counts = Counter(run.path for run in runs)
    for name in names or ():
        if counts[name] != 1:
            raise ValueError(
                f"blocks: {name!r} runs {counts[name]} times in a forward pass; a block is a "
                f"module that runs once. Name the module around it, or leave it out"
            )
    occupied = {path for path, unit in units.items() if any(id(m) in held for m in unit.modules())}
    once = [run for run in runs if counts[run.path] == 1]
    return [
        Block(tuple(run.path for run in group), tuple(run.beside for run in group), chained)
        for group, chained in _grouped(once, occupied, merge=names is None)
        if names is not None or any(run.path in occupied for run in group)
    ]


def _grouped(
    runs: Sequence[_Run], occupied: Collection[str], *, merge: bool
) -> Iterator[tuple[list[_Run], bool]]:
    """Cut where the chain breaks, and before a unit that holds weights if one came before."""
    group: list[_Run] = []
    chained = False
    for run in runs:
        follows = bool(group) and run.follows(group[-1])
        full = run.path in occupied and any(other.path in occupied for other in group)
        if group and (not merge or full or not follows):
            yield group, chained
            group, chained = [], follows
        group.append(run)
    if group:
        yield group, chained


def first_call(module: nn.Module, run: Callable[[], Any]) -> Call:
    """Run until a module is called, stop there, and return its arguments."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(Call(args, kwargs).kept())

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached.call
    finally:
        handle.remove()
    raise AssertionError("the module was traced, so it is called")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode back afterwards, whatever happens."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Reached(Exception):
    """Leaves a forward pass early."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _units(
    module: nn.Module, path: str, held: Collection[int], *, root: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The modules to watch: containers and large modules opened, everything else whole."""
    inside = sum(id(m) in held for m in module.modules())
    never_called = type(module).forward is nn.Module.forward  # a ModuleList: its items are
    opened = root or never_called or inside > _MOST[isinstance(module, _CONTAINERS)]
    children = [c for c in module.named_children() if c[0] != "parametrizations"]
    if id(module) in held or not children or not opened:
        yield path, module
        return
    for name, child in children:
        yield from _units(child, f"{path}.{name}" if path else name, held)


def _module_at(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules() if n]
        close = (difflib.get_close_matches(name, known, 1) or known)[0]
        raise ValueError(
            f"blocks: the model has no module {name!r}; did you mean {close!r}?"
        ) from None


def _trace(model: nn.Module, call: Call, units: Mapping[str, nn.Module]) -> list[_Run]:
    runs: list[_Run] = []
    pending: list[tuple[Any, int, Call]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        beside = Call(args[1:], kwargs)
        sole = args[0] if args and _is_constant((beside.args, kwargs)) else None
        pending.append((sole, _version(sole), beside))

    def after(path: str, result: Any) -> None:
        runs.append(_Run(path, result, _version(result), *pending.pop()))

    with ExitStack() as hooks, torch.no_grad():
        for path, unit in units.items():
            keep = functools.partial(_after, after, path)
            hooks.callback(unit.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(unit.register_forward_hook(keep).remove)
        call.of(model)
    return runs


def _after(note: Callable[[str, Any], None], path: str, _: nn.Module, args: Any, out: Any) -> None:
    note(path, out)


def _is_constant(value: Any) -> bool:
    """Whether the next batch will bring the same. An integer may be a size, so it need not be."""
    if isinstance(value, tuple | list):
        return all(map(_is_constant, value))
    if isinstance(value, Mapping):
        return all(map(_is_constant, value.values()))
    return value is None or isinstance(value, bool | float | str)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else -1
