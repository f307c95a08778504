"""Which rule looks at which operator, and in what order a traced model is rewritten."""

from __future__ import annotations

from torch import fx

from torchclust.export.rewrites import activations, maps, pooling, resizing, strided, transposed
from torchclust.export.rewrites.affine import merge_affine
from torchclust.export.rewrites.flattened import permute_flattened
from torchclust.export.rewrites.norms import fold_batch_norm, keep_shared_values
from torchclust.export.rewrites.traced import Substitute, Traced, operator


def unchecked(traced: Traced, node: fx.Node) -> Substitute:
    """Nothing, for the trace's assertion that pixels are uint8: the file's are quantized floats."""
    return lambda *_, **__: None


# By the operator's name, without the underscore of those that work in place.
RULES = {
    "_assert_tensor_metadata": unchecked,
    "abs": activations.absolute,
    "adaptive_avg_pool2d": pooling.adaptive_avg_pool,
    "adaptive_max_pool2d": pooling.adaptive_max_pool,
    "amax": pooling.largest,
    "avg_pool2d": pooling.avg_pool,
    "clamp": activations.clamp,
    "conv_transpose1d": transposed.conv_transpose,
    "conv_transpose2d": transposed.conv_transpose,
    "div": maps.over_length,
    "elu": activations.elu,
    "hardtanh": activations.clamp,
    "leaky_relu": activations.leaky_relu,
    "max_pool2d": pooling.max_pool,
    "mean": maps.mean,
    "mish": activations.mish,
    "linalg_vector_norm": maps.norm,
    "prelu": activations.prelu,
    "rsub": activations.reversed_difference,
    "selu": activations.selu,
    "sqrt": maps.root,
    "std": maps.deviation,
    "sum": maps.total,
    "upsample_nearest2d": resizing.nearest,
}
# For int8 files: right to within a step, or for the sake of what compiles them.
INT8_RULES = {
    "conv1d": strided.convolution,
    "conv2d": strided.convolution,
    "log_sigmoid": activations.log_sigmoid,
    "softplus": activations.softplus,
}


def rewrite(traced: Traced, *, float_file: bool) -> None:
    """Choose the substitutes of a traced model.

    Args:
        traced: gets them, and the order of columns.
        float_file: whether shared values have to stay apart from BatchNorms, in a float file.
    """
    permute_flattened(traced)
    fold_batch_norm(traced)
    if float_file:
        keep_shared_values(traced)
    merge_affine(traced)
    rules = RULES if float_file else {**RULES, **INT8_RULES}
    for node in traced.nodes:
        rule = rules.get(operator(node).rstrip("_"))
        substitute = None if rule is None or node in traced.substitutes else rule(traced, node)
        if substitute is not None:
            traced.substitutes[node] = substitute
