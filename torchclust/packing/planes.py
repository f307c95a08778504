"""Elements as planes of bytes: the highest bytes, which deflate, apart from the others.

A float's highest byte is its sign and most of its exponent, of which a codebook and channels'
scales hold few different ones; the other bytes are as good as random.
"""

from __future__ import annotations

import zlib

import numpy as np

from torchclust.packing.dtypes import Bits

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
    stored = np.ascontiguousarray(elements, elements.dtype.newbyteorder("<"))
    planes = stored.view(np.uint8).reshape(-1, stored.dtype.itemsize)
    return planes[:, -1].tobytes(), planes[:, :-1].tobytes()


def join(top: bytes, rest: bytes, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """The reverse of `split`."""
    lower = np.frombuffer(rest, np.uint8).reshape(len(top), dtype.itemsize - 1)
    planes = np.column_stack([lower, np.frombuffer(top, np.uint8)])
    found: Bits = np.ascontiguousarray(planes).view(dtype.newbyteorder("<"))[:, 0].astype(dtype)
    return found
