"""The container of a packed file: a magic number, then sections chained by their checksums.

A section is its bytes and a BLAKE2b checksum of their number and of them, keyed with the checksum
before it. So a section that is damaged, missing, moved or taken from another file is found out, and
the data of one can be skipped without losing the chain. The last section tells the lengths of the
others and is found from the end of the file; in version 1 each has its length in front. Nothing
here knows what else sections mean.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

MAGIC = b"\x89TCP\r\n\x1a\n"
"""As PNG's: not text, and a transfer that changes line ends or drops the eighth bit shows."""

VERSION = 2
_DIGEST = 8
_CHUNK = 1 << 20
_PROLOGUE = struct.Struct("<8sHI")
_LENGTH = struct.Struct("<Q")


class PackedFileError(ValueError):
    """A packed file that is damaged, incomplete, or none; the model was not touched."""


class SectionWriter:
    """Writes a packed file's prologue and then section after section.

    Args:
        file: open for writing in binary, at its beginning.
        n_records: how many records will follow.
    """

    def __init__(self, file: BinaryIO, n_records: int) -> None:
        self._file = file
        prologue = _PROLOGUE.pack(MAGIC, VERSION, n_records)
        self._digest = hashlib.blake2b(prologue, digest_size=_DIGEST).digest()
        file.write(prologue + self._digest)

    def write(self, length: int, parts: Iterable[bytes | memoryview]) -> None:
        """Write one section whose parts are ``length`` bytes together."""
        digest = hashlib.blake2b(_LENGTH.pack(length), digest_size=_DIGEST, key=self._digest)
        written = 0
        for part in parts:
            digest.update(part)
            self._file.write(part)
            written += len(part)
        if written != length:
            raise AssertionError(f"a section of {length} bytes got {written}")
        self._digest = digest.digest()
        self._file.write(self._digest)

    def finish(self, contents: bytes) -> None:
        """Write the last section, with its length behind."""
        self.write(len(contents), [contents])
        self._file.write(_LENGTH.pack(len(contents)))


@dataclass(frozen=True)
class Section:
    """A section found in a file, its content not yet read.

    Attributes:
        start: where its content begins.
        length: of the content, in bytes; the file is long enough for it.
        size: what it takes in the file, with its checksum (of version 1, its length too).
    """

    start: int
    length: int
    size: int
    _key: bytes
    _digest: bytes

    def chunks(self, file: BinaryIO, damaged: str) -> Iterable[bytes]:
        """Read the content in pieces of at most 1 MiB; after the last one compare checksums.

        Raises:
            PackedFileError: ``damaged`` (what the section belongs to) does not match its checksum.
        """
        prefix = _LENGTH.pack(self.length)
        digest = hashlib.blake2b(prefix, digest_size=_DIGEST, key=self._key)
        file.seek(self.start)
        left = self.length
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        if digest.digest() != self._digest:
            raise PackedFileError(f"{damaged} does not match its checksum")

    def read(self, file: BinaryIO, damaged: str) -> bytes:
        """The whole content, verified."""
        return b"".join(self.chunks(file, damaged))


class SectionReader:
    """Walks through the sections of a packed file.

    Args:
        file: open for reading in binary, seekable.

    Attributes:
        version: of the format.
        n_records: as the prologue declares it.

    Raises:
        PackedFileError: no packed file, a newer version, or a damaged prologue.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, 2)
        file.seek(0)
        prologue = file.read(_PROLOGUE.size)
        if prologue[: len(MAGIC)] != MAGIC[: len(prologue)] or not prologue:
            raise PackedFileError(f"it begins with {prologue[:8]!r} and is no packed file")
        digest = file.read(_DIGEST)
        if len(prologue) + len(digest) < _PROLOGUE.size + _DIGEST:
            raise PackedFileError(f"it ends after {self._end} bytes, within its prologue")
        _, self.version, self.n_records = _PROLOGUE.unpack(prologue)
        if digest != hashlib.blake2b(prologue, digest_size=_DIGEST).digest():
            raise PackedFileError("its prologue does not match its checksum")
        if not 1 <= self.version <= VERSION:
            raise PackedFileError(
                f"it has format version {self.version} and this torchclust reads {VERSION}:  "
                f"read it with the version that wrote it, or a later one"
            )
        self._digest, self._position = digest, file.tell()

    def last(self, what: str) -> Section:
        """The section at the end, which tells of the others; ``what`` names it in messages."""
        at = self._end - _LENGTH.size
        if at < self._position + _DIGEST:
            raise PackedFileError(f"it ends after {self._end} bytes, before {what}")
        self._file.seek(at)
        (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
        start = at - _DIGEST - length
        if start < self._position:
            raise PackedFileError(f"it is incomplete: {what} at its end does not fit into it")
        self._file.seek(start - _DIGEST)
        key = self._file.read(_DIGEST)
        self._file.seek(start + length)
        digest = self._file.read(_DIGEST)
        self._end = start
        return Section(start, length, length + _DIGEST + _LENGTH.size, key, digest)

    def skip(self, length: int, what: str) -> Section:
        """The section of that length that comes now; ``what`` names it in messages."""
        if self._position + length + _DIGEST > self._end:
            raise PackedFileError(f"{what} are {length} bytes, which are not there")
        return self._pass(self._position, length)

    def next(self, what: str) -> Section:
        """Of version 1, the section that comes now; ``what`` names it in messages."""
        self._file.seek(self._position)
        prefix = self._file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        start = self._position + _LENGTH.size
        if start + length + _DIGEST > self._end:
            raise PackedFileError(f"it ends after {self._end} bytes, within {what}")
        return self._pass(start, length)

    def _pass(self, start: int, length: int) -> Section:
        """The section whose content begins there; the next one is keyed with its checksum."""
        self._file.seek(start + length)
        digest = self._file.read(_DIGEST)
        end = start + length + _DIGEST
        section = Section(start, length, end - self._position, self._digest, digest)
        self._digest, self._position = digest, end
        return section

    def finish(self) -> None:
        """Check that nothing follows the last section."""
        if self._position != self._end:
            raise PackedFileError(
                f"{self._end - self._position} bytes follow its last record at {self._position}"
            )
