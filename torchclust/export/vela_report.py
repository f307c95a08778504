"""Vela's figures as values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchclust.export.compiled.rows import CompiledInspection
from torchclust.export.vela_log import CpuOperator

KIB = 1024


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
        verified: what `verify_compiled` found in the compiled file: every weight and scale as in
            the original. None if the compiler rearranged a layer in a way that it does not follow.
        not_verified: then why, in one line; else empty.
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
    verified: CompiledInspection | None
    not_verified: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **dataclasses.asdict(self),
            "path": str(self.path),
            "verified": None if self.verified is None else self.verified.to_dict(),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.accelerator}, {self.system_config}, {self.memory_mode}, "
            f"Vela {self.vela_version}",
            f"  encoded weights {self.encoded_weight_bytes / KIB:,.1f} KiB "
            f"(of {self.original_weight_bytes / KIB:,.1f}), flash {self.flash_bytes / KIB:,.1f}, "
            f"SRAM {self.sram_bytes / KIB:,.1f}, DRAM {self.dram_bytes / KIB:,.1f} KiB",
            f"  {self.cycles:,} cycles, {self.inference_seconds * 1e3:.3f} ms estimated; "
            f"{self.npu_ops} operators on the NPU, {self.cpu_ops} on the CPU",
        ]
        lines += [
            f"  CPU: {op.operator} ({op.module or op.tensor}): {op.reason}"
            for op in self.cpu_operators
        ]
        if self.verified is None:
            lines.append(f"  not verified: {self.not_verified}")
        else:
            lines.append(
                f"  verified: {self.verified.weights:,} weights as in {self.verified.original}"
            )
        return "\n".join(lines)
