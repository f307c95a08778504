"""Packed files from the bytes' side: the specification, and what damage of every kind does."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sample import Emptied, Sample
from torch import nn

from torchclust.packing.coding import Layout
from torchclust.packing.contents import read_contents, write_contents
from torchclust.packing.cursor import Cursor, number
from torchclust.packing.dtypes import DTYPES, to_bits
from torchclust.packing.header import Header
from torchclust.packing.pack import load_packed_file_, save_packed
from torchclust.packing.planes import deflated
from torchclust.packing.record import read_records
from torchclust.packing.sections import PackedFileError

HERE = Path(__file__).parent
VECTORS: dict[int, tuple[type[Sample], str]] = {
    1: (Sample, "ed4cb6d57bd0999c5a851ef9bcd322fe105e5d17f7e28d18b92046de2531868d"),
    2: (Emptied, "640ecad6da6fd06ea71a3e6f50f4a701a386f890dd98d343005fa8d6dab472f9"),
}
Readers = dict[int, Callable[[bytes], dict[str, tuple[int, tuple[int, ...], list[int]]]]]
both = pytest.mark.parametrize("version", VECTORS)


def vector(version: int) -> bytes:
    """A file that was written long ago."""
    return (HERE / f"packed-v{version}.packed").read_bytes()


def blank(version: int) -> Sample:
    model = VECTORS[version][0]()
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def values(model: nn.Module) -> dict[str, list[int]]:
    return {name: to_bits(tensor).tolist() for name, tensor in model.state_dict().items()}


def load(content: bytes, model: nn.Module) -> nn.Module:
    return load_packed_file_(model, io.BytesIO(content))


def sections(content: bytes) -> list[bytes]:
    """The contents of the sections of version 1, by the documentation."""
    found, at = [], 22
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 8 : at + 8 + length])
        at += 16 + length
    return found


def assemble(parts: list[bytes], n_records: int | None = None) -> bytes:
    """A file of version 1 with checksums that hold: what an adversary would write."""
    out, key = prologue(1, len(parts) // 2 if n_records is None else n_records)
    for part in parts:
        section = struct.pack("<Q", len(part)) + part
        key = hashlib.blake2b(section, digest_size=8, key=key).digest()
        out += section + key
    return out


def parts_of(content: bytes) -> tuple[list[bytes], bytes, bytes]:
    """The tensors' data, the fields and what stands apart, of version 2, by the documentation."""
    (length,) = struct.unpack("<Q", content[-8:])
    contents = Cursor(content[-16 - length : -16])
    fields = zlib.decompress(contents.take(contents.number()), -15)
    lengths = [entry.length for entry in read_contents(content[-16 - length : -16], content[10])]
    at = 22 + np.cumsum([0, *(n + 8 for n in lengths)])
    data = [content[a : a + n] for a, n in zip(at, lengths, strict=False)]
    return data, fields, contents.ahead()


def assemble_2(
    data: list[bytes], fields: bytes, apart: bytes = b"", n_records: int | None = None
) -> bytes:
    """A file of version 2 with checksums that hold."""
    out, key = prologue(2, len(data) if n_records is None else n_records)
    squeezed = deflated(fields)
    contents = number(len(squeezed)) + squeezed + apart
    for part in [*data, contents]:
        hashed = struct.pack("<Q", len(part)) + part
        key = hashlib.blake2b(hashed, digest_size=8, key=key).digest()
        out += part + key
    return out + struct.pack("<Q", len(contents))


def prologue(version: int, n_records: int) -> tuple[bytes, bytes]:
    """With its digest, and that alone."""
    out = struct.pack("<8sHI", b"\x89TCP\r\n\x1a\n", version, n_records)
    key = hashlib.blake2b(out, digest_size=8).digest()
    return out + key, key


@pytest.fixture(scope="module")
def readers() -> Readers:
    """``read_packed`` of each version's documentation, which needs nothing but Python."""
    found = {}
    for version, name in {1: "packed-format-1.md", 2: "packed-format.md"}.items():
        page = (HERE.parents[1] / "docs" / name).read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        namespace: dict[str, Any] = {}
        exec(compile(code, name, "exec"), namespace)
        found[version] = namespace["read_packed"]
    return found


@both
def test_the_vectors_load_for_ever(readers: Readers, version: int) -> None:
    """A file of each version gives the model that it was written from, by two readers."""
    content, (kind, digest) = vector(version), VECTORS[version]
    assert hashlib.sha256(content).hexdigest() == digest
    expected = kind().state_dict()
    model = load(content, blank(version))
    assert values(model) == {name: to_bits(tensor).tolist() for name, tensor in expected.items()}
    documented = readers[version](content)
    assert documented.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype, shape, elements = documented[name]
        assert (DTYPES[dtype].torch, shape) == (tensor.dtype, tuple(tensor.shape)), name
        size = 8 * DTYPES[dtype].unit
        units = [e >> i * size & (1 << size) - 1 for e in elements
                 for i in range(DTYPES[dtype].units)]  # fmt: skip
        assert units == to_bits(tensor).tolist(), name
    headers = [record.header for record in read_records(io.BytesIO(content))]
    assert {header.kind for header in headers} == {"raw", "codebook", "codes", "sparse"}
    assert any(header.squeezed for header in headers) == (version > 1)
    contexts = [header.contexts.shares.shape for header in headers if header.contexts is not None]
    assert (max(contexts) == (2, 2)) == (version > 1), "and rows and columns in classes"


def test_todays_files_are_as_documented(readers: Readers, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Emptied()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 2).round() / 3)
    save_packed(model, tmp_path / "a")
    save_packed(model, tmp_path / "b")
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes(), "the same model, the same bytes"
    documented = readers[2](content)
    for name, parameter in model.named_parameters():
        assert documented[name][2] == to_bits(parameter).tolist()
    save_packed(Emptied(), tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == vector(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_codebook_is_split(readers: Readers, tmp_path: Path, dtype: torch.dtype) -> None:
    """The highest bytes of 200 centroids deflate; the file is smaller by them, and the same."""
    torch.manual_seed(0)
    books = (torch.randn(2, 200) / 20).to(dtype)
    model = nn.Module()
    model.register_buffer("a", books[0][torch.randint(200, (80, 100))])
    content = written(model, tmp_path)
    (record,) = read_records(io.BytesIO(content))
    n = len(books[0].unique())
    assert record.header.saved_bytes > 40
    assert record.header.side_bytes == n * dtype.itemsize
    coded = 8000 * record.header.entropy_bits / 8
    assert len(content) < 1.005 * coded + record.header.side_bytes - 40 + n / 8 + 90
    assert readers[2](content)["a"][2] == to_bits(model.a).tolist()
    expected = model.a.clone()
    model.a.zero_()
    load(content, model)
    assert torch.equal(model.a, expected)


def test_rows_and_columns_that_hold_little_cost_little(tmp_path: Path) -> None:
    """Within 3 % of what the places cost that can hold anything, and their classes."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(500, generator=generator), torch.rand(800, generator=generator)
    alive = (rows < 0.2)[:, None] & (columns < 0.3)
    drawn = torch.rand(500, 800, generator=generator)
    model = nn.Module()
    model.register_buffer("a", (alive & (drawn < 0.25)) * 0.5 + (alive & (drawn < 0.1)) * 0.75)
    content = written(model, tmp_path)
    counts = np.array([float((model.a[alive] == v).sum()) for v in (0, 0.5, 1.25)])
    share = counts / counts.sum()
    places = -(counts * np.log2(share)).sum() / 8
    classes = sum(
        -(n * np.log2(n / len(x)))
        for x, at in ((rows, 0.2), (columns, 0.3))
        for n in (int((x < at).sum()), int((x >= at).sum()))
    )
    assert len(content) < 1.03 * (places + classes / 8) + 90
    (record,) = read_records(io.BytesIO(content))
    assert len(content) < 0.75 * 400_000 * record.header.entropy_bits / 8


def test_multiples_of_one_step_take_a_byte_a_value(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-20, 21, (60, 70))
    model = nn.Module()
    model.register_buffer("a", codes * torch.tensor(0.017))
    content = written(model, tmp_path)
    (record,) = read_records(io.BytesIO(content))
    assert (record.header.kind, record.header.side_bytes) == ("codes", 41 + 4)
    expected = model.a.clone()
    load(content, model)
    assert torch.equal(model.a, expected)


class Small(nn.Module):
    """Two tensors, coded and raw: a file of some 200 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.arange(80).remainder(3).div(7))
        self.register_buffer("b", torch.tensor([1.5, -2.5]))


def written(model: nn.Module, folder: Path) -> bytes:
    save_packed(model, folder / "file")
    return (folder / "file").read_bytes()


def refused(content: bytes | bytearray, model: nn.Module) -> None:
    with pytest.raises(PackedFileError, match=r"."):
        load(bytes(content), model)


@both
def test_every_byte_matters(version: int) -> None:
    """Every byte of the vector, changed in the lowest bit, the highest, or all."""
    content, model = vector(version), blank(version)
    before = values(model)
    for at in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[at] ^= flip
            refused(damaged, model)
    assert values(model) == before


@pytest.mark.slow
def test_every_change_of_every_byte(tmp_path: Path) -> None:
    model = Small()
    content, before = written(model, tmp_path), values(model)
    for at in range(len(content)):
        for flip in range(1, 256):
            damaged = bytearray(content)
            damaged[at] ^= flip
            refused(damaged, model)
    assert values(model) == before


@both
def test_every_truncation_and_anything_more(version: int) -> None:
    content, model = vector(version), blank(version)
    before = values(model)
    for length in range(len(content)):
        refused(content[:length], model)
    for more in (b"\0", b"\n", content, content[22:]):
        refused(content + more, model)
    assert values(model) == before


def test_sections_of_another_file_do_not_pass(tmp_path: Path) -> None:
    """Each section is sound in its own file; spliced, moved or left out it is not."""
    model = Small()
    first = written(model, tmp_path)
    model.a.copy_(model.a.roll(1))
    model.b += 1
    second = written(model, tmp_path)
    assert len(first) == len(second)
    one, two = (len(data) + 8 for data in parts_of(first)[0])
    for end in (22 + one, 22 + one + two):
        refused(first[:end] + second[end:], model)
    data = first[22 : 22 + one], first[22 + one : 22 + one + two]
    refused(first[:22] + data[1] + data[0] + first[22 + one + two :], model)
    refused(first[:22] + data[1] + first[22 + one + two :], model)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, inserted, deleted, copied elsewhere, or the end cut off."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, length = chance.randrange(len(found) + 1), chance.choice((1, 2, 4, 8, 60))
        other = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0:
                found[at : at + length] = chance.randbytes(len(found[at : at + length]))
            case 1:
                found[at:at] = chance.randbytes(length)
            case 2:
                del found[at : at + length]
            case 3:
                found[at : at + length] = found[other : other + length]
            case 4:
                found[at : at + length] = bytes([chance.choice((0, 1, 127, 128, 255))]) * length
            case 5:
                del found[max(1, at) :]
    return bytes(found)


@pytest.mark.slow
@both
def test_fuzz(version: int) -> None:
    """Thousands of damaged files: all are refused."""
    content, model = vector(version), blank(version)
    before, chance = values(model), random.Random(0)
    different = 0
    while different < (2_000 if version == 1 else 10_000):
        damaged = mutated(content, chance)
        if damaged != content:
            different += 1
            refused(damaged, model)
    assert values(model) == before


def damaged_but_signed(version: int, chance: random.Random) -> bytes:
    """The vector with one of its parts changed, and checksums that hold."""
    if version == 1:
        parts = sections(vector(1))
        which = chance.randrange(len(parts))
        parts[which] = mutated(parts[which] or b"\0", chance)
        return assemble(parts)
    data, fields, apart = parts_of(vector(2))
    match chance.randrange(4):
        case 0:
            apart = mutated(apart, chance)
        case 1:
            which = chance.randrange(len(data))
            data[which] = mutated(data[which] or b"\0", chance)
        case _:
            fields = mutated(fields, chance)
    return assemble_2(data, fields, apart)


@both
def test_damaged_files_allocate_no_more_than_sound_ones(version: int) -> None:
    content, model, chance = vector(version), blank(version), random.Random(2)
    files = [mutated(content, chance) for _ in range(500)]
    signed = [damaged_but_signed(version, chance) for _ in range(500)]
    peaks = []
    for batch in ([content] * 3, files, signed):
        tracemalloc.start()
        for damaged in batch:
            outcome_of(damaged, model)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < peaks[0] + 1e6, peaks


def outcome_of(content: bytes, model: nn.Module) -> str:
    """What loading came to; any error but a clear refusal passes through."""
    try:
        load(content, model)
    except PackedFileError:
        return "damaged"
    except ValueError as error:
        if "needs the architecture that was saved" not in str(error):
            raise
        return "misfit"
    return "loaded"


@both
def test_fuzz_with_checksums_that_hold(version: int) -> None:
    """What checksums do not stop, the parser does: an error or a model, never another crash."""
    model, chance = blank(version), random.Random(1)
    load(assemble(sections(vector(1))), blank(1))
    load(assemble_2(*parts_of(vector(2))), blank(2))
    outcomes = {"loaded": 0, "damaged": 0, "misfit": 0}
    for _ in range(1_500):
        before = values(model)
        outcome = outcome_of(damaged_but_signed(version, chance), model)
        outcomes[outcome] += 1
        assert outcome == "loaded" or values(model) == before, "refused files leave the model alone"
    assert min(outcomes.values()) > 10, outcomes


def head(shape: tuple[int, ...], kind: int = 1, dtype: int = 0, axis: int = 0) -> bytes:
    """A header up to the names, as documented; the tensor's name is a."""
    dims = struct.pack(f"<{len(shape)}I", *shape)
    return struct.pack("<BBBBH", kind, dtype, len(shape), axis, 1) + dims + b"\1\0a"


def coded(k: int = 1) -> bytes:
    return struct.pack("<dQH", 0.0, 0, k - 1)


ONE = struct.pack("<I", 1 << 20) + bytes(4)  # one codebook of one float32 0
SPLIT = struct.pack("<I", 80)
HUGE = (1 << 32) - 1
MALFORMED = {
    "a tensor that the model lacks": (head((HUGE, HUGE)) + coded() + struct.pack("<I", HUGE)
                                      + bytes(4), b"", ValueError, "needs the architecture"),
    "codebooks that are not there": (head((HUGE, 8)) + coded(65536) + struct.pack("<I", 1), b"",
                                     PackedFileError, r"\d+ bytes expected, 0 left"),
    "scales that are not there": (head((HUGE, 8), 2) + coded() + b"\0", b"",
                                  PackedFileError, r"17179869180 bytes expected, 0 left"),
    "no codebook": (head((80,)) + coded() + struct.pack("<I", 0), b"",
                    PackedFileError, "codebooks for 0 rows"),
    "raw data of another size": (head((80,), 0), bytes(316), PackedFileError, "another length"),
    "more after a raw header": (head((80,), 0) + b"x", bytes(320), PackedFileError, "1 bytes too"),
    "a kind": (head((80,), 5), b"", PackedFileError, "is malformed: invalid kind 5"),
    "an element type": (head((80,), 1, 17), b"", PackedFileError, "invalid element type 17"),
    "an axis": (head((80,), 1, 0, 1), b"", PackedFileError, "invalid channel dimension 1 of 1"),
    "no names": (b"\0" * 6, bytes(4), PackedFileError, "invalid names"),
    "coded complex": (head((80,), 1, 10) + coded(), b"", PackedFileError, "no or complex elements"),
    "coded nothing": (head((0,)) + coded(), b"", PackedFileError, "no or complex elements"),
    "entropy": (head((80,)) + struct.pack("<dQH", 99.0, 0, 0), b"", PackedFileError, "statistics"),
    "zeros": (head((80,)) + struct.pack("<dQH", 1.0, 81, 0), b"", PackedFileError, "statistics"),
    "codes of integers": (head((80,), 2, 4) + coded() + b"\0\0", b"", PackedFileError, "codes"),
    "a code twice": (head((80,), 2) + coded(2) + b"\1\1" + bytes(4), b"", PackedFileError, "codes"),
    "code -128": (head((80,), 2) + coded() + b"\x80" + bytes(4), b"", PackedFileError, "code -128"),
    "a meaning": (head((80,), 3) + coded() + bytes(8) + b"\2", b"", PackedFileError, "meanings"),
    "too many literals": (head((80,), 3) + coded() + struct.pack("<Q", 81) + b"\1", b"",
                          PackedFileError, "literals"),
    "literals that lack": (head((80,), 3) + coded() + struct.pack("<Q", 79) + b"\1", bytes(316),
                           PackedFileError, "more than its 79 literals"),
    "literals not used": (head((80,), 3) + coded() + struct.pack("<Q", 2) + b"\0", bytes(8),
                          PackedFileError, "it refers to 0 of its 2 literals"),
    "literals not there": (head((80,), 3) + coded() + struct.pack("<Q", 2) + b"\1", bytes(4),
                           PackedFileError, "4 bytes, which its header does not allow"),
    "half a word": (head((80,)) + coded() + ONE, bytes(2),
                    PackedFileError, "2 bytes, which its header does not allow"),
    "a word too many": (head((80,)) + coded() + ONE, b"\1\0\0\0",
                        PackedFileError, "do not end with its last weight"),
    "a last word of 0": (head((80,)) + coded() + ONE, bytes(4), PackedFileError, "zero word"),
    "a table too short": (head((80,)) + coded(3) + struct.pack("<I", 80) + bytes(12) + b"\1", b"",
                          PackedFileError, "not one of 3 symbols"),
    "a table too long": (head((80,)) + coded() + ONE + b"\0", b"",
                         PackedFileError, "not one of 1 symbols"),
    "a table too steep": (head((80,)) + coded(2) + struct.pack("<I", 80) + bytes(8) + bytes(24)
                          + b"\1", b"", PackedFileError, "falls by 192 steps, at most 191"),
    "a split codebook, damaged": (head((80,), 4) + coded() + SPLIT + b"\1\0\0\0\7" + bytes(3), b"",
                                  PackedFileError, "does not inflate"),
    "a split codebook of two": (head((80,), 4) + coded() + SPLIT + b"\4\0\0\0c`\0\0" + bytes(3),
                                b"", PackedFileError, "inflates to another length"),
    "a split codebook of bytes": (head((80,), 4, 4) + coded() + SPLIT, b"",
                                  PackedFileError, "split codebook of single bytes"),
    "a bool of 2": (head((80,), 0, 9), b"\2" * 80, PackedFileError, "is bool and holds 2"),
}  # fmt: skip


def fields(
    shape: tuple[int, ...] = (80,), kind: int = 1, dtype: int = 0, axis: int = 0, length: int = 0
) -> bytes:
    """What the contents say of a tensor up to its data's length; its name is a."""
    dims = b"".join(map(number, shape))
    return bytes([kind, dtype, len(shape), axis]) + b"\1\1a" + dims + number(length)


def stats(zeros: int = 0, entropy: int = 0, k: int = 1) -> bytes:
    return number(zeros) + number(entropy) + number(k - 1)


BOOK = number(80) + b"\0"  # one codebook of one float32 0, whose lower bytes stand apart
TWO = fields() + stats(k=2) + number(80) + bytes(2)
MALFORMED_2 = {
    "a tensor that the model lacks": (fields((HUGE, HUGE)) + stats() + number(HUGE) + b"\0",
                                      bytes(3), b"", ValueError, "needs the architecture"),
    "codebooks that are not there": (fields((HUGE, 8)) + stats(k=65536) + b"\1", b"", b"",
                                     PackedFileError, r"\d+ bytes expected, 0 left"),
    "lower bytes that are not there": (fields() + stats() + BOOK, bytes(2), b"",
                                       PackedFileError, "3 bytes expected, 2 left"),
    "no codebook": (fields() + stats() + number(0), b"", b"", PackedFileError, "for 0 rows each"),
    "too many symbols": (fields() + stats(k=65537), b"", b"", PackedFileError, "65537 symbols"),
    "a long number": (fields()[:-1] + b"\x80" * 10 + b"\1", b"", b"", PackedFileError, "64 bits"),
    "raw data of another size": (fields(kind=0, length=316), b"", bytes(316),
                                 PackedFileError, "another length"),
    "data that are not there": (fields(kind=0, length=320), b"", bytes(300),
                                PackedFileError, "the data of 'a' are 320 bytes, which are not"),
    "more fields": (fields(kind=0, length=320) + b"x", b"", bytes(320),
                    PackedFileError, "1 bytes too many"),
    "more apart": (fields(kind=0, length=320), b"x", bytes(320), PackedFileError, "1 bytes too"),
    "a kind": (fields(kind=5), b"", b"", PackedFileError, "is malformed: invalid kind 5"),
    "a plane of another length": (fields((3,), 4, 5, length=3), b"", b"\2\3\0", PackedFileError,
                                  "the data of 'a': it inflates to 0 bytes, not 3"),
    "a plane too few": (fields((3,), 4, 2, length=4), b"", b"\3abc", PackedFileError,
                        "1 bytes expected, 0 left"),
    "more than planes": (fields((3,), 4, 5, length=5), b"", b"\3abcd", PackedFileError,
                         "1 bytes follow its last plane"),
    "an element type": (fields(dtype=17), b"", b"", PackedFileError, "invalid element type 17"),
    "an axis": (fields(axis=1), b"", b"", PackedFileError, "invalid channel dimension 1 of 1"),
    "no names": (bytes(3) + b"\0\0\0", b"", b"", PackedFileError, "invalid names"),
    "coded complex": (fields(dtype=10) + stats() + BOOK, bytes(3), b"",
                      PackedFileError, "no or complex elements"),
    "coded nothing": (fields((0,)) + stats() + BOOK, bytes(3), b"",
                      PackedFileError, "no or complex elements"),
    "entropy": (fields() + stats(entropy=321) + BOOK, bytes(3), b"", PackedFileError, "statistics"),
    "zeros": (fields() + stats(zeros=81) + BOOK, bytes(3), b"", PackedFileError, "statistics"),
    "a code twice": (fields(kind=2) + stats(k=2) + number(80) + b"\1\1\0" + b"\1\1\0\0\0", bytes(3),
                     b"", PackedFileError, "invalid codes"),
    "code -128": (fields(kind=2) + stats() + number(80) + b"\x80\0", bytes(3), b"",
                  PackedFileError, "code -128"),
    "too many literals": (fields(kind=3) + stats() + number(81) + b"\1", b"", b"",
                          PackedFileError, "literals"),
    "no class": (TWO + b"\0\1", bytes(6), b"", PackedFileError, "0 classes of 1 lines"),
    "classes of one row": (TWO + b"\2\1" + bytes(9), bytes(6), b"",
                           PackedFileError, "2 classes of 1 lines"),
    "nine classes": (TWO + b"\1\x09" + bytes(99), bytes(6), b"",
                     PackedFileError, "9 classes of 80 lines"),
    "shares that are not there": (TWO + b"\1\2\0", bytes(6), b"", PackedFileError, "4 bytes exp"),
    "a table of classes that is not there": (TWO + b"\1\2" + bytes(4), bytes(6), b"",
                                             PackedFileError, "not one of 2 symbols"),
    "a word too many": (fields(length=4) + stats() + BOOK, bytes(3), b"\1\0\0\0",
                        PackedFileError, "do not end with its last weight"),
    "a bool of 2": (fields(kind=0, dtype=9, length=80), b"", b"\2" * 80,
                    PackedFileError, "is bool and holds 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED_2)
def test_malformed_contents_but_signed(case: str) -> None:
    """Contents that lie are refused by what they say, and before memory is spent on them."""
    said, apart, data, error, message = MALFORMED_2[case]
    model = nn.Module()
    dtype = DTYPES[said[1]].torch if said[1] < len(DTYPES) else torch.float32
    model.register_buffer("a", torch.zeros(3 if said[0] == 4 else 80, dtype=dtype))
    refused_early(assemble_2([data], said, apart), model, error, message)


def refused_early(content: bytes, model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):  # what only a first time allocates
        load(content, model)
    tracemalloc.start()
    with pytest.raises(error, match=message):
        load(content, model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_but_signed(case: str) -> None:
    """Headers that lie are refused by what they say, and before memory is spent on them."""
    header, data, error, message = MALFORMED[case]
    model = nn.Module()
    dtype = DTYPES[header[1]].torch if header[1] < len(DTYPES) else torch.float32
    model.register_buffer("a", torch.zeros(80, dtype=dtype))
    refused_early(assemble([header, data]), model, error, message)


def test_prologue_and_records(tmp_path: Path) -> None:
    content, model = written(Small(), tmp_path), Small()
    with pytest.raises(
        PackedFileError,
        match=r"version 3 and this torchclust reads 2:  read it with",
    ):
        load(prologue(3, 2)[0] + content[22:], model)
    with pytest.raises(PackedFileError, match=r"begins with b'' and is no packed file"):
        load(b"", model)
    with pytest.raises(PackedFileError, match=r"ends after 20 bytes, within its prologue"):
        load(content[:20], model)
    with pytest.raises(PackedFileError, match=r"ends after 30 bytes, before its table of contents"):
        load(content[:30], model)
    with pytest.raises(PackedFileError, match=r"it is incomplete: its table of contents"):
        load(content[:-8] + struct.pack("<Q", 1 << 62), model)
    data, said, apart = parts_of(content)
    load(assemble_2(data, said, apart), model)
    with pytest.raises(PackedFileError, match=r"contents is malformed: \d+ bytes expected, 0 left"):
        load(assemble_2(data, said, apart, 3), model)
    with pytest.raises(PackedFileError, match=r"contents is malformed: invalid \d+ bytes too many"):
        load(assemble_2(data, said, apart, 1), model)
    with pytest.raises(PackedFileError, match=r"bytes follow its last record"):
        load(assemble_2([*data, b"more"], said, apart, 2), model)
    plain = fields((), 0, length=4)
    with pytest.raises(PackedFileError, match=r"it holds 'a' twice"):
        load(assemble_2([bytes(4)] * 2, plain * 2), model)


def test_prologue_and_records_of_version_1() -> None:
    parts, model = sections(vector(1)), blank(1)
    n_records = len(parts) // 2
    with pytest.raises(PackedFileError, match=rf"the header of record {n_records + 1} of"):
        load(assemble(parts, n_records + 1), model)
    with pytest.raises(PackedFileError, match=r"bytes follow its last record"):
        load(assemble(parts, 1), model)
    with pytest.raises(PackedFileError, match=r"it holds '.*' twice"):
        load(assemble(parts[:2] * 2), model)
    lying = bytearray(vector(1))
    struct.pack_into("<Q", lying, 22, 1 << 62)
    with pytest.raises(PackedFileError, match=r"ends after \d+ bytes, within the header of rec"):
        load(bytes(lying), model)


def test_contents_are_their_own_reverse() -> None:
    """The vector's contents are written back to the same bytes."""
    content = vector(2)
    (length,) = struct.unpack("<Q", content[-8:])
    encoded = content[-16 - length : -16]
    entries = read_contents(encoded, content[10])
    assert write_contents([(entry.header, entry.length) for entry in entries]) == encoded
    assert sum(entry.size for entry in entries) == length
    header = Header(("é" * 300, "b"), DTYPES[0], Layout((2, 3)))
    ((back, size, _),) = read_contents(write_contents([(header, 1 << 40)]), 1)
    assert (back, size) == (header, 1 << 40)


def test_big_tensors_in_many_blocks(tmp_path: Path) -> None:
    """Rows longer than a block, and more rows than a block holds."""
    rng = np.random.default_rng(0)
    model = nn.Module()
    for name, shape in {"wide": (2, 300_001), "high": (300_001, 3), "flat": (600_001,)}.items():
        few = torch.from_numpy(rng.integers(-3, 4, shape)).float()
        scale = torch.linspace(0.5, 0.7, shape[0]).view(-1, *[1] * (len(shape) - 1))
        model.register_buffer(name, few * scale if name == "wide" else few)
        model.register_buffer(name + "_sparse", torch.randn(shape) * (few > 2))
    model.register_buffer("raw", torch.randn(700_001))
    model.register_buffer("moved", torch.from_numpy(rng.integers(0, 5, (5, 4, 30_000))).double())
    expected = values(model)
    content = written(model, tmp_path)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert values(load(content, model)) == expected
