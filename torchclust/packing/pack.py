"""Write a model into one small file and read it back, bit for bit: Deep Compression's last step.

A packed file holds the *values* of a state dict: of `strip_(model).state_dict()`, with every
tensor coded in the way that makes it smallest. So the file of a clustered model and that of the
stripped model are the same, and it depends on nothing that training keeps (latent weights,
configurations); `torchclust.restore_` and a checkpoint are for going on with training.

In: a model. `tensors` says what is stored and what is known of it, `search` chooses how, `coding`,
`contexts` and `entropy` make bytes of it, `contents` and `sections` (checksums) the file. Out: a
file; and back.
The format is specified byte by byte in ``docs/packed-format.md``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchclust.model.cluster import strip_
from torchclust.packing.coding import Layout, Sparse, encode_rows, literals, symbols_of
from torchclust.packing.contents import write_contents
from torchclust.packing.contexts import find_contexts
from torchclust.packing.dtypes import dtype_of, to_bits
from torchclust.packing.entropy import constriction, entropy
from torchclust.packing.header import Header
from torchclust.packing.planes import squeezed
from torchclust.packing.record import Record, read_records
from torchclust.packing.search import choose
from torchclust.packing.sections import PackedFileError, SectionWriter
from torchclust.packing.size import PackedSize, packed_size
from torchclust.packing.tensors import EXTRA, ModelTensor, tensors_of

_SQUEEZED_UP_TO = 1 << 16  # elements: larger tensors that are not clustered would take seconds

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> PackedSize:
    """Write a model's parameters and buffers into one file, close to their entropy.

    Clustered, stripped and pruned weights are recognised by their values and become codebooks (or
    int8 codes and scales) and entropy-coded indices; everything else is stored as it is
    (`torchclust.round_mantissas_` makes biases and norms smaller before). The model
    stays unchanged. Tensors are coded one after the other, so beside the model at most twice the
    largest one is needed. The file appears at once when it is complete: a write that dies leaves
    the old one.

    Args:
        model: any module. Behind `cluster_` and `torch.nn.utils.prune` the computed weight is
            stored, under the name it has when stripped; a "nearest" weight's latent values are not.
        path: of the file; conventionally ``*.packed``.

    Returns:
        What the file holds, tensor by tensor; print it.

    Raises:
        ImportError: without constriction, naming the install command.
        TypeError, ValueError: a tensor that a file cannot hold (lazy, sparse, on meta; extra state
            that is no tensor); nothing is written.
        OSError: from the file system.

    Example:
        >>> import tempfile
        >>> from torchclust import cluster_
        >>> model = cluster_(torch.nn.Linear(256, 256), 16)
        >>> size = save_packed(model, tempfile.mkdtemp() + "/model.packed")
        >>> weight = size.rows[1]
        >>> weight.name, weight.kind, weight.n_clusters, size.bytes < 256 * 256 * 4 / 7
        ('weight', 'codebook', 16, True)
    """
    constriction()
    tensors = tensors_of(model)
    with _replacing(Path(path)) as file:
        writer = SectionWriter(file, len(tensors))
        records = [_write_tensor(writer, tensor) for tensor in tensors]
        writer.finish(write_contents(records))
    return packed_size(path)


def load_packed_(model: ModuleT, path: str | os.PathLike[str]) -> ModuleT:
    """Give a model the values that a packed file holds, in place, bit for bit.

    Afterwards the model is what the saved one was after `strip_`: clustered and pruned tensors of
    ``model`` become plain parameters. (Clustering it again with as many clusters finds the same
    codebooks, since then every distinct value is its own centroid.) The whole file is verified
    and decoded once before anything changes, so if this raises, the model is as it was.

    Args:
        model: the architecture that was saved, clustered or not, on any device.
        path: a file that `save_packed` wrote.

    Returns:
        The same object.

    Raises:
        PackedFileError: the file is damaged, incomplete, none, or of a newer format.
        ValueError: the file is sound and does not fit the model: other names, shapes, dtypes or
            ties.
        ImportError: without constriction, naming the install command.
        OSError: from the file system.

    Example:
        >>> import tempfile
        >>> from torchclust import cluster_
        >>> path = tempfile.mkdtemp() + "/model.packed"
        >>> saved, loaded = cluster_(torch.nn.Linear(64, 64)), torch.nn.Linear(64, 64)
        >>> _ = save_packed(saved, path)
        >>> torch.equal(load_packed_(loaded, path).weight, saved.weight)
        True
    """
    constriction()
    with open(path, "rb") as file:
        try:
            return load_packed_file_(model, file)
        except PackedFileError as error:
            raise PackedFileError(
                f"{os.fspath(path)!r}: {error}. Copy it anew, or write it again:  "
                f"save_packed(model, path)"
            ) from None


def load_packed_file_(model: ModuleT, file: BinaryIO) -> ModuleT:
    """`load_packed_` from an open, seekable binary file."""
    records = read_records(file)
    _check_fit(records, tensors_of(model))
    for record in records:
        for _ in record.blocks(file):
            pass
    strip_(model, validate=False)
    for tensor in tensors_of(model):
        if tensor.pruned is not None:
            prune.remove(*tensor.pruned)
    targets = model.state_dict(keep_vars=True)
    for record in records:
        _fill(model, targets, record, file)
    return model


def _write_tensor(writer: SectionWriter, tensor: ModelTensor) -> tuple[Header, int]:
    """Write a tensor's data; return its header, and how many bytes they are."""
    value = tensor.value()
    dtype = dtype_of(value)
    assert dtype is not None
    bits, shape = to_bits(value), tuple(value.shape)
    stored = dtype.bits.newbyteorder("<")
    raw: bytes | memoryview = bits.astype(stored, copy=False).view(np.uint8).data
    small = squeezed(bits) if bits.size <= _SQUEEZED_UP_TO else b""
    is_small = bool(small) and len(small) < len(raw)
    raw = small if is_small else raw
    chosen = choose(bits, dtype, Layout(shape, tensor.axis), tensor.hint(), len(raw))
    if chosen.coding is None:
        writer.write(len(raw), [raw])
        return Header(tensor.names, dtype, Layout(shape), squeezed=is_small), len(raw)
    layout = Layout(shape, tensor.axis)
    symbols = symbols_of(chosen.coding, bits, layout)
    contexts, classes = find_contexts(symbols, chosen.counts)
    coded = encode_rows(chosen.coding, symbols, contexts, classes, layout)
    words = coded.astype("<u4", copy=False).tobytes()
    n_literals = chosen.coding.n_literals if isinstance(chosen.coding, Sparse) else 0
    blocks = literals(bits, dtype, layout) if n_literals else iter(())
    parts = (block.astype(stored, copy=False).tobytes() for block in blocks)
    length = n_literals * dtype.unit + len(words)
    writer.write(length, _then(parts, words))
    bits_per_symbol = entropy(chosen.counts)
    header = Header(
        tensor.names, dtype, layout, chosen.coding, contexts, bits_per_symbol, chosen.zeros
    )
    return header, length


def _then(parts: Iterator[bytes], last: bytes) -> Iterator[bytes]:
    yield from parts
    yield last


def _check_fit(records: list[Record], tensors: list[ModelTensor]) -> None:
    """Check that the model has exactly the file's tensors, before anything is allocated."""
    by_name = {name: record for record in records for name in record.header.names}
    expected = {name: tensor for tensor in tensors for name in tensor.names}
    lacks, extra = sorted(by_name.keys() - expected), sorted(expected.keys() - by_name)
    if lacks or extra:
        computed = [name for name in lacks if any(_is_computed(name, own) for own in extra)]
        remedy = (
            f". Here {computed[0]!r} is computed, as by weight_norm, which clustering took away: "
            f"make it plain first, by torch.nn.utils.parametrize.remove_parametrizations or "
            f"torch.nn.utils.remove_weight_norm"
            if computed
            else ""
        )
        raise ValueError(
            f"the file does not fit this model: only the file has {_some(lacks)}, only the model "
            f"has {_some(extra)}; load_packed_ needs the architecture that was saved{remedy}"
        )
    for tensor in tensors:
        owners = {id(by_name[name]) for name in tensor.names}
        if len(owners) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, tensor.names))} are one tensor in this model and several "
                f"in the file; load_packed_ needs the architecture that was saved"
            )
        header = by_name[tensor.names[0]].header
        there = header.layout.shape, header.dtype.name
        here = tensor.shape, str(tensor.stored.dtype).removeprefix("torch.")
        if there != here:
            convert = "" if there[1] == here[1] else f", as model.to(torch.{there[1]}) makes it"
            raise ValueError(
                f"{tensor.names[0]!r} is {there[0]} {there[1]} in the file and {here[0]} {here[1]} "
                f"in this model; load_packed_ needs the architecture that was saved{convert}"
            )


def _is_computed(name: str, stored: str) -> bool:
    """Whether a tensor of that name is computed from the one that is stored so."""
    path, _, last = name.rpartition(".")
    prefix = f"{path}." if path else ""
    return stored.startswith(f"{prefix}parametrizations.{last}.original") or stored == f"{name}_g"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "none"


def _fill(model: nn.Module, targets: Mapping[str, Tensor], record: Record, file: BinaryIO) -> None:
    """Give the tensors of a record its values; decoded on the CPU, and only here kept alive."""
    header = record.header
    dtype, layout = header.dtype, header.layout
    if header.coding is None:
        rows = np.empty((1, layout.n_elements * dtype.units), dtype.bits)
    else:
        rows = np.empty((layout.n_rows, layout.n_columns), dtype.bits)
    for row, column, bits in record.blocks(file):
        rows[row, column] = bits
    value = layout.restore(rows, dtype)
    for name in header.names:
        path, _, last = name.rpartition(".")
        if last == EXTRA:
            model.get_submodule(path).set_extra_state(value)
        else:
            with torch.no_grad():
                targets[name].copy_(value)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the path's place, whole and on disk, when the block ends well."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
