"""Label-free recovery: a clustered model learns its float teacher's outputs, block by block."""

from torchclust.distillation.distill import distill_

__all__ = ["distill_"]
