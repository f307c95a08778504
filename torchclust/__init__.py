"""Weight clustering for PyTorch, from a trained model to the compressed int8 file.

Everything a user calls is a name of this package. Each is imported, and torch with it, when it is
first used (PEP 562), so that ``import torchclust`` and ``torchclust --help`` wait for nothing; the
same holds for the heavy parts, `torchclust.lightning` and `torchclust.export`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    "codebook": ("Codebook", "fit_codebook"),
    "config": ("ClusterConfig",),
    "distillation": ("distill_",),
    "model": (
        "Clustering",
        "cluster_",
        "is_clustered",
        "named_clusterings",
        "refit_",
        "restore_",
        "strip_",
    ),
    "packed_sections": ("PackedFileError",),
    "packed_size": ("PackedSize",),
    "packing": ("load_packed_", "save_packed"),
    "report": ("Summary", "summary"),
    "sensitivity": ("fisher_information",),
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
