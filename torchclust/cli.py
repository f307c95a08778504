"""The command line: ``torchclust run``, ``check``, ``sweep``, ``report``, ``export``, ``vela``.

Exit status 0 is success, 2 is input that can not be used (one line says what and how to change it),
1 is a step that failed, 130 is Ctrl-C. Modules that take seconds to import are imported by the
command that needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  torchclust run recipes/mnist_cnn.yaml
  torchclust run recipes/mnist_cnn.yaml --set model.batch_norm=true --output runs/with_norm
  torchclust run recipes/fashion_cnn.yaml --set cluster.n_clusters=8 --resume
  torchclust check recipes/fashion_cnn.yaml
  torchclust sweep recipes/mnist_cnn.yaml --set cluster.n_clusters=4,8,16,32
  torchclust report runs/mnist_cnn/int8.tflite
  torchclust vela runs/mnist_cnn/int8.tflite --accelerator ethos-u85-256
"""


class InputError(ValueError):
    """What the user named can not be used; the text is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = parser().parse_args(arguments)
    try:
        # With --json, standard output is the result's alone.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            result = args.act(args)
        if args.json:
            print(json.dumps(result, indent=2))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, a pager or head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\ntorchclust: interrupted{args.how_to_resume(args)}", file=sys.stderr)
        return 130
    except Exception as error:
        status = _exit_status(error)
        if status is None:
            raise
        print(f"torchclust: {_one_line(args.command, error)}", file=sys.stderr)
        return status
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="torchclust",
        description="Cluster the weights of PyTorch models, down to the int8 file for the NPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "train, cluster, fine-tune, export, compile, report")
    _recipe_arguments(run)
    _output_arguments(run, "runs/NAME")
    run.set_defaults(how_to_resume=_how_to_resume)

    check = _command(commands, "check", _check, "check a recipe and show what it would cluster")
    _recipe_arguments(check)

    sweep = _command(commands, "sweep", _sweep, "run a recipe for several values of some keys")
    _recipe_arguments(sweep, "several values, with commas between them, are run one by one")
    _output_arguments(sweep, "runs/NAME_sweep")
    sweep.set_defaults(how_to_resume=_how_to_resume)

    report = _command(commands, "report", _report, "what is in a file of weights")
    report.add_argument("file", type=Path, help="a .tflite file, a checkpoint, or a packed model")

    export = _command(commands, "export", _export, "write a checkpoint as a .tflite file")
    _recipe_arguments(export)
    export.add_argument("checkpoint", type=Path, help="state dict of the recipe's model")
    export.add_argument("tflite", type=Path, help="the file to write")
    export.add_argument("--float", action="store_true", help="float32 instead of int8")

    vela = _command(commands, "vela", _vela, "compile a .tflite file for an Ethos-U")
    vela.add_argument("tflite", type=Path, help="an int8 .tflite file")
    vela.add_argument("--accelerator", default="ethos-u55-128", help="default: %(default)s")
    vela.add_argument("--system-config", help="clocks and memories, a name Vela knows")
    vela.add_argument("--memory-mode", help="where weights and activations live")
    vela.add_argument("--output", "-o", type=Path, help="folder to write, default the file's")
    return top


def _command(
    commands: Any, name: str, act: Callable[[argparse.Namespace], Any], summary: str
) -> argparse.ArgumentParser:
    """Add one command, with the options that all have."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    made.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    made.add_argument("--quiet", "-q", action="store_true", help="no progress, no tables")
    made.set_defaults(act=act, how_to_resume=lambda args: "")
    return made


def _recipe_arguments(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument("recipe", type=Path, help="a YAML file, or an earlier run's report.json")
    command.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the recipe, e.g. cluster.n_clusters=8 or data=fashion_mnist"
        + (f"; {more}" if more else ""),
    )


def _output_arguments(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--output", "-o", type=Path, help=f"folder to write, default {default}")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    choice.add_argument("--overwrite", action="store_true", help="delete an earlier run's files")


def _exit_status(error: Exception) -> int | None:
    """Return 2 for input that can not be used, 1 for a step that failed, None for a bug."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, ImportError):
        return None if (error.name or "").startswith("torchclust") else 2
    from torchclust.data import DataError
    from torchclust.export import ExportError, VelaError
    from torchclust.recipe import RecipeError

    if isinstance(error, RecipeError | DataError):
        return 2
    return 1 if isinstance(error, ExportError | VelaError) else None


def _one_line(command: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{command} needs the package {error.name!r}, which is not installed:  "
            'pip install "torchclust[all]"'
        )
    return " ".join(str(error).split())


def _run(args: argparse.Namespace) -> Any:
    from torchclust.recipe import load_recipe
    from torchclust.run import run_recipe
    from torchclust.run_report import show

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


def _check(args: argparse.Namespace) -> Any:
    from torchclust import summary
    from torchclust.prepare import clustered_copy, prepare
    from torchclust.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.settings)
    prepared = prepare(recipe)
    model = clustered_copy(recipe, prepared.model) if recipe.cluster else prepared.model
    table = summary(model)
    if _tables(args):
        print(f"{args.recipe}: {recipe.name} is a valid recipe. Before any training:")
        print(table)
    return {"recipe": recipe.to_dict(), **table.to_dict()}


def _sweep(args: argparse.Namespace) -> Any:
    from torchclust.sweep import markdown, run_sweep

    rows = run_sweep(
        args.recipe,
        args.settings,
        args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        say=_say(args),
        progress=not args.quiet,
    )
    if _tables(args):
        print(markdown(rows), end="")
    return rows


def _report(args: argparse.Namespace) -> Any:
    from torchclust.file_report import describe

    try:
        described = describe(args.file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot report on {args.file}: {error}") from error
    if _tables(args):
        print(described.text)
    return described.content


def _export(args: argparse.Namespace) -> Any:
    from torchclust.data import samples
    from torchclust.export import to_tflite
    from torchclust.file_report import describe
    from torchclust.prepare import load_checkpoint_, prepare
    from torchclust.recipe import ExportSection, load_recipe

    if not args.tflite.parent.is_dir():
        raise InputError(f"cannot write {args.tflite}: {args.tflite.parent} does not exist")
    recipe = load_recipe(args.recipe, args.settings)
    prepared = prepare(recipe)
    model = load_checkpoint_(prepared.model, args.checkpoint).eval()
    count = (recipe.export or ExportSection()).calibration_samples  # type: ignore[call-arg]
    calibration = samples(prepared.data.train, count, seed=recipe.seed)
    to_tflite(model, calibration[:1], args.tflite, calibration=[calibration], float=args.float)
    described = describe(args.tflite)
    if _tables(args):
        print(described.text)
    return described.content


def _vela(args: argparse.Namespace) -> Any:
    import dataclasses

    from torchclust.export import vela

    try:
        report = vela(
            args.tflite,
            accelerator=args.accelerator,
            system_config=args.system_config,
            memory_mode=args.memory_mode,
            output_dir=args.output,
        )
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    if _tables(args):
        print(report)
    return {**dataclasses.asdict(report), "path": str(report.path)}


def _tables(args: argparse.Namespace) -> bool:
    return not (args.quiet or args.json)


def _say(args: argparse.Namespace) -> Callable[[str], None]:
    """Return what prints a stage's name, in colour on a terminal."""
    if args.quiet:
        return lambda line: None
    from rich.console import Console

    console = Console(highlight=False)
    return lambda line: console.print(line, style="bold cyan", markup=False)


def _how_to_resume(args: argparse.Namespace) -> str:
    """Return what to type to go on with an interrupted run."""
    words = ["torchclust", args.command, str(args.recipe)]
    words += [word for setting in args.settings for word in ("--set", setting)]
    words += ["--output", str(args.output)] if args.output else []
    return f"; what is finished is kept. Go on with:\n  {shlex.join([*words, '--resume'])}"
