"""Whether a float file computes what the model computes, and if not, which operator does not.

The converter has errors of its own; it does not say so, and neither does the quantizer. A right
file agrees with torch to 99 decibels and more, so one sample tells.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from torchclust.export.backends import ExportError
from torchclust.export.graph import Array, Graph
from torchclust.export.layout import Prepared, module_of
from torchclust.export.rewrites.nodes import operator, shape
from torchclust.export.runner import Runner
from torchclust.export.verify import sqnr

_LEAST_DB = 50.0
_TOLERANCE = 1e-3  # of a tensor's largest magnitude, by which torch and the file may differ
_PARTS = 64  # of a tensor, whose sorted values are compared
_OVER_FRAMES = ("conv3d", "conv_transpose3d", "max_pool3d")


def check_layers(prepared: Prepared) -> None:
    """Refuse what the converter fails on or the quantizer leaves in float: layers over frames.

    Raises:
        ExportError: names the module and what to write in its place.
    """
    for node in prepared.module.traced.nodes:
        name = operator(node)
        if name in _OVER_FRAMES:
            raise ExportError(
                f"{_module_path(node) or 'the model'!r} calls {name!r}, which has no int8 form: "
                f"kernels have two dimensions. Over all of its D frames it is a 2-D layer of D * C "
                f"channels; over a few of them, one 2-D layer for each place"
            )


def check_float(prepared: Prepared, content: bytes, graph: Graph, sample: Sequence[Tensor]) -> None:
    """Compare a float file's outputs with the model's on one sample.

    Args:
        prepared: the model.
        content, graph: the float file and its parsed form.
        sample: in the model's layout.

    Raises:
        ExportError: they differ; the message names the operator that the converter got wrong.
    """
    run = Runner(content, keep_all=True, reference=False)
    answers = run(prepared.to_file_layout(sample))
    wanted = [y.numpy() for y in prepared.reference(sample)]
    worst = min(
        (sqnr([(want, got)]) for want, got in zip(wanted, answers, strict=True)), default=np.inf
    )
    if worst >= _LEAST_DB:
        return
    made = [run.tensor(i) for o in graph.operators for i in o.outputs]
    raise ExportError(
        f"the converter makes another function of this model: its float file agrees with torch to "
        f"{worst:.1f} dB only, where 99 and more are usual. {_blame(prepared, sample, made)}"
    )


def check_operators(prepared: Prepared, graph: Graph) -> None:
    """Refuse what the quantizer fails on with an index error: operators with graphs of their own.

    Raises:
        ExportError: names the operator and, where the tensor's name tells, the module.
    """
    for made in graph.operators:
        if made.name.startswith("STABLEHLO_") or made.name in ("WHILE", "IF"):
            path = module_of(graph.tensors[made.outputs[0]].name, prepared.module)
            where = f"module {path!r} becomes" if path else "an operator of the model becomes"
            raise ExportError(
                f"{where} {made.name}, which has no int8 form. Usual causes are "
                f"LocalResponseNorm, AvgPool3d, cumsum and sorting: write it otherwise, or keep it "
                f"outside"
            )


def layer_of(error: str, prepared: Prepared) -> str | None:
    """The module whose operator a converter's error speaks of, from the shape that it shows."""
    found = re.findall(r'"\w+\.(\w+)".*-> tensor<([\dx]+)x\w+>', error)
    kind, dims = found[-1] if found else ("", "")
    pixels = {int(n) for n in dims.split("x")[1:-1]} if dims else set()
    for node in prepared.module.traced.nodes:
        if kind[:4] and kind[:4] in operator(node) and pixels and pixels <= set(shape(node)):
            return _module_path(node) or None
    return None


def _blame(prepared: Prepared, sample: Sequence[Tensor], made: Sequence[Array]) -> str:
    """The first operator whose values, and those of all that follow, are not in the file."""
    traced = prepared.module.traced
    with torch.no_grad():
        values = traced.values(sample)
    known = [(a.size, _fingerprint(a)) for a in made if a.dtype.kind == "f"]
    right: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if any(user in right for user in node.users) or (
            node in values and _is_among(values[node].numpy(), known)
        ):
            right.add(node)
    for node in traced.nodes:
        if node in values and node not in right:
            path = _module_path(node)
            where = f"in module {path!r}" if path else "in the model's own forward"
            return (
                f"The first operator that it gets wrong is {node.target} {where}. Write that layer "
                f"otherwise, or keep it outside"
            )
    return "Every operator alone is right; please report this with the model"


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("model").lstrip(".") if stack else ""


def _is_among(value: Array, made: Sequence[tuple[int, Array]]) -> bool:
    mine = _fingerprint(value)
    peak = float(np.abs(value).max(initial=0.0))
    return any(
        size == value.size and np.abs(other - mine).max() <= _TOLERANCE * peak
        for size, other in made
    )


def _fingerprint(values: Array) -> Array:
    """Quantiles: the same in whatever order the values stand."""
    ordered = np.sort(values, axis=None).astype(np.float32)
    places = np.linspace(0, max(0, ordered.size - 1), min(_PARTS, max(1, ordered.size)))
    return ordered[np.rint(places).astype(np.int64)] if ordered.size else np.zeros(1, np.float32)
