"""The packages behind an ExecuTorch program: imported on first use, versions checked.

They are an extra of their own: executorch 1.5 pins another Vela and an older numpy than the rest of
the package is developed with.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

from torchclust.export.backends import quietly

TESTED = "1.5"  # the backend's quantizer and its compile specs change from release to release
INSTALL = 'pip install "torchclust[executorch]"'


def check() -> None:
    """Refuse to begin without the packages, or with another executorch than the tested one.

    Raises:
        ImportError: names what is missing, or both versions, and what to type.
    """
    try:
        version = metadata.version("executorch")
    except metadata.PackageNotFoundError as error:
        raise _missing("executorch") from error
    if not f"{version}.".startswith(f"{TESTED}."):
        raise ImportError(
            f"executorch {version} is installed, and to_pte is tested with {TESTED}, whose "
            f"quantizer differs:  {INSTALL}",
            name="executorch",
        )
    for name in ("executorch", "ethosu", "tosa", "tosa_reference_model", "torchao"):
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def load(name: str) -> Any:
    """A module of executorch, torchao or tosa-tools."""
    with quietly():
        return importlib.import_module(name)


def _missing(name: str) -> ImportError:
    return ImportError(
        f"an ExecuTorch program needs the package {name!r}, which is not installed:  {INSTALL}",
        name=name,
    )
