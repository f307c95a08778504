"""Values that a ReLU clips at once, such as a residual sum: only what it lets through is observed.

The backend rounds them to the ReLU's scale. Their negative half would take its share of the 255
codes, and nobody reads it: rounding saturates, at the very value where the ReLU clips. A .tflite
file has the ReLU inside the addition, to the same effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx, nn

from torchclust.export.rewrites.nodes import operator

_CLIPPING = ("relu", "relu_", "hardtanh", "hardtanh_", "clamp")


def clipped(observed: fx.GraphModule) -> tuple[str, ...]:
    """The names of observers that see what is clipped at once.

    An observer that the clipped value does not share is none of them: it would see nothing at all.
    """
    found = []
    for node in observed.graph.nodes:
        before = node.args[0] if operator(node) in _CLIPPING else None
        if before is None or before.op != "call_module" or len(before.users) > 1:
            continue
        source = before.args[0]
        if source.op != "call_function" or len(source.users) > 1:
            continue
        shared = observed.get_submodule(str(before.target))
        after = (str(user.target) for user in node.users if user.op == "call_module")
        if any(observed.get_submodule(name) is shared for name in after):
            found.append(str(before.target))
    return tuple(found)


@contextlib.contextmanager
def looking_behind(observed: fx.GraphModule) -> Iterator[None]:
    """Let no observer see what is clipped at once while samples run."""
    kept = {name: observed.get_submodule(name) for name in clipped(observed)}
    for name in kept:
        setattr(observed, name, nn.Identity())
    try:
        yield
    finally:
        for name, observer in kept.items():
            setattr(observed, name, observer)
