"""Clustering inside a Lightning training run: here is decided when, other rooms do the work."""

from torchclust.lightning.callback import WeightClustering
from torchclust.lightning.options import Options

__all__ = ["Options", "WeightClustering"]
