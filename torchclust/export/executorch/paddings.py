"""Zeros that a model puts around a map before a convolution, taken into the convolution.

The backend leaves them a map of their own, and Vela copies the map for every side that is padded:
a fifth of all cycles in MobileNetV1 with explicit paddings. Torch's convolutions pad both sides
alike, so what other frameworks call "same" at stride 2 stays a copy.
"""

from __future__ import annotations

from torch import fx

from torchclust.export.rewrites.nodes import arguments, operator


def pad_inside(graph: fx.GraphModule) -> None:
    """Give every two-dimensional convolution the zeros around its input as padding, in place."""
    for node in graph.graph.nodes:
        zeros = _zeros_around(node.args[0]) if _pads_by_numbers(node) else None
        if zeros is None:
            continue
        padded, given = node.args[0], arguments(node)
        inside = [own + more for own, more in zip(given["padding"], zeros, strict=True)]
        node.args = tuple({**given, "input": padded.args[0], "padding": inside}.values())
        node.kwargs = {}
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _pads_by_numbers(node: fx.Node) -> bool:
    return str(node.target) == "aten.conv2d.default"


def _zeros_around(node: fx.Node) -> tuple[int, int] | None:
    """How many rows and columns of zeros a node adds on either side of a map."""
    if operator(node) != "pad":
        return None
    given = arguments(node)
    if given["mode"] != "constant" or given["value"] or len(given["pad"]) != 4:
        return None
    left, right, top, bottom = given["pad"]
    alike = left == right >= 0 and top == bottom >= 0
    return (top, left) if alike else None
