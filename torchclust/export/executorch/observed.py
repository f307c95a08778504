"""The traced model with the backend's observers in it, and its layers as values.

PyTorch's quantization works on a graph: the backend's quantizer says which values are rounded,
an observer is placed on each, samples run through, and the observers answer with scale and zero
point. BatchNorm is folded before that, so the weights found here are those of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from torchclust.export.backends import ExportError, first_line, quietly
from torchclust.export.codes import Array
from torchclust.export.executorch import packages
from torchclust.export.executorch.averages import average_by_sum
from torchclust.export.executorch.clipping import clipped
from torchclust.export.executorch.paddings import pad_inside
from torchclust.export.layout import Prepared
from torchclust.export.rewrites.nodes import operator

# The axis of output channels in torch's layout of the weight.
_CHANNEL_AXIS = {"conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0, "conv_transpose2d": 1}
# The backend's default floors weight scales at 2**-16, where a folded BatchNorm may well lie.
_LEAST_WEIGHT_STEP = 1e-30


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer of the observed graph.

    ``weight`` and ``bias`` are the graph's own tensors; ``observers`` those of its input, its
    weight and its result, the last None where the result stays in float.
    """

    weight: Tensor
    bias: Tensor | None
    channel_axis: int
    observers: tuple[Any, Any, Any | None]

    @property
    def matrix(self) -> Array:
        """The weight as (output channels, spatial..., inputs), flattened to two dimensions."""
        moved = np.moveaxis(self.weight.detach().numpy(), self.channel_axis, 0)
        return np.moveaxis(moved, 1, -1).reshape(len(moved), -1)

    def write(self, matrix: Array) -> None:
        """Overwrite the weight in the graph."""
        moved = np.moveaxis(self.weight.detach().numpy(), self.channel_axis, 0)
        moved[...] = np.moveaxis(matrix.reshape(np.moveaxis(moved, 1, -1).shape), -1, 1)


def observe(prepared: Prepared, compile_spec: Any) -> fx.GraphModule:
    """Trace the model and place observers where the backend will round.

    Weights and activations get plain minimum and maximum observers, as in a .tflite file; the
    backend's histograms cost a search for every tensor.

    Raises:
        ExportError: shapes that depend on the data; a model that PT2E cannot prepare.
    """
    pt2e = packages.load("torchao.quantization.pt2e.quantize_pt2e")
    graph = trace(prepared.module, prepared.example).module(check_guards=False)
    average_by_sum(graph)
    pad_inside(graph)
    try:
        with quietly(), torch.no_grad():
            observed = pt2e.prepare_pt2e(graph, _quantizer(compile_spec))
    except Exception as error:
        raise ExportError(
            f"the Ethos-U quantizer cannot take {type(prepared.original).__name__}: "
            f"{first_line(error)}"
        ) from error
    assert isinstance(observed, fx.GraphModule)
    return observed


def trace(module: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """``torch.export`` with static shapes.

    Raises:
        ExportError: names the operator and module where a shape is not static.
    """
    with quietly(), torch.no_grad():
        program = torch.export.export(module, example)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            made_by = module_of(node) or "the model itself"
            raise ExportError(
                f"{operator(node) or node.name} in {made_by} gives a shape that depends on the "
                f"data, {tuple(map(str, value.shape))}; an Ethos-U program is planned ahead and "
                "needs fixed shapes. Export the part of the model before it"
            )
    return program


def layers(observed: fx.GraphModule) -> Iterator[Layer]:
    """Every convolution and linear layer whose weight the backend rounds, in order."""
    for node in observed.graph.nodes:
        axis = _CHANNEL_AXIS.get(operator(node))
        if axis is None or not all(_is_observer(n) for n in node.args[:2]):
            continue
        inputs, weight = (observed.get_submodule(str(n.target)) for n in node.args[:2])
        bias = node.args[2] if len(node.args) > 2 else None
        yield Layer(
            _constant(observed, node.args[1].args[0]),
            None if bias is None else _constant(observed, bias),
            axis,
            (inputs, weight, _result_observer(observed, node)),
        )


def other_sizes(observed: fx.GraphModule) -> Iterator[int]:
    """Sizes of the parameters that belong to no such layer, such as an embedding's table."""
    weights = [layer.weight for layer in layers(observed)]
    for node in observed.graph.nodes:
        if node.op == "get_attr":
            value = _constant(observed, node)
            if value.ndim > 1 and all(value is not weight for weight in weights):
                yield value.numel()


def observers(observed: fx.GraphModule) -> dict[str, nn.Module]:
    """Observers of activations, by the name of the operator whose result they see.

    What is clipped at once is left out.
    """
    hidden = clipped(observed)
    return {
        str(node.args[0].name): observed.get_submodule(str(node.target))
        for node in observed.graph.nodes
        if _is_observer(node) and node.args[0].op != "get_attr" and str(node.target) not in hidden
    }


def module_of(node: fx.Node) -> str | None:
    """The path of the torch module that made a node, as the user knows it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [
        str(path).removeprefix("L['self'].").removeprefix("model.") for path, _ in stack.values()
    ]
    inner = [path for path in paths if path not in ("", "model", "traced")]
    return inner[-1] if inner else None


def _quantizer(compile_spec: Any) -> Any:
    backend = packages.load("executorch.backends.arm.quantizer")
    pt2e = packages.load("torchao.quantization.pt2e")
    config = backend.get_symmetric_quantization_config()
    activation = dataclasses.replace(
        config.input_activation,
        observer_or_fake_quant_ctr=pt2e.MinMaxObserver.with_args(eps=2**-16),
    )
    weight = dataclasses.replace(
        config.weight,
        observer_or_fake_quant_ctr=pt2e.PerChannelMinMaxObserver.with_args(eps=_LEAST_WEIGHT_STEP),
    )
    chosen = dataclasses.replace(
        config, input_activation=activation, output_activation=activation, weight=weight
    )
    return backend.EthosUQuantizer(compile_spec).set_global(chosen)


def _is_observer(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module"


def _constant(observed: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter that a node reads, behind its observer if it has one."""
    source = node.args[0] if _is_observer(node) else node
    assert isinstance(source, fx.Node)
    owner, _, name = str(source.target).rpartition(".")
    value: Tensor = getattr(observed.get_submodule(owner), name)
    return value


def _result_observer(observed: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The observer of a layer's result, behind the activation that is fused into it."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _is_observer(node):
            return observed.get_submodule(str(node.target))
    return None
