"""Weight clustering for PyTorch, from a trained model to the compressed int8 file.

Everything a user calls is a name of this package; the heavy parts (`torchclust.lightning`,
`torchclust.export`) are imported when they are used.
"""

from torchclust.codebook import Codebook, fit_codebook
from torchclust.config import ClusterConfig
from torchclust.distillation import distill_
from torchclust.model import (
    Clustering,
    cluster_,
    is_clustered,
    named_clusterings,
    refit_,
    restore_,
    strip_,
)
from torchclust.packed_sections import PackedFileError
from torchclust.packed_size import PackedSize
from torchclust.packing import load_packed_, save_packed
from torchclust.report import Summary, summary
from torchclust.sensitivity import fisher_information

__version__ = "0.1.0"

__all__ = [
    "ClusterConfig",
    "Clustering",
    "Codebook",
    "PackedFileError",
    "PackedSize",
    "Summary",
    "cluster_",
    "distill_",
    "fisher_information",
    "fit_codebook",
    "is_clustered",
    "load_packed_",
    "named_clusterings",
    "refit_",
    "restore_",
    "save_packed",
    "strip_",
    "summary",
]
