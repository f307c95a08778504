"""The small file: codebooks and entropy-coded indices, checksummed, bit for bit reversible."""

from torchclust.packing.pack import load_packed_, save_packed
from torchclust.packing.sections import PackedFileError
from torchclust.packing.size import PackedSize

__all__ = ["PackedFileError", "PackedSize", "load_packed_", "save_packed"]
