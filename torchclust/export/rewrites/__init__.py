"""What converter, quantizer or accelerator cannot take as torch says it, said otherwise.

`Traced` holds the model's trace and what stands in for its operators; each module here has the
rules of one kind. Every substitute computes what the operator computed, but for rounding.
"""

from __future__ import annotations

from torchclust.export.rewrites import maps
from torchclust.export.rewrites.flattened import permute_flattened
from torchclust.export.rewrites.norms import fold_batch_norm, keep_shared_values
from torchclust.export.rewrites.traced import Traced, operator

# By the operator's name, without a trailing underscore for work in place.
_RULES = {
    "mean": maps.mean,
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
    for node in traced.nodes:
        rule = _RULES.get(operator(node).rstrip("_"))
        substitute = None if rule is None or node in traced.substitutes else rule(traced, node)
        if substitute is not None:
            traced.substitutes[node] = substitute
