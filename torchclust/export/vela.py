"""Compiling a .tflite file for an Ethos-U with Arm's Vela, and reading its figures.

In: an int8 .tflite file and a chip. Out: the compiled file, and a `VelaReport` of Vela's figures.
Vela is a program of its own; it runs as a subprocess of the same Python environment, in a folder of
its own, and what it wrote moves to the output folder when it succeeded. It exits with 0 when it
leaves operators to the CPU, and prints which.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torchclust.export.accelerators import Configuration
from torchclust.export.backends import INSTALL
from torchclust.export.inspect import Inspection, inspect_tflite
from torchclust.export.vela_log import (
    CpuOperator,
    counts,
    ending,
    is_complete,
    last_words,
    left_on_cpu,
)

_KIB = 1024


class VelaError(RuntimeError):
    """Vela could not compile the file; the message ends with Vela's own last lines."""


@dataclass(frozen=True)
class VelaLayer:
    """One row of Vela's per-layer table: estimated cycles and multiply-accumulates."""

    operator: str
    target: str
    cycles: int
    macs: int
    name: str


@dataclass(frozen=True)
class VelaReport:
    """Vela's figures for one file; estimates of its model of the hardware, not measurements.

    Attributes:
        path: the compiled file.
        accelerator, system_config, memory_mode, vela_version: under which the figures hold.
        encoded_weight_bytes: all weights as the accelerator decodes them.
        original_weight_bytes: the same weights before encoding.
        flash_bytes: flash for weights and constants; 0 where the system keeps them in DRAM.
        sram_bytes: on-chip memory.
        dram_bytes: off-chip memory for constants and feature maps; 0 where there is none.
        cycles: one inference.
        inference_seconds: the same at the configuration's clock.
        macs: multiply-accumulates of one inference.
        cpu_ops, npu_ops: operators left to the CPU, and on the accelerator.
        cpu_operators: which ones and why.
        layers: the per-layer table.
    """

    path: Path
    accelerator: str
    system_config: str
    memory_mode: str
    vela_version: str
    encoded_weight_bytes: int
    original_weight_bytes: int
    flash_bytes: int
    sram_bytes: int
    dram_bytes: int
    cycles: int
    inference_seconds: float
    macs: int
    cpu_ops: int
    npu_ops: int
    cpu_operators: tuple[CpuOperator, ...]
    layers: tuple[VelaLayer, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.accelerator}, {self.system_config}, {self.memory_mode}, "
            f"Vela {self.vela_version}",
            f"  encoded weights {self.encoded_weight_bytes / _KIB:,.1f} KiB "
            f"(of {self.original_weight_bytes / _KIB:,.1f}), flash {self.flash_bytes / _KIB:,.1f}, "
            f"SRAM {self.sram_bytes / _KIB:,.1f}, DRAM {self.dram_bytes / _KIB:,.1f} KiB",
            f"  {self.cycles:,} cycles, {self.inference_seconds * 1e3:.3f} ms estimated; "
            f"{self.npu_ops} operators on the NPU, {self.cpu_ops} on the CPU",
        ]
        lines += [
            f"  CPU: {op.operator} ({op.module or op.tensor}): {op.reason}"
            for op in self.cpu_operators
        ]
        return "\n".join(lines)


def vela(
    path: str | os.PathLike[str],
    *,
    accelerator: str = "ethos-u55-128",
    system_config: str | None = None,
    memory_mode: str | None = None,
    config: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> VelaReport:
    """Compile a .tflite file for an Ethos-U and report what it will cost.

    Args:
        path: an int8 .tflite file, for example from `to_tflite`.
        accelerator: ``"ethos-u55-32"`` .. ``-256`` (MACs per cycle), ``"ethos-u65-256"``, ``-512``,
            ``"ethos-u85-128"`` .. ``-2048``.
        system_config: a section of the configuration file: clock, memories, their speed. By default
            ``Ethos_U55_High_End_Embedded``, ``Ethos_U65_High_End`` or ``Ethos_U85_SYS_DRAM_Mid``.
        memory_mode: where weights and feature maps live. By default ``Shared_Sram`` for U55,
            ``Dedicated_Sram`` for U65, ``Dedicated_Sram_384KB`` for U85.
        config: a vela.ini that has those sections; by default the one that comes with Vela.
        output_dir: where the compiled file ``NAME_vela.tflite`` and Vela's tables go; by default
            beside the input. Created if missing.

    Returns:
        A `VelaReport`.

    Raises:
        ValueError: unknown accelerator, or not a .tflite file.
        VelaError: Vela failed; its last lines are in the message.
        ImportError: Vela is not installed.

    Warns:
        UserWarning: a U85 with a weight tensor of 17 to 32 codes: its fast weight format steps at 4
            and 16 codes, so more than 16 may save nothing there.
    """
    path = Path(path)
    chosen = Configuration.of(accelerator, system_config, memory_mode, config)
    if importlib.util.find_spec("ethosu") is None:
        raise ImportError(f"compiling needs Vela, which is not installed:  {INSTALL}")
    inspected = inspect_tflite(path)
    if accelerator.startswith("ethos-u85"):
        _warn_about_codes(inspected)
    target = Path(output_dir) if output_dir is not None else path.parent
    return compile_with(path, chosen, target, made_by=inspected.made_by)


def compile_with(
    path: Path,
    chosen: Configuration,
    target: Path,
    output_format: str = "tflite",
    made_by: Mapping[str, str] | None = None,
) -> VelaReport:
    """Compile whatever Vela reads (.tflite, .tosa) into a folder and read its figures.

    ``made_by``: the file's operators by their outputs, for those that Vela has no name for.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = _run(
            path,
            {
                "accelerator-config": chosen.accelerator,
                "system-config": chosen.system_config,
                "memory-mode": chosen.memory_mode,
                "config": chosen.config,
                "output-dir": folder,
                "output-format": output_format,
            },
        )
        summary = _one_row(Path(folder), path.stem)
        layers = _layers(Path(folder) / f"{path.stem}_per-layer.csv")
        target.mkdir(parents=True, exist_ok=True)
        (compiled,) = Path(folder).glob(f"{path.stem}_vela.*")
        for file in Path(folder).iterdir():
            shutil.move(file, target / file.name)
    return _report(target / compiled.name, chosen, summary, log, made_by or {}, layers)


def _run(path: Path, options: Mapping[str, str]) -> str:
    """Vela's output, standard error included."""
    command = [sys.executable, "-m", "ethosu.vela", os.fspath(path), "--verbose-performance"]
    for name, value in options.items():
        command += [f"--{name}", value]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0 or not is_complete(done.stdout):
        raise VelaError(
            f"Vela cannot compile {path} for {options['accelerator-config']} "
            f"({options['system-config']}, {options['memory-mode']}); {ending(done.returncode)} "
            f"and said:\n  {last_words(done.stdout)}"
        )
    return done.stdout


def _one_row(folder: Path, stem: str) -> dict[str, str]:
    (file,) = folder.glob(f"{stem}_summary_*.csv")
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    return row


def _layers(file: Path) -> tuple[VelaLayer, ...]:
    with file.open(newline="") as lines:
        return tuple(
            VelaLayer(
                operator=row["Original Operator"],
                target=row["Target"],
                cycles=round(float(row["Op Cycles"])),
                macs=round(float(row["MAC Count"])),
                name=row["Name"],
            )
            for row in csv.DictReader(lines)
        )


def _report(
    compiled: Path,
    chosen: Configuration,
    summary: Mapping[str, str],
    log: str,
    made_by: Mapping[str, str],
    layers: tuple[VelaLayer, ...],
) -> VelaReport:
    def kib(*names: str) -> int:
        return round(sum(float(summary[f"{name}_memory_used"]) for name in names) * _KIB)

    return VelaReport(
        path=compiled,
        accelerator=chosen.accelerator,
        system_config=chosen.system_config,
        memory_mode=chosen.memory_mode,
        vela_version=metadata.version("ethos-u-vela"),
        encoded_weight_bytes=round(float(summary["total_npu_encoded_weights"])),
        original_weight_bytes=round(float(summary["total_original_weights"])),
        flash_bytes=kib("on_chip_flash", "off_chip_flash"),
        sram_bytes=kib("sram"),
        dram_bytes=kib("dram"),
        cycles=round(float(summary["cycles_total"])),
        inference_seconds=float(summary["inference_time"]),
        macs=round(float(summary["nn_macs"])),
        cpu_ops=counts(log)[0],
        npu_ops=counts(log)[1],
        cpu_operators=left_on_cpu(log, made_by),
        layers=layers,
    )


def _warn_about_codes(inspected: Inspection) -> None:
    for row in inspected:
        if row.dtype == "int8" and 16 < row.codes <= 32:
            warnings.warn(
                f"{row.name} has {row.codes} codes: the Ethos-U85's fast weight format steps at 4 "
                f"and 16 codes, so it may save nothing; cluster into at most 16 (15 with int8 "
                f"codebooks)",
                stacklevel=3,
            )
