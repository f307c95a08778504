"""Running a .tflite file on torch tensors, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.export import backends
from torchclust.export.backends import ExportError, first_line
from torchclust.export.graph import read_graph

Array: TypeAlias = npt.NDArray[Any]

_ZERO_DIVISOR = (
    "In int8 a divisor of less than 1/510 of its tensor's largest value is zero. Add a constant "
    "larger than that to it, or keep the division outside"
)


class Runner:
    """One .tflite file, ready to run sample by sample.

    Args:
        content: the file.
        keep_all: keep every intermediate tensor for `tensor`.
        reference: LiteRT's reference kernels, which tflite-micro equals to the bit; else the fast
            ones.

    Raises:
        ExportError: LiteRT has no kernel for an operator of the file.
    """

    def __init__(self, content: bytes, *, keep_all: bool = False, reference: bool = True) -> None:
        self._content = content
        litert = backends.interpreter()
        resolver = litert.OpResolverType
        kernels = resolver.BUILTIN_REF if reference else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            with backends.quietly():
                self._interpreter = litert.Interpreter(
                    model_content=content,
                    num_threads=torch.get_num_threads(),
                    experimental_op_resolver_type=kernels,
                    experimental_preserve_all_tensors=keep_all,
                )
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT cannot run this file: {first_line(error)}\n"
                "An operator without a kernel, such as sort or topk, has to stay outside: "
                "export the part of the model before it"
            ) from error
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()

    def __call__(self, sample: Sequence[Tensor]) -> list[Array]:
        """Run one sample in float; quantized inputs and outputs are converted on the way.

        Raises:
            ExportError: an operator cannot take these values, as a division by zero.
        """
        for detail, x in zip(self._inputs, sample, strict=True):
            self._interpreter.set_tensor(detail["index"], _quantized(x.numpy(), detail))
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise ExportError(_stopped(self._content, first_line(error))) from error
        return [_dequantized(self._interpreter.get_tensor(d["index"]), d) for d in self._outputs]

    def given(self) -> list[Array]:
        """The inputs of the last run, as the file takes them."""
        return [self._interpreter.get_tensor(d["index"]) for d in self._inputs]

    def tensor(self, index: int) -> Array:
        """The tensor of that index after a run, with ``keep_all``."""
        values: Array = self._interpreter.get_tensor(index)
        return values

    def values(self, index: int) -> Array:
        """The same in float, of a quantized tensor too."""
        detail = next(d for d in self._interpreter.get_tensor_details() if d["index"] == index)
        return _dequantized(self.tensor(index), detail)


def _stopped(content: bytes, said: str) -> str:
    """What stops a run, from LiteRT's own line, which counts operators."""
    number = re.search(r"Node number (\d+)", said)
    if number is None:
        return f"LiteRT stops while it runs this file: {said}"
    graph = read_graph(content)
    operator = graph.operators[int(number[1])]
    hint = f". {_ZERO_DIVISOR}" if operator.name == "DIV" else ""
    made = graph.tensors[operator.outputs[0]].name.split(";")[0]
    return f"LiteRT stops at {operator.name}, which makes {made!r}: {said}{hint}"


def _quantized(x: Array, detail: Mapping[str, Any]) -> Array:
    dtype = detail["dtype"]
    scale, zero_point = detail["quantization"]
    if scale == 0:
        return x.astype(dtype)
    info = np.iinfo(dtype)
    codes: Array = np.clip(np.rint(x / scale) + zero_point, info.min, info.max).astype(dtype)
    return codes


def _dequantized(y: Array, detail: Mapping[str, Any]) -> Array:
    scale, zero_point = detail["quantization"]
    if scale == 0:
        return y.astype(np.float32)
    values: Array = ((y.astype(np.float32) - zero_point) * scale).astype(np.float32)
    return values
