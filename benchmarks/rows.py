"""What was measured, a line of JSON each, kept as soon as it is known."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def keep(path: Path, **row: Any) -> None:
    """Print a row and append it to a file, where it survives an interrupted run."""
    line = json.dumps(row)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")


def published(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the folders that benchmarks of published networks read."""
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of the published weights")
    parser.add_argument("--data", type=Path, help="folder of their data sets")
    return parser


def measure_or_print(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], None],
    table: Callable[[], str],
) -> None:
    """Measure on one thread, or, with --table, print what was measured before."""
    parser.add_argument("--table", action="store_true", help="print what was measured, only")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    torch.set_num_threads(1)
    measure(args)
