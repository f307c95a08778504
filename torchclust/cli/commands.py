"""What each command of the ``torchclust`` program does, given its parsed arguments.

A command returns what ``--json`` prints. Modules that take seconds to import are imported by the
command that needs them.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What the user named can not be used; the text is one line."""


def run(args: Namespace) -> Any:
    """Run a recipe and show what was gained."""
    from torchclust.recipes.load import load_recipe
    from torchclust.recipes.report import show
    from torchclust.recipes.run import run_recipe

    recipe = load_recipe(args.recipe, args.settings)
    args.output = args.output or Path("runs") / recipe.name
    report = run_recipe(
        recipe,
        args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        say=_say(args),
        progress=not args.quiet,
    )
    if _tables(args):
        show(report, args.output)
    return report


def check(args: Namespace) -> Any:
    """Find what is wrong with a recipe, and show what it would cluster."""
    from torchclust.model.summary import summary
    from torchclust.recipes.load import load_recipe
    from torchclust.recipes.prepare import clustered_copy
    from torchclust.recipes.ready import ready

    recipe = load_recipe(args.recipe, args.settings)
    prepared = ready(recipe)
    model = clustered_copy(recipe, prepared.model) if recipe.cluster else prepared.model
    table = summary(model)
    if _tables(args):
        print(f"{args.recipe}: {recipe.name} is a valid recipe. Before any training:")
        print(table)
    return {"recipe": recipe.to_dict(), **table.to_dict()}


def sweep(args: Namespace) -> Any:
    """Run a recipe for several values and show them side by side."""
    from torchclust.recipes.sweep import markdown, run_sweep

    rows = run_sweep(
        args.recipe,
        args.settings,
        args.output,
        jobs=args.jobs,
        resume=args.resume,
        overwrite=args.overwrite,
        say=_say(args),
        progress=not args.quiet,
    )
    if _tables(args):
        print(markdown(rows), end="")
    return rows


def new(args: Namespace) -> Any:
    """Write a small project to begin with, and say how to run it."""
    from torchclust.recipes.new import new_project

    files = new_project(args.folder)
    if _tables(args):
        print("\n".join(map(str, files)))
        folder = shlex.quote(str(args.folder))
        print(f"Run it as it is:  cd {folder} && torchclust run recipe.yaml")
    return {"files": [str(file) for file in files]}


def report(args: Namespace) -> Any:
    """Show what is in a file of weights."""
    from torchclust.cli.file_report import describe

    try:
        described = describe(args.file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot report on {args.file}: {error}") from error
    if _tables(args):
        print(described.text)
    return described.content


def export(args: Namespace) -> Any:
    """Write a checkpoint of a recipe's model as a .tflite or .pte file and show what is in it."""
    from torchclust.cli.file_report import describe
    from torchclust.export import to_pte, to_tflite
    from torchclust.recipes.checkpoint import load_checkpoint_
    from torchclust.recipes.load import load_recipe
    from torchclust.recipes.prepare import prepare
    from torchclust.recipes.schema import ExecuTorchSection, ExportSection

    if not args.output_file.parent.is_dir():
        raise InputError(
            f"cannot write {args.output_file}: {args.output_file.parent} does not exist:  "
            f"mkdir -p {args.output_file.parent}"
        )
    is_program = args.output_file.suffix == ".pte"
    if is_program and args.float:
        raise InputError(f"{args.output_file} is a program for an int8 NPU: leave --float out")
    recipe = load_recipe(args.recipe, args.settings)
    task = prepare(recipe).task
    # A module's checkpoint is all of it, a model's is the network alone.
    load_checkpoint_(task.module if recipe.module else task.network(task.module), args.checkpoint)
    count = (recipe.export or ExportSection()).calibration_samples  # type: ignore[call-arg]
    inputs = task.inputs(task.module, count, recipe.seed)
    _say(args)(f"export {args.output_file} ...")
    network = task.network(task.module).eval()
    given = (network, tuple(column[:1] for column in inputs), args.output_file)
    if is_program:
        section = recipe.executorch or ExecuTorchSection()  # type: ignore[call-arg]
        done = to_pte(*given, calibration=[inputs], **section.options)
        text, content = str(done), done.to_dict()
    else:
        to_tflite(*given, calibration=[inputs], float=args.float)
        described = describe(args.output_file)
        text, content = described.text, described.content
    if _tables(args):
        print(text)
    return content


def vela(args: Namespace) -> Any:
    """Compile a .tflite file and show Vela's figures, or what a vendor's file has to choose."""
    import dataclasses

    from torchclust.export import CompiledFileError, vela
    from torchclust.export.backends import INSTALL
    from torchclust.export.vela_config import arms_file, read_vela_configs

    try:
        if args.list_configs is not None:
            listed = arms_file() if args.list_configs == Path() else args.list_configs
            if listed is None:
                raise InputError(f"Vela, which has a file of its own, is not installed:  {INSTALL}")
            configs = read_vela_configs(listed)
            if _tables(args):
                print(configs)
            return {**dataclasses.asdict(configs), "path": str(configs.path)}
        if args.tflite is None:
            raise InputError("vela needs a .tflite file:  torchclust vela model.tflite")
        report = vela(
            args.tflite,
            accelerator=args.accelerator,
            system_config=args.system_config,
            memory_mode=args.memory_mode,
            config=args.config,
            output_dir=args.output,
        )
    except CompiledFileError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    if _tables(args):
        print(report)
    return report.to_dict()


def kit(args: Namespace) -> Any:
    """Write what a board needs of a .tflite file, and show its size."""
    import numpy as np

    from torchclust.export import board_kit

    try:
        found = board_kit(
            args.tflite,
            args.dir,
            inputs=None if args.inputs is None else np.load(args.inputs),
            labels=[label.strip() for label in args.labels.split(",")] if args.labels else (),
            accelerator=args.accelerator,
            overwrite=args.overwrite,
        )
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from error
    if _tables(args):
        print(found)
    compiled = found.compiled.to_dict() if found.compiled else None
    return {
        "folder": str(found.folder),
        "flash_bytes": found.flash_bytes,
        "arena_bytes": found.arena_bytes,
        "operators": list(found.operators),
        "compiled": compiled,
    }


def _tables(args: Namespace) -> bool:
    return not (args.quiet or args.json)


def _say(args: Namespace) -> Callable[[str], None]:
    """Return what prints a line of progress, in colour where a person would see it as colour."""
    if args.quiet:
        return lambda line: None
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"  # no-color.org
    cyan = sys.stdout.isatty() and not plain
    return lambda line: print(f"\033[1;36m{line}\033[0m" if cyan else line, flush=True)
