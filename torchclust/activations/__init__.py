"""Training with activations rounded as the int8 graph will round them (TFMOT's CQAT).

`quantize_activations_` starts it, `activation_ranges` reads what was learned.
"""

from torchclust.activations.quantized import (
    activation_ranges,
    quantize_activations_,
    remove_quantized_activations_,
)

__all__ = ["activation_ranges", "quantize_activations_", "remove_quantized_activations_"]
