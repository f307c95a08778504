"""The file's own form: every weight inside the flatbuffer, where microcontrollers look for it.

ai-edge-quantizer 0.10 puts buffers of 1 KiB and more behind the flatbuffer and leaves only their
offsets in it, a form meant for models over 2 GiB. LiteRT and Vela read it; tflite-micro takes such
a weight for an empty tensor and computes with what happens to lie in its arena, without an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from torchclust.export import backends

Array = npt.NDArray[Any]

_ALIGNMENT = 16  # bytes, as the schema demands of tensor data ("force_align")


def inline_buffers(content: bytes) -> bytes:
    """The same model with all its buffers inside the flatbuffer, each aligned to 16 bytes."""
    return pack(unpack(content), len(content))


def unpack(content: bytes | bytearray) -> Any:
    """The schema's mutable ``ModelT``, every buffer's data in it as a view of the content."""
    model = backends.schema().ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        buffer.data = _data(buffer, content)
    return model


def pack(model: Any, size: int) -> bytes:
    """A ``ModelT`` as a file of about `size` bytes."""
    schema = backends.schema()
    model.buffers = [_Aligned(schema, buffer.data) for buffer in model.buffers]
    builder = backends.flatbuffers().Builder(size + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(memoryview(builder.Bytes)[builder.Head() :])


def _data(buffer: Any, content: bytes | bytearray) -> Array:
    if buffer.offset > 1:  # 0 and 1 mean that the data is inside, or that there is none
        return np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
    return np.empty(0, np.uint8) if buffer.data is None else np.asarray(buffer.data, np.uint8)


class _Aligned:
    """A buffer as `ModelT.Pack` wants it; the generated class does not align its data."""

    def __init__(self, schema: Any, data: Array) -> None:
        self.schema, self.data = schema, data

    def Pack(self, builder: Any) -> int:
        """Write data and table; the offset of the table."""
        if len(self.data):
            builder.StartVector(1, len(self.data), _ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.data
            vector = builder.EndVector()
        self.schema.BufferStart(builder)
        if len(self.data):
            self.schema.BufferAddData(builder, vector)
        offset: int = self.schema.BufferEnd(builder)
        return offset
