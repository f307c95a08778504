"""Write a model into one small file and read it back, bit for bit: Deep Compression's last step.

A packed file holds the *values* of a state dict: of `strip_(model).state_dict()`, with every
tensor coded in the way that makes it smallest. So the file of a clustered model and that of the
stripped model are the same, and it depends on nothing that training keeps (latent weights,
configurations); `torchclust.restore_` and a checkpoint are for going on with training.

The format is specified byte by byte in ``docs/packed-format.md``. Its parts live in
`packed_sections` (checksums), `packed_record` (headers), `packed_coding` and `packed_entropy` (a
tensor's bits to bytes), `packed_search` (which coding); here models meet files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from torchclust.model import Clustering, is_clustered, strip_
from torchclust.packed_coding import Layout, Sparse, dtype_of, encode_rows, literals, to_bits
from torchclust.packed_entropy import constriction, entropy
from torchclust.packed_record import Header, Record, read_records, write_header
from torchclust.packed_search import Hint, choose
from torchclust.packed_sections import PackedFileError, SectionWriter
from torchclust.packed_size import PackedSize, packed_size

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_MARK = "parametrizations."
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> PackedSize:
    """Write a model's parameters and buffers into one file, close to their entropy.

    Clustered, stripped and pruned weights are recognised by their values and become codebooks (or
    int8 codes and scales) and entropy-coded indices; everything else is stored as it is. The model
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
    tensors = _tensors_of(model)
    with _replacing(Path(path)) as file:
        writer = SectionWriter(file, len(tensors))
        for tensor in tensors:
            _write_tensor(writer, tensor)
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
    _check_fit(records, _tensors_of(model))
    for record in records:
        for _ in record.blocks(file):
            pass
    strip_(model, validate=False)
    for tensor in _tensors_of(model):
        if tensor.pruned is not None:
            prune.remove(*tensor.pruned)
    targets = model.state_dict(keep_vars=True)
    for record in records:
        _fill(targets, record, file)
    return model


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a model by the names that it has in the stripped model's state dict.

    Attributes:
        names: one, or several where it is tied.
        stored: the parameter or buffer that stands for it: itself where it is plain.
        clustering: what computes it, if it is clustered.
        pruned: module and tensor name, if `torch.nn.utils.prune` computes it.
        axis: the output channels' dimension.
    """

    names: tuple[str, ...]
    stored: Tensor
    clustering: Clustering | None
    pruned: tuple[nn.Module, str] | None
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        if self.clustering is None:
            return tuple(self.stored.shape)
        latent = self.clustering.latent
        return tuple((self.clustering.indices if latent is None else latent).shape)

    def value(self) -> Tensor:
        """Evaluate it, where no cache keeps the result."""
        if self.clustering is not None:
            return self.clustering.value
        if self.pruned is not None:
            module, name = self.pruned
            return self.stored.detach() * module.get_buffer(name + "_mask")
        return self.stored.detach()

    def hint(self) -> Hint:
        """What the clustering knows beyond the values."""
        if self.clustering is None:
            return Hint()
        config, codes, scale = self.clustering.config, self.clustering.codes, self.clustering.scale
        if codes is not None and scale is not None:
            tiny = torch.finfo(scale.dtype).tiny
            scale = torch.where(scale.detach() >= tiny, scale.detach(), 1)  # channels of zeros only
            return Hint(codes=codes.cpu().numpy(), scales=to_bits(scale))
        rows = {"tensor": None, "channel": 1, "group": config.group_size}
        return Hint(rows_per_book=rows[config.granularity])


def _tensors_of(model: nn.Module) -> list[_Tensor]:
    """Every tensor of the stripped model's state dict, by module and name; tied ones once.

    A clustered tensor comes late in its state dict. In this order, files of the clustered and of
    the stripped model are the same.
    """
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    place = {path: number for number, path in enumerate(modules)}
    each = [tensor for key in state if (tensor := _tensor_of(modules, key, state)) is not None]
    each.sort(key=lambda t: (place.get(t.names[0].rpartition(".")[0], -1), t.names[0]))
    found: dict[int, _Tensor] = {}
    for tensor in each:
        first = found.setdefault(id(tensor.stored), tensor)
        if first is not tensor:
            tied = dataclasses.replace(first, names=first.names + tensor.names)
            found[id(tensor.stored)] = tied
    return list(found.values())


def _tensor_of(
    modules: Mapping[str, nn.Module], key: str, state: Mapping[str, object]
) -> _Tensor | None:
    """The tensor that a key of the state dict belongs to; None for what is derived from others."""
    clustering = pruned = None
    name = key
    owner, mark, rest = key.rpartition(_MARK)
    if mark:
        module, tensor_name = modules[owner.rstrip(".")], rest.partition(".")[0]
        if is_clustered(module, tensor_name):
            if not rest.endswith(".original"):
                return None
            name, clustering = owner + tensor_name, Clustering(module, tensor_name)
    elif key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state:
        return None
    elif key.endswith("_orig") and key.removesuffix("_orig") + "_mask" in state:
        name = key.removesuffix("_orig")
        pruned = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
    path, _, last = name.rpartition(".")
    stored = _storable(key, state[key])
    by_columns = last == "weight" and isinstance(modules.get(path), _CONV_TRANSPOSE)
    return _Tensor((name,), stored, clustering, pruned, axis=int(by_columns))


def _storable(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name!r} of the state dict is {type(tensor).__name__}, and a packed file holds "
            f"tensors only; save such extra state beside it"
        )
    if is_lazy(tensor) or tensor.is_meta:
        what = "lazy" if is_lazy(tensor) else "on the meta device"
        raise ValueError(f"{name!r} is {what} and has no values; run one batch or load it first")
    if dtype_of(tensor) is None or tensor.layout != torch.strided:
        raise TypeError(
            f"{name!r} is {tensor.dtype} ({tensor.layout}), which a packed file cannot hold; "
            f"convert it to a dense tensor of an ordinary dtype first"
        )
    return tensor


def _write_tensor(writer: SectionWriter, tensor: _Tensor) -> None:
    value = tensor.value()
    dtype = dtype_of(value)
    assert dtype is not None
    bits, shape = to_bits(value), tuple(value.shape)
    chosen = choose(bits, dtype, Layout(shape, tensor.axis), tensor.hint())
    layout = Layout(shape, 0 if chosen.coding is None else tensor.axis)
    bits_per_symbol = entropy(chosen.counts)
    header = Header(tensor.names, dtype, layout, chosen.coding, bits_per_symbol, chosen.zeros)
    encoded = write_header(header)
    writer.write(len(encoded), [encoded])
    stored = dtype.bits.newbyteorder("<")
    if chosen.coding is None:
        raw = bits.astype(stored, copy=False).view(np.uint8).data
        writer.write(len(raw), [raw])
        return
    words = encode_rows(chosen.coding, bits, layout).astype("<u4", copy=False).tobytes()
    n_literals = chosen.coding.n_literals if isinstance(chosen.coding, Sparse) else 0
    blocks = literals(bits, dtype, layout) if n_literals else iter(())
    parts = (block.astype(stored, copy=False).tobytes() for block in blocks)
    writer.write(n_literals * dtype.unit + len(words), _then(parts, words))


def _then(parts: Iterator[bytes], last: bytes) -> Iterator[bytes]:
    yield from parts
    yield last


def _check_fit(records: list[Record], tensors: list[_Tensor]) -> None:
    """Check that the model has exactly the file's tensors, before anything is allocated."""
    by_name = {name: record for record in records for name in record.header.names}
    expected = {name: tensor for tensor in tensors for name in tensor.names}
    lacks, extra = sorted(by_name.keys() - expected), sorted(expected.keys() - by_name)
    if lacks or extra:
        raise ValueError(
            f"the file does not fit this model: only the file has {_some(lacks)}, only the model "
            f"has {_some(extra)}; load_packed_ needs the architecture that was saved"
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "none"


def _fill(targets: Mapping[str, Tensor], record: Record, file: BinaryIO) -> None:
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
    with torch.no_grad():
        for name in header.names:
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
