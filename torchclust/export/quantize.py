"""From the float file to int8: the quantizer does the work, the weights' scales are ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from torchclust.export import backends
from torchclust.export.backends import ExportError
from torchclust.export.calibration import Range
from torchclust.export.clustered import Placed
from torchclust.export.codes import LARGEST, Matched
from torchclust.export.container import inline_buffers
from torchclust.export.ends import InputDtype, with_integer_ends
from torchclust.export.graph import Array, Graph, Operator, Weight
from torchclust.export.large_weights import put_back, set_aside
from torchclust.export.sandwiches import without_sandwiches

# Biases are int32 in units of input scale x weight scale, and the accumulator shares the range.
_BIAS_LIMIT = 2.0**30
# The quantizer takes no smaller one (its bound on a range is 1e-9).
_LEAST_SCALE = 1e-11
# Constants of these get one scale for the tensor, and the quantizer chooses it.
_PER_TENSOR = ("GATHER", "BATCH_MATMUL")


def quantize(
    content: bytearray,
    graph: Graph,
    placed: Sequence[Placed[Weight]],
    observed: Mapping[str, Range],
    input_dtype: InputDtype = "int8",
) -> bytes:
    """Quantize a float file: int8 weights per channel, int8 activations, int8 in and out.

    Args:
        content: the float file; clustered weights are overwritten by exact multiples of their
            scales, so ``graph`` must have been read from this very object.
        graph: the file, parsed.
        placed: its clustered weights.
        observed: activation ranges by tensor name.
        input_dtype: what the file takes.
    """
    scales = _set_weights(graph, placed, observed)
    ranges = {
        tensor.name: {
            "min": np.full((1,) * len(tensor.shape), observed[tensor.name][0], np.float32),
            "max": np.full((1,) * len(tensor.shape), observed[tensor.name][1], np.float32),
        }
        for tensor in graph.tensors
        if tensor.name in observed
    }
    for weight in graph.weights():
        scale = scales.get(weight.tensor.index)
        if scale is not None:
            bound = weight.by_channel(LARGEST * scale)
            ranges[weight.tensor.name] = {"min": -bound, "max": bound}
    small, large = set_aside(content, graph, scales)
    quantizer, recipe, types = backends.quantizer()
    try:
        with backends.quietly():
            work = quantizer.Quantizer(small, recipe.static_wi8_ai8())
            if large:  # it would make the float file ready to run, whose shapes do not fit
                work._ensure_model_qsv_sufficient = lambda _: None
            # A constant factor gets one scale: LiteRT reads only the first.
            work.add_static_config(
                ".*", types.TFLOperationName.BATCH_MATMUL, 8, 8, types.QuantGranularity.TENSORWISE
            )
            # The static recipe leaves tables in float; this stores them as int8, one scale a row.
            work.add_dynamic_config(".*", types.TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
            result = work.quantize(ranges, enable_progress_report=False)
    except Exception as error:
        raise ExportError(
            f"the quantizer cannot quantize this model: {backends.first_line(error)}"
        ) from error
    inlined = put_back(inline_buffers(bytes(result.quantized_model)), large)
    return without_sandwiches(with_integer_ends(inlined, observed, input_dtype))


def within_range(
    graph: Graph, placed: Sequence[Placed[Weight]], observed: Mapping[str, Range]
) -> list[Placed[Weight]]:
    """Clustered weights whose scales keep bias and rescaling inside 32 bits.

    A channel that gets a larger scale for that gets the smaller ones of its codes with it, as an
    unclustered one does: what is left of its weights is below a step.
    """
    return [
        dataclasses.replace(p, matched=_raised(p.matched, _least_scales(graph, p.weight, observed)))
        if p.weight.operator.name != "EMBEDDING_LOOKUP"
        else p
        for p in placed
    ]


def _raised(matched: Matched, least: Array) -> Matched:
    scales, least = matched.scales, np.broadcast_to(least, matched.scales.shape)
    rows = np.flatnonzero(least > scales)
    if not len(rows):
        return matched
    codes = matched.codes.copy()
    for row in rows:
        shared = np.unique(matched.codes[matched.groups == matched.groups[row]])
        target = matched.codes[row].astype(np.float64) * (scales[row] / least[row])
        codes[row] = shared[np.abs(shared[:, None] - target).argmin(0)]
    return dataclasses.replace(matched, codes=codes, scales=np.maximum(scales, least))


def _least_scales(graph: Graph, weight: Weight, observed: Mapping[str, Range]) -> Array:
    least = np.zeros(1)
    for operator in graph.users(weight.tensor):
        least = np.maximum(least, _least_scale(graph, operator, observed))
    return least


def _set_weights(
    graph: Graph, placed: Sequence[Placed[Weight]], observed: Mapping[str, Range]
) -> dict[int, Array]:
    """Choose every weight's scales and write clustered weights as exact multiples of them.

    Returns ``{tensor index: (channels,) float32}``. A channel that BatchNorm shrank to next to
    nothing gets a scale under which its bias still fits into 32 bits.
    """
    clustered = {p.weight.tensor.index: p.matched for p in placed}
    scales = {}
    for weight in graph.weights():
        if weight.tensor.dtype != "float32" or weight.operator.name in _PER_TENSOR:
            continue
        matched = clustered.get(weight.tensor.index)
        scale = np.abs(weight.matrix).max(axis=1) / LARGEST if matched is None else matched.scales
        if weight.operator.name == "EMBEDDING_LOOKUP":
            scale = _table_scale(weight, matched, scale)
        scale = np.maximum(scale, _least_scales(graph, weight, observed)).astype(np.float32)
        scales[weight.tensor.index] = scale
        if matched is not None:
            weight.write(scale[:, None] * matched.codes)
    return scales


def _table_scale(weight: Weight, matched: Matched | None, scale: Array) -> Array:
    """One scale for all rows of a table, where its codes allow it: tflite-micro reads only one."""
    if matched is None:
        return np.full_like(scale, scale.max())
    if matched.trained.symmetric or len(np.unique(matched.groups)) > 1:
        return scale
    codes = matched.codes.astype(np.float64)
    return np.full_like(scale, (weight.matrix * codes).sum() / max(1.0, np.square(codes).sum()))


def _least_scale(graph: Graph, operator: Operator, observed: Mapping[str, Range]) -> Array:
    return least_scale(
        graph.bias(operator),
        _step(observed.get(graph.activation(operator).name)),
        _step(observed.get(graph.tensors[operator.outputs[0]].name)),
    )


def least_scale(bias: Array | None, step_in: float, step_out: float) -> Array:
    """The smallest scale per channel that keeps bias and rescaling inside 32 bits.

    The bias is stored in units of input scale x weight scale, and the result is rescaled by
    input scale x weight scale / output scale; a scale far below both overflows the one and
    underflows the other, and what such a channel adds to its bias is far below one step anyway.
    """
    largest = np.zeros(1) if bias is None else np.abs(bias.reshape(-1))
    least = np.maximum(largest, step_out) / (step_in * _BIAS_LIMIT) if step_in else 0.0
    return np.maximum(least, _LEAST_SCALE)


def _step(observed: Range | None) -> float:
    """The int8 step of an activation; its range always includes 0."""
    if observed is None:
        return 0.0
    return (max(observed[1], 0.0) - min(observed[0], 0.0)) / 255
