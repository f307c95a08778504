"""Operators that the quantizer leaves in float, between a DEQUANTIZE and a QUANTIZE, as int8.

LiteRT, tflite-micro and Vela all have EXP in int8, a table of 256 values; the quantizer does not
know it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torchclust.export.container import pack, unpack
from torchclust.export.editing import Editing

_IN_INT8 = ("EXP",)


def without_sandwiches(content: bytes) -> bytes:
    """The same int8 file with such operators on the int8 tensors themselves."""
    model = unpack(content)
    found = [_opened(Editing(model, subgraph)) for subgraph in model.subgraphs]
    return pack(model, len(content)) if any(found) else content


def _opened(editing: Editing) -> bool:
    """Change a subgraph's operators; whether there was one to change."""
    operators = list(editing.subgraph.operators)
    made = {int(o.outputs[0]): o for o in operators}
    readers = Counter(int(i) for o in operators for i in o.inputs)
    quantized = {int(o.inputs[0]): o for o in operators if editing.kind(o) == "QUANTIZE"}
    dropped: list[Any] = []
    for operator in operators:
        before, after = made.get(int(operator.inputs[0])), quantized.get(int(operator.outputs[0]))
        if editing.kind(operator) not in _IN_INT8 or before is None or after is None:
            continue
        if editing.kind(before) == "DEQUANTIZE" and readers[int(operator.outputs[0])] == 1:
            operator.inputs, operator.outputs = before.inputs, after.outputs
            dropped += [after, *([before] if readers[int(before.outputs[0])] == 1 else [])]
    editing.subgraph.operators = [o for o in operators if not any(o is d for d in dropped)]
    return bool(dropped)
