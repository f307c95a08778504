"""A file in tflite-micro's interpreter: what a microcontroller answers, and the memory it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchclust.export import backends
from torchclust.export.backends import ExportError
from torchclust.export.graph import Array, Graph, read_graph
from torchclust.export.inspect import Port, port
from torchclust.export.resolver import ETHOS_U, registrations

_AMPLE = 1 << 26  # bytes of arena, more than any microcontroller has
_STEP = 16  # the interpreter's alignment
_RECORDED = re.compile(r"Arena allocation total (\d+) bytes")
_RUN = """
import sys
from tflite_micro import runtime
runtime.Interpreter.from_bytes(sys.stdin.buffer.read(), arena_size=int(sys.argv[1])).invoke()
"""
# Each trial is a child of its own: kernels may write past too small an arena.
_SEARCH = """
import os, sys
from tflite_micro import runtime

content, (low, high, step) = sys.stdin.buffer.read(), map(int, sys.argv[1:])

def fits(steps):
    child = os.fork()
    if child == 0:
        try:
            runtime.Interpreter.from_bytes(content, arena_size=steps * step)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

while not fits(high):
    low, high = high, high + high // 8 + 1
while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle, high)
print(high * step)
"""
# Operators whose kernels say so when they cannot do something; others may abort the process.
_COMMON_OPERATORS = """
ABS ADD AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEQUANTIZE DIV
EMBEDDING_LOOKUP EXP FULLY_CONNECTED HARD_SWISH LEAKY_RELU LOG LOGISTIC MAXIMUM MAX_POOL_2D MEAN MUL
PAD PADV2 QUANTIZE REDUCE_MAX RELU RELU6 RESHAPE RESIZE_NEAREST_NEIGHBOR RSQRT SLICE SOFTMAX SQRT
SQUARED_DIFFERENCE STRIDED_SLICE SUB TANH TFLM_DECODE TRANSPOSE TRANSPOSE_CONV
"""
_QUANTIZED = ("int8", "uint8", "int16")
# Its words -> what to do, where that is known. Recurrent layers come with their steps one by one.
_REMEDIES = {
    "kMaxInputNum": ". A CONCATENATION takes ten inputs at most: of a recurrent layer return the "
    "last state, h_n, in the place of all outputs, or export one step (docs/microcontrollers.md)",
}


class Micro:
    """One file, ready to run on what its inputs hold: integers.

    Args:
        content: the file.
        arena: bytes of working memory.

    Raises:
        ExportError: tflite-micro cannot run it; the message ends with its own words.
    """

    def __init__(self, content: bytes, arena: int = _AMPLE) -> None:
        graph = read_graph(content)
        self._outputs = len(graph.outputs)
        if not survives(content, graph, arena):
            raise ExportError(
                "tflite-micro cannot run this file: one of its kernels ends the whole process, on "
                "a shape or type that it does not know"
            )
        with backends.heard() as said:
            try:
                runtime = backends.micro()
                self._interpreter = runtime.Interpreter.from_bytes(content, arena_size=arena)
            except RuntimeError as error:
                words = " ".join(said().split()) or str(error)
                remedy = next((r for known, r in _REMEDIES.items() if known in words), "")
                raise ExportError(f"tflite-micro cannot run this file: {words}{remedy}") from error

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run once."""
        for number, x in enumerate(inputs):
            self._interpreter.set_input(x, number)
        self._interpreter.invoke()
        return [np.array(self._interpreter.get_output(i)) for i in range(self._outputs)]

    def recorded_arena(self) -> int:
        """The bytes of its arena that the interpreter says it uses."""
        with backends.heard() as said:
            self._interpreter.print_allocations()
            found = _RECORDED.search(said())
        assert found is not None
        return int(found[1])


def least_arena(content: bytes) -> int:
    """The least arena, in bytes, with which tflite-micro prepares this file, by bisection.

    It is that of this machine, whose pointers are twice as long as a microcontroller's. The search
    begins near what the interpreter says itself.
    """
    recorded = Micro(content).recorded_arena()
    done = _python(_SEARCH, content, recorded * 7 // 8 // _STEP, recorded // _STEP + 1, _STEP)
    done.check_returncode()
    return int(done.stdout.split()[-1])


def survives(content: bytes, graph: Graph, arena: int) -> bool:
    """Whether a file leaves the process alive that runs it on zeros; an error counts as that.

    Where it has other than common operators it is tried in a process of its own.
    """
    if {operator.name for operator in graph.operators} <= set(_COMMON_OPERATORS.split()):
        return True
    return _python(_RUN, content, arena).returncode >= 0


def _python(script: str, content: bytes, *numbers: int) -> subprocess.CompletedProcess[bytes]:
    """A script of its own process that reads the file and these numbers."""
    command = [sys.executable, "-c", script, *map(str, numbers)]
    return subprocess.run(command, input=content, capture_output=True, check=False)


def check_runs_on_micro(content: bytes, name: str) -> tuple[Port, ...]:
    """The inputs of an int8 file that tflite-micro has all operators for.

    Raises:
        ExportError: an operator that it has not, a file compiled for an NPU, a float file.
    """
    graph = read_graph(content)
    operators = [operator.name for operator in graph.operators]
    if ETHOS_U in operators:
        raise ExportError(
            f"{name} was compiled by Vela, and only an Ethos-U runs it: give the file that Vela "
            "read, whose answers are the same"
        )
    registrations(operators)
    inputs = tuple(port(t) for t in graph.inputs)
    floats = [p for p in inputs if p.dtype.startswith("float")]
    if floats:
        raise ExportError(
            f"{name} is not an int8 file: it takes {floats[0].dtype}. Write one:  "
            "to_tflite(model, inputs, path, calibration=[samples])"
        )
    return inputs


def may_be_random(ports: Sequence[Port]) -> bool:
    """Whether any value of its type is a valid input: of a quantized one, not of a token."""
    return all(p.dtype in _QUANTIZED for p in ports)


def random_inputs(ports: Sequence[Port], count: int, seed: int = 0) -> list[tuple[Array, ...]]:
    """So many inputs whose every value is drawn from all that the input's type can hold.

    Raises:
        ExportError: an input holds indices, such as tokens, of which most are out of range.
    """
    for p in ports:
        if p.dtype not in _QUANTIZED:
            raise ExportError(
                f"random {p.dtype} values for the input {p.name!r} may be out of range: give some "
                "that are valid:  inputs=tokens"
            )
    draw = np.random.default_rng(seed)

    def one(p: Port) -> Array:
        limits = np.iinfo(p.dtype)
        return draw.integers(limits.min, limits.max, p.shape, p.dtype, endpoint=True)

    return [tuple(one(p) for p in ports) for _ in range(count)]


def as_inputs(given: Any, ports: Sequence[Port]) -> Iterator[tuple[Array, ...]]:
    """Samples as the file takes them, one by one.

    Args:
        given: a tensor or an array of samples for each input; one alone needs no tuple. Floating
            values are quantized, integers taken as they are; images may have channels first.
        ports: the file's inputs.

    Raises:
        ValueError: their number, shape or values do not fit.
    """
    several = given if isinstance(given, (tuple, list)) else (given,)
    if len(several) != len(ports):
        raise ValueError(f"inputs holds {len(several)} arrays, the file has {len(ports)} inputs")
    columns = [_quantized(x, p) for x, p in zip(several, ports, strict=True)]
    for sample in zip(*columns, strict=True):
        yield tuple(x[None] for x in sample)


def _quantized(given: Tensor | Array, p: Port) -> Array:
    x = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if x.shape[1:] != p.shape[1:] and x.ndim == len(p.shape) > 2:
        x = np.moveaxis(x, 1, -1)
    if x.shape[1:] != p.shape[1:]:
        raise ValueError(
            f"inputs have the shape {x.shape}, the file's input {p.name!r} {p.shape}; all but the "
            "first dimension, which counts samples, must agree"
        )
    return np.ascontiguousarray(_codes(x, p))


def _codes(x: Array, p: Port) -> Array:
    """Values as the input holds them; a cast would make others of those that it cannot hold."""
    is_float = np.issubdtype(x.dtype, np.floating)
    if is_float and np.isnan(x).any():
        raise ValueError(
            f"inputs hold {int(np.isnan(x).sum()):,} NaN for the file's input {p.name!r}, and no "
            "code stands for it: look where they come from, or give  inputs=x.nan_to_num()"
        )
    if is_float and p.scale:
        limits = np.iinfo(p.dtype)
        codes = np.clip(np.rint(x / p.scale) + p.zero_point, limits.min, limits.max)
        return np.asarray(codes, p.dtype)
    with np.errstate(invalid="ignore"):
        codes = x.astype(p.dtype)
    if not np.array_equal(codes, x):
        raise ValueError(
            f"inputs hold {x.dtype} values from {x.min()} to {x.max()}, which the file's input "
            f"{p.name!r}, {p.dtype}, cannot hold: give what the model takes, in float, or codes"
        )
    return codes
