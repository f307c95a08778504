"""Weight clustering for PyTorch, from a trained model to the compressed int8 file.

Everything a user calls is a name of this package. Each is imported, and torch with it, when it is
first used (PEP 562), so that ``import torchclust`` and ``torchclust --help`` wait for nothing; the
same holds for the heavy parts, `torchclust.lightning` and `torchclust.export`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchclust.allocation.sensitivity import fisher_information
    from torchclust.distillation.distill import distill_
    from torchclust.fitting.codebook import Codebook, fit_codebook
    from torchclust.model.charge import charge_
    from torchclust.model.cluster import cluster_, refit_, strip_
    from torchclust.model.clustering import Clustering, is_clustered, named_clusterings
    from torchclust.model.restore import restore_
    from torchclust.model.summary import Summary, summary
    from torchclust.packing.mantissas import round_mantissas_
    from torchclust.packing.pack import load_packed_, save_packed
    from torchclust.packing.sections import PackedFileError
    from torchclust.packing.size import PackedSize
    from torchclust.weight.config import ClusterConfig

__version__ = "0.1.0"

__all__ = [
    "ClusterConfig",
    "Clustering",
    "Codebook",
    "PackedFileError",
    "PackedSize",
    "Summary",
    "charge_",
    "cluster_",
    "distill_",
    "fisher_information",
    "fit_codebook",
    "is_clustered",
    "load_packed_",
    "named_clusterings",
    "refit_",
    "restore_",
    "round_mantissas_",
    "save_packed",
    "strip_",
    "summary",
]

_HOMES = {
    "allocation.sensitivity": ("fisher_information",),
    "distillation.distill": ("distill_",),
    "fitting.codebook": ("Codebook", "fit_codebook"),
    "model.charge": ("charge_",),
    "model.cluster": ("cluster_", "refit_", "strip_"),
    "model.clustering": ("Clustering", "is_clustered", "named_clusterings"),
    "model.restore": ("restore_",),
    "model.summary": ("Summary", "summary"),
    "packing.mantissas": ("round_mantissas_",),
    "packing.pack": ("load_packed_", "save_packed"),
    "packing.sections": ("PackedFileError",),
    "packing.size": ("PackedSize",),
    "weight.config": ("ClusterConfig",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("export", "lightning")

if not TYPE_CHECKING:  # a checker would take any name for granted

    def __getattr__(name):
        import importlib

        if name in _SUBMODULES:
            return importlib.import_module(f"torchclust.{name}")
        if name not in _HOME_OF:
            raise AttributeError(f"module 'torchclust' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"torchclust.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
