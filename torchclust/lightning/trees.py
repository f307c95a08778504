"""Lightning under its two names: ``lightning`` and ``pytorch_lightning``, one or both installed.

They hold the same classes twice, as two trees that know nothing of each other: a Trainer of one
refuses a module of the other. A callback can belong to both; for anything else the tree is the one
that an object at hand comes from.
"""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

TREES = ("pytorch_lightning", "lightning.pytorch")


@functools.cache
def installed() -> tuple[ModuleType, ...]:
    """The trees that can be imported, the first of them being the one for new objects.

    Raises:
        ImportError: there is none.
    """
    found = [name for name in TREES if _is_there(name.partition(".")[0])]
    if not found:
        raise ImportError(
            'torchclust.lightning needs PyTorch Lightning:  pip install "torchclust[lightning]"'
        )
    known = sorted(found, key=lambda name: name not in sys.modules)
    first = importlib.import_module(known[0])
    # Both trees tell the package that they share to log in their own name: the first one's stays.
    shared: Any = importlib.import_module("lightning_utilities.core.rank_zero")
    log = shared.log
    trees = {known[0]: first, **{name: importlib.import_module(name) for name in known[1:]}}
    shared.log = log
    return tuple(trees[name] for name in found)


def tree_of(value: object) -> ModuleType | None:
    """The tree that an object or a class comes from; None if from neither."""
    classes = (value if isinstance(value, type) else type(value)).__mro__
    for name in TREES:
        if any(f"{cls.__module__}.".startswith(f"{name}.") for cls in classes):
            return importlib.import_module(name)
    return None


def of_all(name: str) -> tuple[type[Any], ...]:
    """The class of that dotted name in every installed tree, for ``isinstance``."""
    return tuple(_found_in(tree, name) for tree in installed())


def is_overridden(hook: str, module: object) -> bool:
    """Whether a module has a hook of its own, by its own tree's judgement."""
    tree = tree_of(module) or installed()[0]
    return bool(_found_in(tree, "utilities.model_helpers.is_overridden")(hook, module))


def _is_there(package: str) -> bool:
    """Whether a package is installed; Python finds any folder called ``lightning`` too."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _found_in(tree: ModuleType, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), tree)


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning.utilities import rank_zero_info as rank_zero_info
    from pytorch_lightning.utilities import rank_zero_warn as rank_zero_warn
else:
    # Of every tree at once: a Trainer calls hooks by their names, LightningCLI asks for a subclass.
    Callback = type("Callback", of_all("Callback"), {"__module__": __name__})
    # The same functions in both trees, from a package that these share.
    rank_zero_info = _found_in(installed()[0], "utilities.rank_zero_info")
    rank_zero_warn = _found_in(installed()[0], "utilities.rank_zero_warn")
