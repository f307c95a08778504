"""Packed files from the bytes' side: the specification, and what damage of every kind does."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sample import Sample
from torch import nn

from torchclust.packing.coding import Layout
from torchclust.packing.dtypes import DTYPES, to_bits
from torchclust.packing.pack import load_packed_, load_packed_file_, save_packed
from torchclust.packing.record import Header, read_header, read_records, write_header
from torchclust.packing.sections import PackedFileError, SectionReader

HERE = Path(__file__).parent
VECTOR = HERE / "packed-v1.packed"
VECTOR_SHA256 = "ed4cb6d57bd0999c5a851ef9bcd322fe105e5d17f7e28d18b92046de2531868d"


def blank() -> Sample:
    model = Sample()
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def values(model: nn.Module) -> dict[str, list[int]]:
    return {name: to_bits(tensor).tolist() for name, tensor in model.state_dict().items()}


def load(content: bytes, model: nn.Module) -> nn.Module:
    return load_packed_file_(model, io.BytesIO(content))


def sections(content: bytes) -> list[bytes]:
    """The sections' contents, by the documentation."""
    found, at = [], 22
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 8 : at + 8 + length])
        at += 16 + length
    return found


def assemble(parts: list[bytes], n_records: int | None = None) -> bytes:
    """A file of these sections with checksums that hold: what an adversary would write."""
    n_records = len(parts) // 2 if n_records is None else n_records
    out = struct.pack("<8sHI", b"\x89TCP\r\n\x1a\n", 1, n_records)
    key = hashlib.blake2b(out, digest_size=8).digest()
    out += key
    for part in parts:
        section = struct.pack("<Q", len(part)) + part
        key = hashlib.blake2b(section, digest_size=8, key=key).digest()
        out += section + key
    return out


@pytest.fixture(scope="module")
def reader() -> Callable[[bytes], dict[str, tuple[int, tuple[int, ...], list[int]]]]:
    """``read_packed`` of the documentation, which needs nothing but Python."""
    page = (HERE.parents[1] / "docs" / "packed-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "packed-format.md", "exec"), namespace)
    found: Callable[[bytes], Any] = namespace["read_packed"]
    return found


def test_the_vector_loads_for_ever(reader: Callable[[bytes], Any]) -> None:
    """A file from version 0.1.0 gives the model that it was written from, by two readers."""
    content = VECTOR.read_bytes()
    assert hashlib.sha256(content).hexdigest() == VECTOR_SHA256
    expected = Sample().state_dict()
    model = load_packed_(blank(), VECTOR)
    assert values(model) == {name: to_bits(tensor).tolist() for name, tensor in expected.items()}
    documented = reader(content)
    assert documented.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype, shape, elements = documented[name]
        assert (DTYPES[dtype].torch, shape) == (tensor.dtype, tuple(tensor.shape)), name
        size = 8 * DTYPES[dtype].unit
        units = [e >> i * size & (1 << size) - 1 for e in elements
                 for i in range(DTYPES[dtype].units)]  # fmt: skip
        assert units == to_bits(tensor).tolist(), name
    with VECTOR.open("rb") as file:
        kinds = {record.header.kind for record in read_records(file)}
    assert kinds == {"raw", "codebook", "codes", "sparse"}, "the vector covers every kind"


def test_todays_files_are_as_documented(reader: Callable[[bytes], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sample()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 2).round() / 3)
    save_packed(model, tmp_path / "a")
    save_packed(model, tmp_path / "b")
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes(), "the same model, the same bytes"
    documented = reader(content)
    for name, parameter in model.named_parameters():
        assert documented[name][2] == to_bits(parameter).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_codebook_is_split(
    reader: Callable[[bytes], Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The highest bytes of 200 centroids deflate; the file is smaller by them, and the same."""
    torch.manual_seed(0)
    books = (torch.randn(2, 200) / 20).to(dtype)
    model = nn.Module()
    model.register_buffer("a", books[0][torch.randint(200, (80, 100))])
    content = written(model, tmp_path)
    assert content[22 + 8] == 4
    with (tmp_path / "file").open("rb") as file:
        (record,) = read_records(file)
    assert record.header.saved_bytes > 40
    assert record.header.side_bytes == len(books[0].unique()) * dtype.itemsize
    assert reader(content)["a"][2] == to_bits(model.a).tolist()
    expected = model.a.clone()
    model.a.zero_()
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


def test_every_byte_matters() -> None:
    """Every byte of the vector, changed in the lowest bit, the highest, or all."""
    content, model = VECTOR.read_bytes(), blank()
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


def test_every_truncation_and_anything_more() -> None:
    content, model = VECTOR.read_bytes(), blank()
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
    model.a += 1
    second = written(model, tmp_path)
    assert len(first) == len(second)
    ends = [22]
    while ends[-1] < len(first):
        ends.append(ends[-1] + 16 + struct.unpack_from("<Q", first, ends[-1])[0])
    for end in ends[1:4]:
        refused(first[:end] + second[end:], model)
    refused(first[:22] + first[ends[2] : ends[4]] + first[22 : ends[2]], model)
    refused(first[: ends[2]] + first[ends[4] :], model)


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
def test_fuzz() -> None:
    """20,000 damaged files: all are refused."""
    content, model = VECTOR.read_bytes(), blank()
    before, chance = values(model), random.Random(0)
    different = 0
    while different < 20_000:
        damaged = mutated(content, chance)
        if damaged != content:
            different += 1
            refused(damaged, model)
    assert values(model) == before


def test_damaged_files_allocate_no_more_than_sound_ones() -> None:
    content, model, chance = VECTOR.read_bytes(), blank(), random.Random(2)
    files = [mutated(content, chance) for _ in range(1000)]
    signed = []
    for _ in range(1000):
        parts = sections(content)
        which = chance.randrange(len(parts))
        parts[which] = mutated(parts[which] or b"\0", chance)
        signed.append(assemble(parts))
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


def test_fuzz_with_checksums_that_hold() -> None:
    """What checksums do not stop, the parser does: an error or a model, never another crash."""
    parts, chance = sections(VECTOR.read_bytes()), random.Random(1)
    model = blank()
    load(assemble(parts), model)
    outcomes = {"loaded": 0, "damaged": 0, "misfit": 0}
    for _ in range(2_500):
        which = chance.randrange(len(parts))
        changed = [*parts[:which], mutated(parts[which] or b"\0", chance), *parts[which + 1 :]]
        before = values(model)
        outcome = outcome_of(assemble(changed), model)
        outcomes[outcome] += 1
        assert outcome == "loaded" or values(model) == before, "refused files leave the model alone"
    assert min(outcomes.values()) > 20, outcomes


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
                                b"", PackedFileError, "inflates to 2 elements, not 1"),
    "a split codebook of bytes": (head((80,), 4, 4) + coded() + SPLIT, b"",
                                  PackedFileError, "split codebook of single bytes"),
    "a bool of 2": (head((80,), 0, 9), b"\2" * 80, PackedFileError, "is bool and holds 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_but_signed(case: str) -> None:
    """Headers that lie are refused by what they say, and before memory is spent on them."""
    header, data, error, message = MALFORMED[case]
    model = nn.Module()
    dtype = DTYPES[header[1]].torch if header[1] < len(DTYPES) else torch.float32
    model.register_buffer("a", torch.zeros(80, dtype=dtype))
    content = assemble([header, data])
    tracemalloc.start()
    with pytest.raises(error, match=message):
        load(content, model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_prologue_and_records(tmp_path: Path) -> None:
    content, model = written(Small(), tmp_path), Small()
    prologue = struct.pack("<8sHI", content[:8], 2, 2)
    newer = prologue + hashlib.blake2b(prologue, digest_size=8).digest() + content[22:]
    with pytest.raises(
        PackedFileError, match=r"format version 2 and this torchclust reads 1:  pip"
    ):
        load(newer, model)
    with pytest.raises(PackedFileError, match=r"begins with b'' and is no packed file"):
        load(b"", model)
    with pytest.raises(PackedFileError, match=r"ends after 20 bytes, within its prologue"):
        load(content[:20], model)
    with pytest.raises(PackedFileError, match=r"within the header of record 3 of 3"):
        load(assemble(sections(content), 3), model)
    with pytest.raises(PackedFileError, match=r"bytes follow its last record"):
        load(assemble(sections(content), 1), model)
    with pytest.raises(PackedFileError, match=r"it holds 'a' twice"):
        load(assemble(sections(content)[:2] * 2), model)
    lying = bytearray(content)
    struct.pack_into("<Q", lying, 22, 1 << 62)
    with pytest.raises(
        PackedFileError, match=r"ends after \d+ bytes, within the header of record 1"
    ):
        load(bytes(lying), model)


def test_headers_are_their_own_reverse() -> None:
    """Every header of the vector is written back to the same bytes."""
    for encoded in sections(VECTOR.read_bytes())[::2]:
        assert write_header(read_header(encoded, "")) == encoded
    header = Header(("é" * 300, "b"), DTYPES[0], Layout((2, 3)))
    assert read_header(write_header(header), "") == header


def test_a_file_is_read_by_sections() -> None:
    """`SectionReader` skips data without reading it and still finds a later checksum wrong."""
    content = bytearray(VECTOR.read_bytes())
    reader = SectionReader(io.BytesIO(content))
    for number in range(2 * reader.n_records):
        section = reader.next("a section")
        got = section.read(io.BytesIO(content), "a section")
        assert got == sections(bytes(content))[number]
    reader.finish()


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
