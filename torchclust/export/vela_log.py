"""What Vela prints: how many operators it left to the CPU, which and why, and what went wrong."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

_CPU_COUNT = re.compile(r"^CPU operators = (\d+)", re.MULTILINE)
_NPU_COUNT = re.compile(r"^NPU operators = (\d+)", re.MULTILINE)
_LEFT_ON_CPU = re.compile(
    r"^Warning \([^)]*\) operator: (\w+), ofm: '([^']*)'\n(?:\s*-?\s*)Reason: (.*)$", re.MULTILINE
)
_TENSOR_NAME = re.compile(r" \([^()]*/[^()]*\)")


@dataclass(frozen=True)
class CpuOperator:
    """An operator that Vela leaves to the CPU.

    Attributes:
        operator: TFLite's name for it, for example ``"LEAKY_RELU"``.
        tensor: the name of its output in the file.
        module: the path of the torch module that made it, where the tensor's name tells.
        reason: in Vela's words.
    """

    operator: str
    tensor: str
    module: str | None
    reason: str


def is_complete(log: str) -> bool:
    """Whether Vela came to its end."""
    return _CPU_COUNT.search(log) is not None


def counts(log: str) -> tuple[int, int]:
    """Operators on the CPU and on the NPU."""
    return _count(_CPU_COUNT, log), _count(_NPU_COUNT, log)


def left_on_cpu(log: str, made_by: Mapping[str, str]) -> tuple[CpuOperator, ...]:
    """The operators that stay on the CPU.

    Args:
        log: Vela's output.
        made_by: the file's operator by its output tensor's name; Vela calls those that it does not
            know "None".
    """
    return tuple(
        CpuOperator(
            made_by.get(tensor, operator) if operator == "None" else operator,
            tensor,
            _torch_path(tensor),
            _TENSOR_NAME.sub("", reason),
        )
        for operator, tensor, reason in _LEFT_ON_CPU.findall(log)
    )


def ending(status: int) -> str:
    """How the process ended, in words."""
    if status >= 0:
        return f"it exited with {status}"
    return f"it crashed ({signal.Signals(-status).name}), which is a fault of Vela's own,"


def last_words(output: str) -> str:
    """The lines that say why: Vela's own errors, or else the last ones."""
    said = [line.strip() for line in output.splitlines() if line.strip()]
    crashed = any(line.startswith("Traceback") for line in said)
    errors = [line for line in said if line.startswith(("Error", "Invalid", "Warning"))]
    last = said[-1:] if crashed else said[-3:]
    return "\n  ".join(dict.fromkeys([*errors[-3:], *last])) or "nothing"


def _count(pattern: re.Pattern[str], log: str) -> int:
    found = pattern.search(log)
    return int(found[1]) if found else 0


def _torch_path(tensor: str) -> str | None:
    """The torch module that a tensor's name from the converter speaks of.

    The name lists modules as ``class_attribute``; class names seldom have an underscore.
    """
    steps = tensor.partition(";")[0].split("/")[2:]
    return ".".join(s.rpartition(".")[2].lstrip("_").partition("_")[2] for s in steps) or None
