"""Run a recipe from beginning to end: networks, files, compiler, report.

In: a recipe. `prepare` makes data and model of it, `stages` the networks, `artifacts` their files,
`report` and `plot` what is said of them. Out: a folder, and the content of its report.json.

Everything that can be wrong with the recipe is found before the output folder is touched. After
that each stage leaves a whole result or none (`torchclust.recipes.kept`), so a run that was
interrupted is continued by the same call with ``resume=True``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from torchclust.recipes.artifacts import (
    TFLITE_FILES,
    VELA_FOLDER,
    compile_files,
    export_files,
)
from torchclust.recipes.kept import Stages, versions
from torchclust.recipes.packed import PACKED_FILE, write_packed
from torchclust.recipes.plot import plot
from torchclust.recipes.programs import PROGRAM_FILES, write_programs
from torchclust.recipes.ready import ready
from torchclust.recipes.report import Files, assemble, markdown
from torchclust.recipes.schema import Recipe, RecipeError
from torchclust.recipes.stages import train_networks
from torchclust.recipes.tables import TABLES_FILE, write_tables

STAGE_FOLDER = "stages"
CHOSEN_FILE = "chosen.yaml"
REPORTS = ("recipe.yaml", CHOSEN_FILE, "report.json", "report.md", "report.png")


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stage_folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a recipe, write everything into `output`, and return what report.json holds.

    Args:
        recipe: what to run.
        output: a folder, made if need be; one that holds something needs `resume` or `overwrite`.
        resume: use the stages that an earlier run finished, as far as they are the recipe's.
        overwrite: delete an earlier run's files first; files that no run writes stay.
        stage_folder: where stage results are kept, by default ``output/stages``; runs that share
            it share what they have in common.
        say: told what is going on, one line at a time.
        progress: show progress bars.

    Raises:
        RecipeError, DataError: before anything is written; one line that says what to change.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    prepared = ready(recipe)
    if overwrite:
        clear(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:  # one of another recipe beside this one's files would lie
        (output / name).unlink(missing_ok=True)
    write_whole(output / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    stages = Stages(stage_folder or output / STAGE_FOLDER, say, progress)
    networks = train_networks(prepared, stages)
    if networks.chosen:
        same = recipe.model_copy(update={"cluster": networks.chosen.section})
        write_whole(output / CHOSEN_FILE, yaml.safe_dump(same.to_dict(), sort_keys=False))
    exported = export_files(prepared, networks, output, stages) if recipe.export else {}
    names = exported.get("files", ())
    compiled = compile_files(prepared, names, output, stages) if recipe.vela else {}
    programs = write_programs(prepared, networks, output, stages) if recipe.executorch else {}
    tables = write_tables(prepared, networks, names, output, stages) if recipe.tflm else {}
    packed = write_packed(prepared, networks, output, stages)
    files = Files(exported, compiled, programs, tables, packed)
    written = {
        n for found in (exported, compiled, programs, tables) for n in found.get("files", ())
    }
    others = left_over(output, written | ({PACKED_FILE} if packed else set()))
    if others:
        say(f"not of this recipe, left by an earlier one: {', '.join(others)}")
    report = assemble(recipe, networks, files, stages.seconds, versions())
    report["left_over"] = others
    plot(report, networks.trained, networks.compressed, output / "report.png")
    write_whole(output / "report.md", markdown(report))
    write_whole(output / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless the user said what to do about it."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"{output} is a file; name a folder:  --output runs/NAME")
    if not (resume or overwrite) and output.is_dir() and any(output.iterdir()):
        raise RecipeError(
            f"{output} is not empty: add --resume to go on with that run, --overwrite to replace "
            "it, or name another folder with --output"
        )


def clear(output: Path) -> None:
    """Delete what a run writes, and nothing else: the folder may be anybody's."""
    for name in (*REPORTS, *TFLITE_FILES, TABLES_FILE, *PROGRAM_FILES, PACKED_FILE):
        (output / name).unlink(missing_ok=True)
    for folder in (VELA_FOLDER, STAGE_FOLDER):
        shutil.rmtree(output / folder, ignore_errors=True)


def left_over(output: Path, written: Collection[str]) -> list[str]:
    """Name the files in a folder that another recipe's run wrote, and this one's did not."""
    compiled = (f"{VELA_FOLDER}/{name}_vela.tflite" for name in ("int8", "baseline_int8"))
    known = (*TFLITE_FILES, *compiled, TABLES_FILE, *PROGRAM_FILES, PACKED_FILE)
    return [name for name in known if name not in written and (output / name).exists()]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
