"""A codebook's elements in a header: as they are, or with their highest bytes deflated.

A float's highest byte is its sign and most of its exponent, of which a codebook holds few different
ones; the other bytes are as good as random. A codebook of 256 floats saves 160 of 1,024 bytes so.
"""

from __future__ import annotations

import zlib

import numpy as np

from torchclust.packing.dtypes import Bits

_RAW_DEFLATE = -15  # RFC 1951, without zlib's header and checksum


def split(elements: Bits) -> tuple[bytes, bytes]:
    """Return the highest bytes, deflated, and the other bytes, element by element."""
    stored = np.ascontiguousarray(elements, elements.dtype.newbyteorder("<"))
    planes = stored.view(np.uint8).reshape(-1, stored.dtype.itemsize)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE)
    top = squeeze.compress(planes[:, -1].tobytes()) + squeeze.flush()
    return top, planes[:, :-1].tobytes()


def join(top: bytes, rest: bytes, dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """The reverse of `split`.

    Raises:
        ValueError: the parts are none of as many elements.
    """
    lower = np.frombuffer(rest, np.uint8).reshape(-1, dtype.itemsize - 1)
    inflate = zlib.decompressobj(_RAW_DEFLATE)
    try:
        highest = inflate.decompress(top, len(lower) + 1)
    except zlib.error as error:
        raise ValueError(f"its codebook does not inflate: {error}") from None
    if len(highest) != len(lower) or not inflate.eof or inflate.unused_data:
        raise ValueError(f"its codebook inflates to {len(highest)} elements, not {len(lower)}")
    planes = np.column_stack([lower, np.frombuffer(highest, np.uint8)])
    found: Bits = np.ascontiguousarray(planes).view(dtype.newbyteorder("<"))[:, 0].astype(dtype)
    return found
