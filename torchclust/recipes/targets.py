"""What a recipe names as ``module.Class``: found, called with the keys that it takes."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from torchclust.recipes.section import RecipeError, nearest

_NOT_THE_USERS = (
    Path(__file__).parents[1],
    Path(torch.__file__).parents[1],
    Path(inspect.__file__).parent,
)
_SOURCES: WeakKeyDictionary[ModuleType, bytes | None] = WeakKeyDictionary()


def import_target(key: str, target: str, folder: str | None) -> Callable[..., Any]:
    """Import what a recipe's key names.

    As for a script, modules in its folder are found: the recipe's folder, then the folder where
    the command runs.
    """
    for place in (str(Path.cwd()), *([str(Path(folder).resolve())] if folder else ())):
        if place not in sys.path:
            sys.path.insert(0, place)
    module, _, attribute = target.rpartition(".")
    kind = "module.function" if key == "score" else "package.module.Class"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"{key}: cannot import {target!r}: {error} (expected {kind}, "
            "importable from the recipe's folder or where you run, or installed)"
        ) from error
    if not callable(found):
        raise RecipeError(f"{key}: {target} is {found!r}, which can not be called")
    call: Callable[..., Any] = found
    return call


def called(section: str, label: str, function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call what a section names with the section's other keys."""
    check_arguments(section, label, function, given)
    try:
        return function(**given)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{section}: {label} can not be built: {told(error)}") from error


def check_arguments(
    section: str, label: str, function: Callable[..., Any], given: dict[str, Any]
) -> None:
    """Refuse keys that are no parameters of `function`, naming the nearest that is."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    valid = [name for name in parameters if name not in ("input_shape", "n_classes")]
    for key in given:
        if key not in parameters:
            raise RecipeError(
                f"unknown key {section}.{key}: {label} takes "
                + (f"no such argument; {nearest(key, valid)}" if valid else "no arguments")
            )
    for key, parameter in parameters.items():
        fixed = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if fixed and parameter.default is parameter.empty and key not in given:
            raise RecipeError(f"{label} needs {section}.{key}:  --set {section}.{key}=...")


def told(error: BaseException) -> str:
    """Return an error's kind, its first line, and where in the user's own code it came up."""
    where, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_file() and not any(place in file.parents for place in _NOT_THE_USERS):
            where = f" ({file.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[0].split())}{where}"


def digest_of(function: Callable[..., Any]) -> str:
    """Return a digest of a target's source and of what that imports of the user's own code.

    Names stay where code changes. The source is that of when it was first asked for, soon after the
    import: a file that is edited meanwhile does not change what runs here.
    """
    digest = hashlib.sha256()
    start = inspect.getmodule(inspect.unwrap(function))
    for name, source in sorted(_sources(start).items() if start else ()):
        digest.update(name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()


def _sources(start: ModuleType) -> dict[str, bytes]:
    """The sources of a module and of those of the user's that it imports, directly or not."""
    found: dict[str, bytes] = {}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        source = None if module.__name__ in found else _source(module)
        if source is not None:
            found[module.__name__] = source
            waiting += [sys.modules[n] for n in _imported(module, source) if n in sys.modules]
    return found


def _source(module: ModuleType) -> bytes | None:
    """A module's source as it was when first seen; None if it is none of the user's."""
    if module not in _SOURCES:
        file = Path(getattr(module, "__file__", None) or "")
        is_users = file.is_file() and not any(place in file.parents for place in _NOT_THE_USERS)
        _SOURCES[module] = file.read_bytes() if is_users else None
    return _SOURCES[module]


def _imported(module: ModuleType, source: bytes) -> Iterator[str]:
    """Names of what a module's import statements may mean: modules, packages, things in them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # compiled, or no Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            if node.level:
                package = importlib.util.resolve_name(package, module.__package__)
            names = [package, *(f"{package}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from itertools.accumulate(name.split("."), "{}.{}".format)
