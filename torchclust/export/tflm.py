"""An int8 file for tflite-micro whose weights stay lookup tables in flash, and what that saves.

Nothing is written that was not compared: both files run in tflite-micro, and every output has to
be equal to the bit.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from torchclust.export.backends import ExportError
from torchclust.export.graph import Array
from torchclust.export.micro_interpreter import (
    Micro,
    as_inputs,
    check_runs_on_micro,
    least_arena,
    random_inputs,
)
from torchclust.export.table_plan import TableRow, plan
from torchclust.export.whole_file import check_folder, write_whole
from torchclust.progress import track

TESTED = "0.dev20261023182759"  # of tflite-micro: DECODE is new, and its format may still change
RANDOM = 100  # inputs that are drawn, beside those given
_KIB = 1024


@dataclass(frozen=True)
class TFLMReport:
    """What lookup tables save and cost. Prints as a table.

    Attributes:
        path: the file written.
        rows: one `TableRow` per weight tensor, or part of one.
        flash_before, flash_after: bytes of both files.
        arena_before, arena_after: the least bytes of working memory for each; a decoded weight
            lies in the arena while its operator runs.
        time_ratio: how much longer a run takes with decoding, on this machine with reference
            kernels: median of medians, 1.0 is as long.
        compared: inputs for which both files answered the same to the bit.
        version: of tflite-micro.
    """

    path: Path
    rows: tuple[TableRow, ...]
    flash_before: int
    flash_after: int
    arena_before: int
    arena_after: int
    time_ratio: float
    compared: int
    version: str

    def __str__(self) -> str:
        ratio = self.flash_after / self.flash_before
        lines = [
            f"{self.path.name}: flash {self.flash_before / _KIB:,.1f} -> "
            f"{self.flash_after / _KIB:,.1f} KiB ({ratio:.2f}x), arena "
            f"{self.arena_before / _KIB:,.1f} -> {self.arena_after / _KIB:,.1f} KiB, "
            f"time {self.time_ratio:.2f}x",
            f"  equal to the bit on {self.compared} inputs in tflite-micro {self.version}",
            f"  {'operator':<18}{'shape':<20}{'codes':>6}{'bits':>6}{'bytes':>18}",
        ]
        lines += [
            f"  {r.operator:<18}{'x'.join(map(str, r.shape)):<20}{r.codes:>6}{r.index_bits:>6}"
            f"{f'{r.bytes_before:,} -> {r.bytes_after:,}':>18}"
            + (f"  left: {r.left}" if r.left else "")
            for r in self.rows
        ]
        return "\n".join(lines)


def tflm(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inputs: Any = None,
    max_arena: int | None = None,
) -> TFLMReport:
    """Write an int8 file whose weights tflite-micro keeps as lookup tables and decodes as it runs.

    Weights of CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED with at most 128 codes become indices
    of 1 to 7 bits; other tensors, and those that would grow, stay. The board needs tflite-micro's
    operator DECODE, of the version that was tested or one that reads the same format.

    Args:
        path: an int8 .tflite file, from `to_tflite` or anywhere.
        output: the file to write; only one that answers as `path` does is written.
        inputs: samples to compare both files on, beside 100 drawn at random: a tensor or an array
            whose first dimension counts them, for several inputs a tuple of those. Floating values
            are quantized; images may have channels first.
        max_arena: most bytes of working memory. A decoded weight lies in the arena while its
            operator runs: the largest layers are cut into parts along their output channels until
            it fits, at some 500 bytes a part; weights that even so do not fit are left.

    Returns:
        A `TFLMReport`.

    Raises:
        ExportError: the outputs differ; no tensor becomes smaller; the file is float, compiled for
            an NPU, or has an operator that tflite-micro lacks.
        FileNotFoundError: the output's folder does not exist.
        ImportError: tflite-micro is not installed, or in another version than was tested.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from torchclust import cluster_
        >>> from torchclust.export.tflite import to_tflite
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 3), torch.nn.ReLU()).eval()
        >>> model = cluster_(model, 4, codebook_dtype="int8")
        >>> folder, images = pathlib.Path(tempfile.mkdtemp()), torch.rand(8, 16, 6, 6)
        >>> _ = to_tflite(model, images[:1], folder / "model.tflite", calibration=[images])
        >>> report = tflm(folder / "model.tflite", folder / "tables.tflite", inputs=images)
        >>> report.rows[0].index_bits, report.compared
        (2, 108)
        >>> report.flash_after < 0.5 * report.flash_before
        True
    """
    path, output, version = Path(path), Path(output), tested_version()
    check_folder(output)
    content = path.read_bytes()
    ports = check_runs_on_micro(content, str(path))
    samples = [] if inputs is None else list(as_inputs(inputs, ports))
    if not samples or all(p.dtype == "int8" for p in ports):
        samples += random_inputs(ports, RANDOM)
    planned = plan(content, max_arena)
    if all(row.left for row in planned.rows):
        raise ExportError(
            f"{path} has no weight that a lookup table makes smaller: cluster the model before "
            "to_tflite (at most 128 codes; 4, 8 or 16 clusters pay off), or see inspect_tflite"
        )
    ratio = _compare(content, planned.content, samples)
    write_whole(output, planned.content)
    return TFLMReport(
        path=output,
        rows=planned.rows,
        flash_before=len(content),
        flash_after=len(planned.content),
        arena_before=least_arena(content),
        arena_after=planned.arena,
        time_ratio=ratio,
        compared=len(samples),
        version=version,
    )


def tested_version() -> str:
    """The installed tflite-micro's version, which is the one whose format was tested.

    Raises:
        ImportError: another version is installed, or none.
    """
    try:
        found = metadata.version("tflite-micro")
    except metadata.PackageNotFoundError:
        found = None
    if found != TESTED:
        age = "not installed" if found is None else f"{found}, which is {_age(found)}"
        raise ImportError(
            f"lookup tables were tested with tflite-micro {TESTED}, here it is {age}; their "
            f"format is young and may change:  pip install tflite-micro=={TESTED}"
        )
    return TESTED


def _age(version: str) -> str:
    return "older" if version < TESTED else "newer"  # 0.dev and a date


def _compare(before: bytes, after: bytes, samples: Sequence[tuple[Array, ...]]) -> float:
    """How much longer the second file takes, once its every output has equalled the first's.

    Raises:
        ExportError: they differ.
    """
    pairs = list(_answers(before, after, samples))
    for number, (want, got, _, _) in enumerate(pairs):
        for position, (x, y) in enumerate(zip(want, got, strict=True)):
            wrong = int(np.count_nonzero(x != y))
            if wrong:
                raise ExportError(
                    "tflite-micro answers differently with lookup tables, so nothing was written: "
                    f"input {number} of {len(samples)}, output {position}: {wrong} of {x.size} "
                    "values. Please report this with the file"
                )
    times = ([p[2] for p in pairs], [p[3] for p in pairs])
    return statistics.median(times[1]) / statistics.median(times[0])


def _answers(
    before: bytes, after: bytes, samples: Sequence[tuple[Array, ...]]
) -> Iterator[tuple[list[Array], list[Array], float, float]]:
    """Both files' outputs for each sample, and the seconds that each took."""
    first, second = Micro(before), Micro(after)
    for sample in track(samples, "Comparing in tflite-micro"):
        started = time.perf_counter()
        want = first(sample)
        middle = time.perf_counter()
        got = second(sample)
        yield want, got, middle - started, time.perf_counter() - middle
