"""The clustered int8 file of a run as lookup tables for tflite-micro, and what that saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchclust.export.micro_interpreter import least_arena
from torchclust.export.tflm import tested_version, tflm
from torchclust.recipes.kept import Result, Stages, digest_of_file, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.section import RecipeError
from torchclust.recipes.stages import Networks

TABLES_FILE = "tflm.tflite"
_COMPARED = 32  # training inputs on which both files must agree, beside random ones


def check_tables(prepared: Prepared) -> None:
    """Find out before any training whether lookup tables can be written here.

    Raises:
        ImportError: tflite-micro is not installed, or in another version than was tested.
        RecipeError: `max_arena` is too small for any file: it does not hold one input of int8.
    """
    task, section, seed = prepared.task, prepared.recipe.tflm, prepared.recipe.seed
    if section is None:
        return
    tested_version()
    needed = sum(column[0].numel() for column in task.inputs(task.module, 1, seed))
    if section.max_arena is not None and section.max_arena < needed:
        raise RecipeError(
            f"tflm.max_arena: {section.max_arena:,} bytes do not even hold the network's inputs, "
            f"{needed:,} bytes in int8; leave it out, and the report says what the file needs"
        )


def write_tables(
    prepared: Prepared, networks: Networks, exported: Sequence[str], output: Path, stages: Stages
) -> Result:
    """Write `TABLES_FILE` of the exported int8 file: a `TFLMReport`'s figures, and the baseline's.

    Nothing is written, and the result is empty, where nothing was clustered.
    """
    recipe, section = prepared.recipe, prepared.recipe.tflm
    assert section is not None
    ours, baseline = (output / name for name in ("int8.tflite", "baseline_int8.tflite"))

    def compute() -> Result:
        inputs = prepared.task.inputs(networks.modules["trained"], _COMPARED, recipe.seed)
        done = tflm(ours, output / TABLES_FILE, inputs=inputs, max_arena=section.max_arena)
        return {
            "files": [TABLES_FILE],
            "version": done.version,
            "flash_bytes": done.flash_after,
            "arena_bytes": done.arena_after,
            "time_ratio": done.time_ratio,
            "compared": done.compared,
            "baseline_flash_bytes": baseline.stat().st_size,
            "baseline_arena_bytes": least_arena(baseline.read_bytes()),
        }

    if ours.name not in exported:
        return {}
    files = [digest_of_file(ours), digest_of_file(baseline)]
    depends = [origin(prepared), files, recipe.sections("tflm")]
    return stages.result("tflm", depends, compute, folder=output)
