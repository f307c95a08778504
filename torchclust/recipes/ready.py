"""A recipe prepared, and whatever its last stages need found out before the first one begins."""

from __future__ import annotations

from torchclust.recipes.prepare import Prepared, prepare
from torchclust.recipes.programs import check_packages
from torchclust.recipes.schema import Recipe
from torchclust.recipes.tables import check_tables


def ready(recipe: Recipe) -> Prepared:
    """Return a recipe with its task, once everything is there that a run of it takes.

    Raises:
        RecipeError: as `prepare`, and for working memory that is too small for any file.
        ImportError: a package is missing with which a file is written.
    """
    prepared = prepare(recipe)
    check_packages(prepared)
    check_tables(prepared)
    return prepared
