"""Clustering inside a Lightning training run: here is decided when, other rooms do the work."""

from torchclust.lightning.callback import Options, WeightClustering

__all__ = ["Options", "WeightClustering"]
