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
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from torchclust.export.accelerators import Configuration
from torchclust.export.backends import INSTALL
from torchclust.export.compiled.errors import NotVerifiedError
from torchclust.export.compiled.rows import CompiledInspection
from torchclust.export.compiled.verification import verify_compiled
from torchclust.export.inspect import Inspection, inspect_tflite
from torchclust.export.resolver import ETHOS_U
from torchclust.export.vela_log import (
    counts,
    ending,
    is_complete,
    last_words,
    left_on_cpu,
)
from torchclust.export.vela_report import KIB, VelaLayer, VelaReport


class VelaError(RuntimeError):
    """Vela could not compile the file; the message ends with Vela's own last lines."""


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
        config: a vendor's file that has those sections; by default the one that comes with Vela.
            Where it has a single system configuration or memory mode, that need not be named.
        output_dir: where the compiled file ``NAME_vela.tflite`` and Vela's tables go; by default
            beside the input. Created if missing.

    Returns:
        A `VelaReport`.

    Raises:
        ValueError: unknown accelerator, a configuration that is not in the file of those, not a
            .tflite file, a float one, or one that Vela compiled before.
        VelaError: Vela failed; its last lines are in the message.
        CompiledFileError: what Vela wrote does not hold the file's weights and scales, value by
            value (see `verify_compiled`).
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
    _check_runs_on_ethos_u(inspected)
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
        compiled = _beginning(Path(folder), f"{path.stem}_vela.")
        verified = _verified(compiled, path)
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(folder).iterdir():
            shutil.move(file, target / file.name)
    return _report(target / compiled.name, chosen, summary, log, made_by or {}, layers, verified)


def _verified(compiled: Path, original: Path) -> CompiledInspection | str:
    """What the compiled file holds, or why that cannot be compared with the original."""
    if compiled.suffix != ".tflite":
        return "only .tflite files are compared with what they were made from"
    try:
        return verify_compiled(compiled, original)
    except NotVerifiedError as error:
        return str(error).removeprefix(f"{compiled}: ")


def _run(path: Path, options: Mapping[str, str]) -> str:
    """Vela's output, standard error included."""
    # Absolute, for a name that begins as an option does.
    command = [sys.executable, "-m", "ethosu.vela", os.fspath(path.absolute())]
    command.append("--verbose-performance")
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


def _beginning(folder: Path, name: str) -> Path:
    """The one file whose name begins like this, as it is: a pattern would read brackets in it."""
    (file,) = (file for file in folder.iterdir() if file.name.startswith(name))
    return file


def _one_row(folder: Path, stem: str) -> dict[str, str]:
    with _beginning(folder, f"{stem}_summary_").open(newline="") as lines:
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
    verified: CompiledInspection | str,
) -> VelaReport:
    def kib(*names: str) -> int:
        return round(sum(float(summary[f"{name}_memory_used"]) for name in names) * KIB)

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
        verified=None if isinstance(verified, str) else replace(verified, path=compiled),
        not_verified=verified if isinstance(verified, str) else "",
    )


def _check_runs_on_ethos_u(inspected: Inspection) -> None:
    """Refuse what Vela would take and leave to the CPU, all of it."""
    if ETHOS_U in inspected.operators:
        raise ValueError(
            f"{inspected.path} was compiled by Vela before: give the file that Vela read"
        )
    ports = (*inspected.inputs, *inspected.outputs)
    scales = [*(p.scale for p in ports), *(row.scales for row in inspected)]
    if not any(scales) and "QUANTIZE" not in inspected.operators:
        raise ValueError(
            f"{inspected.path} is a float file, and an Ethos-U computes with integers alone. Write "
            "an int8 one:  to_tflite(model, inputs, path, calibration=[samples])"
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
