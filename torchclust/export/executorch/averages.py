"""Averages over a whole map, as sums: so they get a scale of their own.

The backend gives an average its input's scale. An average's range is much smaller, so the layer
behind it, often the classifier, would read a few coarse steps. A sum is rounded once, from 32 bits
to a scale of its own; times 1/N it keeps its codes.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from torchclust.export.rewrites.nodes import operator


def average_by_sum(graph: fx.GraphModule) -> None:
    """Replace every average over a whole map in a traced model, in place."""
    for node in list(graph.graph.nodes):
        dims = _averaged(node)
        if not dims:
            continue
        source, keep = node.args[0], node.meta["val"].ndim == node.args[0].meta["val"].ndim
        count = math.prod(source.meta["val"].shape[dim] for dim in dims)
        with graph.graph.inserting_before(node):
            total = graph.graph.call_function(
                torch.ops.aten.sum.dim_IntList, (source, list(dims), keep)
            )
            average = graph.graph.call_function(torch.ops.aten.mul.Tensor, (total, 1 / count))
        total.meta, average.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(average)
        graph.graph.erase_node(node)
    graph.recompile()


def _averaged(node: fx.Node) -> tuple[int, ...]:
    """The dimensions over which a node averages all there is; none for any other operator.

    A pooling of the whole map is adaptive by now (`torchclust.export.rewrites.pooling`).
    """
    name = operator(node)
    if name == "mean" and len(node.args) > 1 and not node.kwargs:
        return tuple(node.args[1])  # type: ignore[arg-type]
    whole = name == "adaptive_avg_pool2d" and node.meta["val"].shape[-2:].numel() == 1
    return (-2, -1) if whole else ()
