"""A packed file's records: for each tensor a header, and data that the header explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from torchclust.packing.coding import Sparse, decode_rows
from torchclust.packing.contents import read_contents
from torchclust.packing.dtypes import Bits
from torchclust.packing.header import Header
from torchclust.packing.header_v1 import read_header
from torchclust.packing.planes import unsqueezed
from torchclust.packing.sections import PackedFileError, Section, SectionReader


@dataclass(frozen=True)
class Record:
    """One tensor's place in a file: its header, read, and its data, not yet."""

    header: Header
    data: Section
    size: int

    def blocks(self, file: BinaryIO) -> Iterator[tuple[slice, slice, Bits]]:
        """Decode the data block by block, all in order; the checksum is compared before the first.

        A raw tensor comes as one row, its checksum compared after the last block. Only what was
        read to the end may be used.

        Raises:
            PackedFileError: naming the tensor.
        """
        header, what = self.header, f"the data of {self.header.names[0]!r}"
        stored = header.dtype.bits.newbyteorder("<")
        if header.squeezed:
            n = header.layout.n_elements * header.dtype.units
            try:
                bits = unsqueezed(self.data.read(file, what), n, header.dtype.bits)
            except ValueError as error:
                raise _named(what, error) from None
            yield slice(0, 1), slice(0, n), _checked(bits, header, what)[None]
            return
        if header.coding is None or header.contexts is None:
            at = 0
            for chunk in self.data.chunks(file, what):
                bits = np.frombuffer(chunk, stored).astype(header.dtype.bits)
                yield slice(0, 1), slice(at, at + len(bits)), _checked(bits, header, what)[None]
                at += len(bits)
            return
        data = self.data.read(file, what)
        n_stored = header.coding.n_literals if isinstance(header.coding, Sparse) else 0
        split = n_stored * header.dtype.unit
        if split > len(data) or (len(data) - split) % 4:
            raise PackedFileError(f"{what} has {len(data)} bytes, which its header does not allow")
        literals = np.frombuffer(data[:split], stored).astype(header.dtype.bits)
        words = np.frombuffer(data[split:], "<u4").astype(np.uint32)
        try:
            for rows, columns, bits in decode_rows(
                header.coding, header.contexts, words, literals, header.layout
            ):
                yield rows, columns, _checked(bits, header, what)
        except ValueError as error:
            raise _named(what, error) from None


def read_records(file: BinaryIO) -> list[Record]:
    """Read all headers of a file and where their data is, without reading that.

    Raises:
        PackedFileError: whatever is wrong with the file, but for its data.
    """
    reader = SectionReader(file)
    records: list[Record] = []
    names: set[str] = set()
    for record in (_read_version_1 if reader.version == 1 else _read)(reader, file):
        header, length = record.header, record.data.length
        plain = header.coding is None and not header.squeezed
        if plain and length != header.layout.n_elements * header.dtype.size:
            raise PackedFileError(f"{header.names[0]!r} has another length than its data have")
        if names & set(header.names):
            raise PackedFileError(f"it holds {sorted(names & set(header.names))[0]!r} twice")
        names |= set(header.names)
        records.append(record)
    reader.finish()
    return records


def _read(reader: SectionReader, file: BinaryIO) -> Iterator[Record]:
    what = "its table of contents"
    contents = reader.last(what)
    try:
        entries = read_contents(contents.read(file, what), reader.n_records)
    except ValueError as error:
        raise _named(f"{what} is malformed", error) from None
    for entry in entries:
        data = reader.skip(entry.length, f"the data of {entry.header.names[0]!r}")
        yield Record(entry.header, data, data.size + entry.size)


def _read_version_1(reader: SectionReader, file: BinaryIO) -> Iterator[Record]:
    for number in range(1, reader.n_records + 1):
        what = f"the header of record {number} of {reader.n_records}"
        section = reader.next(what)
        header = read_header(section.read(file, what), what)
        data = reader.next(f"the data of {header.names[0]!r}")
        yield Record(header, data, section.size + data.size)


def _named(what: str, error: ValueError) -> PackedFileError:
    return error if isinstance(error, PackedFileError) else PackedFileError(f"{what}: {error}")


def _checked(bits: Bits, header: Header, what: str) -> Bits:
    if header.dtype.name == "bool" and bits.size and bits.max() > 1:
        raise PackedFileError(f"{what} is bool and holds {bits.max()}")
    return bits
