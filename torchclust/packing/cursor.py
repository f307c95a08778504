"""Bytes read one field after the other, and never beyond their end."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt


class Cursor:
    """Reads on in bytes.

    Every method raises ValueError where there are not as many as it asks for.
    """

    def __init__(self, encoded: bytes) -> None:
        self._encoded, self.at = encoded, 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._encoded) - self.at

    def take(self, length: int) -> bytes:
        """The next bytes."""
        if length > self.left:
            raise ValueError(f"{length} bytes expected, {self.left} left")
        self.at += length
        return self._encoded[self.at - length : self.at]

    def ahead(self) -> bytes:
        """What is left, without reading it."""
        return self._encoded[self.at :]

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Fields as `struct` has them."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def number(self) -> int:
        """An unsigned integer, seven bits to a byte, the lowest first."""
        found = shift = 0
        while True:
            (byte,) = self.take(1)
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                return found
            shift += 7
            if shift > 63:
                raise ValueError("invalid number of more than 64 bits")

    def array(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Elements as they are."""
        taken = self.take(length * dtype.itemsize)
        return np.frombuffer(taken, dtype.newbyteorder("<")).astype(dtype)


def number(value: int) -> bytes:
    """The reverse of `Cursor.number`."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
