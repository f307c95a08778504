"""Integers at a file's ends: int8 where the quantizer leaves float, uint8 where a camera writes.

The quantizer leaves an input or an output in float where the operator there has no int8 form, and a
microcontroller's program would have to convert it. One QUANTIZE or DEQUANTIZE does it in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from torchclust.export.calibration import Range
from torchclust.export.container import pack, unpack
from torchclust.export.editing import Editing

InputDtype: TypeAlias = Literal["int8", "uint8"]

INPUT_DTYPES = ("int8", "uint8")
_OFFSET = 128  # between the zero points of uint8 and int8 of the same values


def with_integer_ends(
    content: bytes, observed: Mapping[str, Range], input_dtype: InputDtype
) -> bytes:
    """The same int8 file with no float input or output.

    Args:
        content: an int8 file.
        observed: ranges by tensor name, of those in float too.
        input_dtype: ``"uint8"`` puts a QUANTIZE from uint8 in front of each quantized input.
    """
    model = unpack(content)
    ends = _Ends(model, observed)
    ends.quantize_outputs()
    ends.quantize_inputs()
    if input_dtype == "uint8":
        ends.widen_inputs()
    return pack(model, len(content)) if ends.changed else content


class _Ends(Editing):
    """The main subgraph, its inputs and outputs."""

    def __init__(self, model: Any, observed: Mapping[str, Range]) -> None:
        super().__init__(model, model.subgraphs[0])
        self.observed, self.changed = observed, False
        self.operators = self.subgraph.operators = list(self.subgraph.operators)

    def quantize_outputs(self) -> None:
        """Let each float output be what it was dequantized from, or quantize it."""
        makers = {int(i): o for o in self.operators for i in o.outputs}
        for number, output in enumerate(self._floats(self.subgraph.outputs)):
            if output is None:
                continue
            maker = makers.get(output)
            if maker is not None and self.kind(maker) == "DEQUANTIZE":
                self._replace("outputs", output, int(maker.inputs[0]))
                self._remove_unread(maker)
            else:
                self._replace("outputs", output, self._quantized(output))
                self.add("QUANTIZE", [output], int(self.subgraph.outputs[number]), None)

    def quantize_inputs(self) -> None:
        """Put a DEQUANTIZE behind each float input."""
        for given in self._floats(self.subgraph.inputs):
            if given is not None:
                self._lead("DEQUANTIZE", given, self._quantized(given))

    def widen_inputs(self) -> None:
        """Put a QUANTIZE from uint8 behind each int8 input: the same steps from another zero."""
        for given in [int(i) for i in self.subgraph.inputs]:
            tensor = self.tensor(given)
            if tensor.type == self.schema.TensorType.INT8:
                scale, zero = tensor.quantization.scale[0], tensor.quantization.zeroPoint[0]
                kind = self.schema.TensorType.UINT8
                self._lead("QUANTIZE", given, self._with_scale(given, kind, scale, zero + _OFFSET))

    def _floats(self, tensors: Any) -> list[int | None]:
        """Each of the tensors that is in float; None in place of the others."""
        kind = self.schema.TensorType.FLOAT32
        return [int(i) if self.tensor(int(i)).type == kind else None for i in tensors]

    def _lead(self, kind: str, given: int, new: int) -> None:
        """Make another tensor the input, and this one what an operator makes of it first."""
        self._replace("inputs", given, new)
        self.add(kind, [new], given, None)
        self.operators.insert(0, self.operators.pop())

    def _quantized(self, index: int) -> int:
        """A new int8 tensor for the values of a float one, over its observed range."""
        low, high = self.observed[self.name(index)]
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
        zero = round(-_OFFSET - low / scale)
        return self._with_scale(index, self.schema.TensorType.INT8, scale, zero)

    def _with_scale(self, index: int, kind: int, scale: float, zero: int) -> int:
        new = self.like(index, self.shape(index))
        tensor, quantization = self.tensor(new), self.schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = [float(scale)], [int(zero)]
        tensor.type, tensor.quantization = kind, quantization
        return new

    def _replace(self, end: Literal["inputs", "outputs"], old: int, new: int) -> None:
        """Another tensor in the place of one, in the signature too."""
        self.changed = True
        found = [new if int(i) == old else int(i) for i in getattr(self.subgraph, end)]
        setattr(self.subgraph, end, found)
        for signature in self.model.signatureDefs or ():
            for entry in getattr(signature, end) or ():
                entry.tensorIndex = new if int(entry.tensorIndex) == old else entry.tensorIndex

    def _remove_unread(self, operator: Any) -> None:
        made = {int(i) for i in operator.outputs}
        read = {int(i) for o in self.operators for i in o.inputs}
        if not made & (read | {int(i) for i in self.subgraph.outputs}):
            self.operators.remove(operator)
