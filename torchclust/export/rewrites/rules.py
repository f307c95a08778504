"""Which rule looks at which operator, and in what order a traced model is rewritten."""

from __future__ import annotations

from torch import fx

from torchclust.export.rewrites import (
    activations,
    maps,
    maxima,
    pooling,
    products,
    repeats,
    resizing,
    statistics,
    strided,
    transposed,
)
from torchclust.export.rewrites.affine import merge_affine
from torchclust.export.rewrites.constants import fold_constants
from torchclust.export.rewrites.flattened import permute_flattened
from torchclust.export.rewrites.nodes import Substitute, is_integer, operator
from torchclust.export.rewrites.norms import fold_batch_norm, keep_shared_values
from torchclust.export.rewrites.traced import Traced


def unchecked(traced: Traced, node: fx.Node) -> Substitute:
    """Nothing, for the trace's assertion that pixels are uint8: the file's are quantized floats."""
    return lambda *_, **__: None


# By the operator's name, without the underscore of those that work in place.
RULES = {
    "_assert_tensor_metadata": unchecked,
    "abs": activations.absolute,
    "adaptive_avg_pool2d": pooling.adaptive_avg_pool,
    "adaptive_max_pool1d": pooling.adaptive_max_pool,
    "adaptive_max_pool2d": pooling.adaptive_max_pool,
    "amax": maxima.amax,
    "avg_pool1d": pooling.avg_pool,
    "avg_pool2d": pooling.avg_pool,
    "bmm": products.product,
    "broadcast_to": repeats.expand,
    "celu": activations.celu,
    "clamp": activations.clamp,
    "clip": activations.clamp,
    "conv1d": strided.same,
    "conv_transpose1d": transposed.conv_transpose,
    "conv_transpose2d": transposed.conv_transpose,
    "cosine_similarity": maps.cosine,
    "div": maps.over_length,
    "elu": activations.elu,
    "expand": repeats.expand,
    "expand_as": repeats.expand,
    "group_norm": statistics.group_norm,
    "hardtanh": activations.clamp,
    "instance_norm": statistics.instance_norm,
    "layer_norm": statistics.layer_norm,
    "leaky_relu": activations.leaky_relu,
    "matmul": products.product,
    "max": maxima.max_dim,
    "max_pool1d": pooling.max_pool,
    "max_pool2d": pooling.max_pool,
    "mean": maps.mean,
    "minimum": activations.minimum,
    "mish": activations.mish,
    "mm": products.product,
    "linalg_vector_norm": maps.norm,
    "pad": repeats.pad,
    "pow": maps.power,
    "prelu": activations.prelu,
    "repeat": repeats.repeat,
    "repeat_interleave": repeats.repeat_interleave,
    "rms_norm": statistics.rms_norm,
    "rrelu": activations.rrelu,
    "rsub": activations.reversed_difference,
    "selu": activations.selu,
    "softmax": activations.softmax,
    "softshrink": activations.softshrink,
    "sqrt": maps.root,
    "std": maps.deviation,
    "sum": maps.total,
    "tile": repeats.repeat,
    "upsample_nearest1d": resizing.nearest_in_a_row,
    "upsample_nearest2d": resizing.nearest,
    "var": maps.variance,
    "var_mean": maps.variance_and_mean,
}
# For int8 files: right to within a step, or for the sake of what compiles them.
INT8_RULES = {
    "conv1d": strided.same_or_wide,
    "conv2d": strided.wide,
    "log_sigmoid": activations.log_sigmoid,
    "softplus": activations.softplus,
}


def rewrite(traced: Traced, *, float_file: bool) -> None:
    """Choose the substitutes of a traced model.

    Args:
        traced: gets them, and the order of columns.
        float_file: whether shared values have to stay apart from BatchNorms, in a float file.
    """
    fold_constants(traced)
    permute_flattened(traced)
    rules = RULES if float_file else {**RULES, **INT8_RULES}
    fold_batch_norm(traced, rules)
    if float_file:
        keep_shared_values(traced)
    merge_affine(traced)
    for node in traced.nodes:
        rule = rules.get(operator(node).rstrip("_"))
        left_alone = rule is None or node in traced.substitutes or is_integer(node)
        substitute = None if rule is None or left_alone else rule(traced, node)
        if substitute is not None:
            traced.substitutes[node] = substitute
