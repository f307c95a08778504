"""What goes onto the board: the model as C++, its operators, its arena, test vectors, a card."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torchclust.export import cpp
from torchclust.export.backends import ExportError
from torchclust.export.card import card, run_report
from torchclust.export.graph import Array, read_graph
from torchclust.export.inspect import Port, inspect_tflite
from torchclust.export.micro_interpreter import (
    Micro,
    as_inputs,
    check_runs_on_micro,
    least_arena,
    may_be_random,
    random_inputs,
)
from torchclust.export.resolver import registrations
from torchclust.export.vela import vela
from torchclust.export.vela_report import VelaReport

VECTORS = 10
_MARGIN = 1.02
_PERSISTENT = 4096  # bytes beside an Ethos-U's scratch memory: a few nodes and tensors
_STEP = 16
MODEL, CARD = "model.tflite", "MODEL_CARD.md"
FILES = ("model.h", "model.cc", "operators.h", "test_vectors.h", "main.cc", MODEL, CARD)


@dataclass(frozen=True)
class BoardKit:
    """What `board_kit` wrote.

    Attributes:
        folder: where.
        flash_bytes: of the model.
        arena_bytes: of working memory, with a margin of 2 %.
        operators: what the resolver registers.
        compiled: Vela's figures, for an Ethos-U.
    """

    folder: Path
    flash_bytes: int
    arena_bytes: int
    operators: tuple[str, ...]
    compiled: VelaReport | None

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {', '.join(FILES)}",
            f"  flash {self.flash_bytes / 1024:,.1f} KiB, arena {self.arena_bytes / 1024:,.1f} KiB",
            f"  operators: {', '.join(self.operators)}",
        ]
        return "\n".join(lines + ([str(self.compiled)] if self.compiled else []))


def board_kit(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    inputs: Any = None,
    labels: Sequence[str] = (),
    accelerator: str | None = None,
    overwrite: bool = False,
) -> BoardKit:
    """Write what a board's program needs of an int8 file: seven files for a C++ project.

    ``model.h`` and ``model.cc`` (an aligned, constant array; shapes, scales, zero points, labels,
    arena size), ``operators.h`` (a resolver with this model's operators and no others),
    ``test_vectors.h`` (ten inputs, and the outputs expected to the bit), ``main.cc`` (quantizes an
    input, runs the model, prints), ``model.tflite`` and ``MODEL_CARD.md``. Where a ``report.json``
    of `torchclust run` lies beside the file, the card has its accuracies.

    Args:
        path: an int8 .tflite file, with lookup tables (`tflm`) or without.
        folder: made if need be; one that holds something needs `overwrite`.
        inputs: samples for the test vectors, as `tflm` takes them; else they are random. Fewer than
            ten are joined by random ones, or repeated where random ones would be no valid input.
        labels: of the classes, for the output.
        accelerator: compile for this Ethos-U (as `vela` names it). The test vectors are still the
            uncompiled file's, whose answers an Ethos-U gives.
        overwrite: replace an earlier kit's files; others stay.

    Returns:
        A `BoardKit`.

    Raises:
        ExportError: a float file, one compiled before, or an operator that tflite-micro lacks.
        FileExistsError, NotADirectoryError: the folder holds something, or is a file.
        ValueError: labels that are not one for each class, samples that the file cannot take, or
            a compiled file that would replace the one given.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from torchclust import cluster_
        >>> from torchclust.export.tflite import to_tflite
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> model = cluster_(model, 4, codebook_dtype="int8")
        >>> path, images = pathlib.Path(tempfile.mkdtemp()) / "model.tflite", torch.rand(8, 3, 6, 6)
        >>> _ = to_tflite(model, images[:1], path, calibration=[images])
        >>> kit = board_kit(path, path.with_name("board"), inputs=images)
        >>> kit.operators
        ('CONV_2D',)
        >>> "AddConv2D" in (kit.folder / "operators.h").read_text()
        True
    """
    path, folder = Path(path), Path(folder)
    inspected = inspect_tflite(path)
    content = path.read_bytes()
    ports = check_runs_on_micro(content, str(path))
    classes = math.prod(inspected.outputs[0].shape)
    if labels and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes: give one for each")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder for the kit")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: overwrite=True (--overwrite) replaces an earlier kit's files"
        )
    if accelerator is not None and _is_same(folder / MODEL, path):
        raise ValueError(
            f"the kit's {MODEL}, compiled for {accelerator}, would replace {path} itself: name "
            f"another folder than {folder}"
        )
    run = Micro(content)
    vectors = tuple((sample, run(sample)) for sample in _samples(inputs, ports))
    compiled, content, arena, note = _for_the_chip(path, content, accelerator)
    needed = registrations(operator.name for operator in read_graph(content).operators)
    board = cpp.Board(
        source=path.name,
        content=content,
        inputs=inspected.inputs,
        outputs=inspected.outputs,
        registrations=needed,
        arena=arena,
        arena_note=note,
        labels=tuple(labels),
        vectors=vectors,
    )
    texts = {**cpp.files(board), CARD: card(board, inspected, run_report(path), compiled)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / MODEL).write_bytes(content)
    return BoardKit(folder, len(content), arena, tuple(needed), compiled)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _samples(inputs: Any, ports: Sequence[Port]) -> list[tuple[Array, ...]]:
    """As many samples as there are test vectors."""
    given = [] if inputs is None else list(islice(as_inputs(inputs, ports), VECTORS))
    if given and not may_be_random(ports):
        return list(islice(cycle(given), VECTORS))
    return given + random_inputs(ports, VECTORS - len(given))


def _for_the_chip(
    path: Path, content: bytes, accelerator: str | None
) -> tuple[VelaReport | None, bytes, int, str]:
    """Vela's report if there is an NPU, the file for the flash, its arena, and where from."""
    if accelerator is None:
        least = least_arena(content)
        return None, content, _rounded(least * _MARGIN), (
            f"The least arena that works is {least:,} bytes, found with tflite-micro on a 64-bit "
            "machine; 2 % on top. Optimized kernels (CMSIS-NN) ask for scratch memory beside it."
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        report = vela(copy, accelerator=accelerator)
        compiled = report.path.read_bytes()
    scratch = [t for t in read_graph(compiled).tensors if t.name.startswith("scratch")]
    if not scratch:
        raise ExportError(f"{path}: Vela left every operator to the CPU for {accelerator}")
    size = sum(math.prod(t.shape) for t in scratch)
    return report, compiled, _rounded((size + _PERSISTENT) * _MARGIN), (
        f"{size:,} bytes of scratch memory for the {accelerator}, {_PERSISTENT:,} for "
        "tflite-micro's own, and 2 %; only the board can tell the least that works."
    )  # fmt: skip


def _rounded(size: float) -> int:
    return math.ceil(size / _STEP) * _STEP
