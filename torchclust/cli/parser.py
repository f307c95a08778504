"""The command line: ``torchclust run``, ``check``, ``sweep``, ``new``, ``report`` and others.

What a command does is in `torchclust.cli.commands`; here is how it is asked for, and how it ends.
To print its help, or its version, the program imports nothing beyond the standard library.
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

from torchclust.cli import commands

EXAMPLES = {
    "run": (
        "torchclust run recipes/mnist_cnn.yaml",
        "torchclust run recipes/mnist_cnn.yaml --set model.batch_norm=true --output runs/with_norm",
        "torchclust run recipes/fashion_cnn.yaml --set cluster.n_clusters=8 --resume",
        "torchclust run runs/mnist_cnn/report.json --output runs/again",
    ),
    "check": (
        "torchclust check recipes/fashion_cnn.yaml",
        "torchclust check recipes/mnist_cnn.yaml --set 'cluster.rules={0.weight: 32}'",
    ),
    "sweep": (
        "torchclust sweep recipes/mnist_cnn.yaml --set cluster.n_clusters=4,8,16,32",
        "torchclust sweep recipes/mnist_cnn.yaml --set cluster.n_clusters=8,16 "
        "--set cluster.assignment=fixed,nearest --jobs 2",
    ),
    "new": ("torchclust new my_project",),
    "report": (
        "torchclust report runs/mnist_cnn/int8.tflite",
        "torchclust report runs/mnist_cnn/model.packed --json",
    ),
    "export": (
        "torchclust export recipes/mnist_cnn.yaml trained.ckpt trained.tflite",
        "torchclust export recipes/mnist_cnn.yaml trained.ckpt trained.tflite --float",
        "torchclust export recipes/mnist_cnn.yaml trained.ckpt trained.pte "
        "--set 'executorch={target: ethos-u85-256}'",
    ),
    "vela": (
        "torchclust vela runs/mnist_cnn/int8.tflite",
        "torchclust vela runs/mnist_cnn/int8.tflite --accelerator ethos-u85-256 --output vela",
        "torchclust vela --list-configs",
        "torchclust vela --list-configs vendor.ini",
    ),
    "kit": (
        "torchclust kit runs/mnist_cnn/int8.tflite board",
        "torchclust kit runs/mnist_cnn/int8.tflite board --accelerator ethos-u55-128 --overwrite",
    ),
}
STATUSES = """\
exit status:
  0    done
  1    a step failed: the export, the compiler, a file that cannot be written
  2    something named cannot be used; one line says what, and what to type instead
  130  interrupted with Ctrl-C; run and sweep keep what is finished, --resume goes on
"""
COMPLETION = """\
shell completion (needs the package shtab: pip install "torchclust[recipes]"):
  bash  torchclust --print-completion bash > ~/.local/share/bash-completion/completions/torchclust
  zsh   torchclust --print-completion zsh > DIR/_torchclust, DIR being one of your $fpath
"""
# What to install for everything that a command may need.
_FOLDERS = ("output", "folder", "dir")  # arguments that are folders
_EXTRAS = {
    "check": "recipes",
    "new": "recipes",
    "report": "export",
    "vela": "export",
    "kit": "micro",
}


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
        epilog="\n".join(
            [_examples(shown[0] for shown in EXAMPLES.values()), STATUSES, COMPLETION]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_PrintVersion, help="show the version and exit")
    top.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print a script that completes commands, options and files, and exit",
    )
    all_commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _command(
        all_commands, "run", commands.run, "train, cluster, fine-tune, export, compile, report"
    )
    _recipe_arguments(run)
    _output_arguments(run, "runs/NAME")

    check = _command(
        all_commands, "check", commands.check, "check a recipe and show what it would cluster"
    )
    _recipe_arguments(check)

    sweep = _command(
        all_commands, "sweep", commands.sweep, "run a recipe for several values of some keys"
    )
    _recipe_arguments(sweep, "several values, with commas between them, are run one by one")
    _output_arguments(sweep, "runs/NAME_sweep")
    sweep.add_argument(
        "--jobs", "-j", type=int, default=1, metavar="N", help="runs at a time, default 1"
    )

    new = _command(all_commands, "new", commands.new, "write a project of one's own to begin with")
    _file(new, "folder", "a folder that is not there yet")

    report = _command(all_commands, "report", commands.report, "what is in a file of weights")
    _file(report, "file", "a .tflite file, a checkpoint, or a packed model")

    export = _command(
        all_commands, "export", commands.export, "write a checkpoint as a .tflite or .pte file"
    )
    _recipe_arguments(export)
    _file(export, "checkpoint", "state dict of the recipe's model, or a Lightning checkpoint")
    _file(export, "output_file", "the file to write: .tflite, or .pte (ExecuTorch for Ethos-U)")
    export.add_argument("--float", action="store_true", help="float32 instead of int8")

    vela = _command(all_commands, "vela", commands.vela, "compile a .tflite file for an Ethos-U")
    _file(vela, "tflite", "an int8 .tflite file", nargs="?")
    vela.add_argument(
        "--accelerator",
        default="ethos-u55-128",
        help="ethos-u55-32 to -256, ethos-u65-256 or -512, ethos-u85-128 to -2048; "
        "default %(default)s",
    )
    vela.add_argument("--system-config", metavar="NAME", help="clocks and memories, as Vela's")
    vela.add_argument("--memory-mode", metavar="NAME", help="where weights and activations live")
    vela.add_argument("--config", type=Path, metavar="FILE", help="a chip vendor's vela.ini")
    vela.add_argument(
        "--list-configs",
        type=Path,
        metavar="FILE",
        nargs="?",
        const=Path(),
        help="show the systems and memory modes that a vela.ini has, by default Vela's own, and "
        "compile nothing",
    )
    vela.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help="folder to write, default the file's"
    )

    kit = _command(all_commands, "kit", commands.kit, "write a .tflite file as C++ for a board")
    _file(kit, "tflite", "an int8 .tflite file")
    _file(kit, "dir", "the folder to write")
    kit.add_argument("--labels", metavar="A,B,...", help="names of the classes")
    kit.add_argument(
        "--inputs", type=Path, metavar="FILE.npy", help="samples for the test vectors, else random"
    )
    kit.add_argument("--accelerator", help="compile for this Ethos-U, as vela does")
    kit.add_argument("--overwrite", action="store_true", help="replace an earlier kit's files")
    return top


def _command(
    all_commands: Any, name: str, act: Callable[[argparse.Namespace], Any], summary: str
) -> argparse.ArgumentParser:
    """Add one command, with the options that all have."""
    made: argparse.ArgumentParser = all_commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_examples(EXAMPLES[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    made.add_argument("--quiet", "-q", action="store_true", help="no progress, no tables")
    made.set_defaults(act=act, how_to_resume=lambda args: "")
    return made


def _examples(lines: Any) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in lines), ""])


def _file(
    command: argparse.ArgumentParser, name: str, text: str, *, nargs: str | None = None
) -> None:
    command.add_argument(name, type=Path, metavar=name.upper(), help=text, nargs=nargs)


def _recipe_arguments(command: argparse.ArgumentParser, more: str = "") -> None:
    _file(command, "recipe", "a YAML file, or an earlier run's report.json")
    command.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the recipe, e.g. cluster.n_clusters=8 or data=fashion_mnist"
        + (f"; {more}" if more else ""),
    )
    command.add_argument(
        "--download",
        dest="settings",
        action="append_const",
        const="data.download=true",
        help="fetch the data set's files if they are not there; nothing is downloaded without it",
    )


def _output_arguments(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help=f"folder to write, default {default}"
    )
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    choice.add_argument("--overwrite", action="store_true", help="delete an earlier run's files")
    command.set_defaults(how_to_resume=_how_to_resume)


class _PrintVersion(argparse.Action):
    """Looks the version up when it is asked for: reading package metadata takes a while."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print("torchclust", version("torchclust"))
        parser.exit()


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion script, made by shtab from the parser itself."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('completion needs the package shtab:  pip install "torchclust[recipes]"')
        (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for action in (action for command in found.choices.values() for action in command._actions):
            if action.type is Path:
                action.complete = shtab.DIRECTORY if action.dest in _FOLDERS else shtab.FILE
        print(shtab.complete(parser, given[1]))
        parser.exit()


def _exit_status(error: Exception) -> int | None:
    """Return 2 for input that can not be used, 1 for a step that failed, None for a bug."""
    if isinstance(error, commands.InputError):
        return 2
    if isinstance(error, OSError):
        return 1
    if isinstance(error, ImportError):
        return None if (error.name or "").startswith("torchclust") else 2
    from torchclust.export import CompiledFileError, ExportError, VelaError
    from torchclust.recipes.schema import RecipeError
    from torchclust.zoo.dataset import DataError

    if isinstance(error, RecipeError | DataError):
        return 2
    failures = (CompiledFileError, ExportError, VelaError)
    return 1 if isinstance(error, failures) else None


def _one_line(command: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{command} needs the package {error.name!r}, which is not installed:  "
            f'pip install "torchclust[{_EXTRAS.get(command, "all")}]"'
        )
    return " ".join(str(error).split())


def _how_to_resume(args: argparse.Namespace) -> str:
    """Return what to type to go on with an interrupted run."""
    words = ["torchclust", args.command, str(args.recipe)]
    words += [word for setting in args.settings for word in ("--set", setting)]
    words += ["--output", str(args.output)] if args.output else []
    words += ["--jobs", str(args.jobs)] if getattr(args, "jobs", 1) > 1 else []
    words += [f"--{name}" for name in ("json", "quiet") if getattr(args, name)]
    return f"; what is finished is kept. Go on with:\n  {shlex.join([*words, '--resume'])}"
