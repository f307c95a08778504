"""A project to begin with: a recipe, a module, its data, and a README, all of them small."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from torchclust.recipes.section import RecipeError

TEMPLATE = Path(__file__).parent / "project"
_OTHER_NAME = ("import pytorch_lightning as pl", "import lightning.pytorch as pl")


def new_project(folder: Path) -> list[Path]:
    """Write the project into a folder, which is made, and return its files.

    Raises:
        RecipeError: the folder is there and holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is there already; name a new folder:  torchclust new DIR")
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in TEMPLATE.iterdir() if path.is_file())
    written = [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    if find_spec("pytorch_lightning") is None:
        for file in written:
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(*_OTHER_NAME), encoding="utf-8")
    return written
