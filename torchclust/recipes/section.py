"""What every section of a recipe has in common, and the one kind of error about recipes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

AnyPath = Annotated[Path, Field(strict=False)]


class RecipeError(ValueError):
    """A recipe that can not be run; the text is one line that names the key and the remedy."""


class Section(BaseModel):
    """No unknown keys, no silent conversions, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Read a key's null as its default, so that ``--set KEY=null`` takes back what a file says.

        Of keys that a section does not know, arguments of what a target names, null is a value.
        """
        if not isinstance(given, Mapping):
            return given
        return {k: v for k, v in given.items() if v is not None or k not in cls.model_fields}


def nearest(key: str, valid: Iterable[str]) -> str:
    """Say which of the `valid` keys was meant, or list them."""
    names = list(valid)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"


def known_keys(given: Iterable[Any], valid: list[str], prefix: str = "") -> None:
    """Refuse a key that is none of the valid ones."""
    for key in given:
        if key not in valid:
            raise ValueError(f"unknown key {prefix}{key}; {nearest(str(key), valid)}")
