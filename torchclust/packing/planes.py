"""Elements as planes of bytes: the highest bytes of all, then the next ones, to the lowest.

A float's highest byte is its sign and most of its exponent, of which a tensor holds few different
ones; it deflates. The other bytes are as good as random, if they have not been rounded away.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from torchclust.packing.cursor import Cursor, number
from torchclust.packing.dtypes import Bits

Bytes = npt.NDArray[np.uint8]
_RAW_DEFLATE = -15  # RFC 1951, without zlib's header and checksum


def deflated(content: bytes) -> bytes:
    """As small as DEFLATE makes it."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE)
    return squeeze.compress(content) + squeeze.flush()


def inflated(content: bytes, at_most: int) -> bytes:
    """The reverse of `deflated`.

    Raises:
        ValueError: it does not inflate, or to more bytes than that.
    """
    inflate = zlib.decompressobj(_RAW_DEFLATE)
    try:
        found = inflate.decompress(content, at_most + 1)
    except zlib.error as error:
        raise ValueError(f"it does not inflate: {error}") from None
    if len(found) > at_most or not inflate.eof or inflate.unused_data:
        raise ValueError("it inflates to another length")
    return found


def split(elements: Bits) -> tuple[bytes, bytes]:
    """Return the highest bytes, and the other bytes, element by element."""
    planes = _planes(elements)
    return planes[:, -1].tobytes(), planes[:, :-1].tobytes()


def join(top: bytes, rest: bytes, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """The reverse of `split`."""
    lower = np.frombuffer(rest, np.uint8).reshape(len(top), dtype.itemsize - 1)
    return _elements(np.column_stack([lower, np.frombuffer(top, np.uint8)]), dtype)


def squeezed(elements: Bits) -> bytes:
    """Elements plane by plane from the highest, each deflated where that makes it smaller.

    A plane is a number, how many bytes follow, and these bytes: as many as there are elements if
    they are as they were.
    """
    planes, parts = _planes(elements), []
    for place in reversed(range(planes.shape[1])):
        plane = planes[:, place].tobytes()
        small = min(plane, deflated(plane), key=len)
        parts += [number(len(small)), small]
    return b"".join(parts)


def unsqueezed(encoded: bytes, n: int, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """The reverse of `squeezed`, for so many elements.

    Raises:
        ValueError: these are none of as many.
    """
    cursor, planes = Cursor(encoded), np.empty((n, dtype.itemsize), np.uint8)
    for place in reversed(range(dtype.itemsize)):
        plane = cursor.take(cursor.number())
        plane = plane if len(plane) == n else inflated(plane, n)
        if len(plane) != n:
            raise ValueError(f"it inflates to {len(plane)} bytes, not {n}")
        planes[:, place] = np.frombuffer(plane, np.uint8)
    if cursor.left:
        raise ValueError(f"{cursor.left} bytes follow its last plane")
    return _elements(planes, dtype)


def _planes(elements: Bits) -> Bytes:
    """``(elements, bytes)``, the lowest byte first."""
    stored = np.ascontiguousarray(elements, elements.dtype.newbyteorder("<"))
    return stored.view(np.uint8).reshape(-1, stored.dtype.itemsize)


def _elements(planes: Bytes, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """The reverse of `_planes`."""
    stored = np.ascontiguousarray(planes).view(dtype.newbyteorder("<"))
    found: Bits = stored[:, 0].astype(dtype)
    return found
