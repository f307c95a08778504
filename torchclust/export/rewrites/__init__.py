"""What converter, quantizer or accelerator cannot take as torch says it, said otherwise.

`traced.Traced` holds the model's trace and what stands in for its operators; each module has the
rules of one kind. Every substitute computes what the operator computed, but for rounding.
"""
