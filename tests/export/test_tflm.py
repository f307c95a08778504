"""Lookup tables for tflite-micro: smaller, equal to the bit, or refused."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from export_networks import mobilenet_v1, randomize_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchclust import cluster_
from torchclust.export import ExportError, inspect_tflite, table_plan, tflm, to_tflite, vela
from torchclust.export.graph import read_graph
from torchclust.export.lookup_tables import Encoded, encode, with_tables
from torchclust.export.micro_interpreter import Micro, as_inputs, least_arena, random_inputs
from torchclust.export.parts import in_parts
from torchclust.export.resolver import DECODE

module = importlib.import_module("torchclust.export.tflm")


def network() -> nn.Module:
    """Convolutions, one of them depthwise, with BatchNorm, and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 5, groups=64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 4, 48), nn.ReLU(), nn.Linear(48, 10)),
    ).eval()


def written(model: nn.Module, path: Path, images: torch.Tensor, **options: bool) -> Path:
    to_tflite(model, images[:1], path, calibration=[images], **options)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, images: torch.Tensor
) -> Callable[[int | None], Path]:
    """The network's int8 file for so many clusters, None for none; each is made once."""
    folder, made = tmp_path_factory.mktemp("tflm"), {}

    def file(n_clusters: int | None) -> Path:
        if n_clusters not in made:
            model = randomize_norms(network(), tiny=False)
            if n_clusters:
                rules = {"*": n_clusters, "3.weight": n_clusters}  # depthwise only if named
                cluster_(model, rules, codebook_dtype="int8")
            made[n_clusters] = written(model, folder / f"{n_clusters}.tflite", images)
        return made[n_clusters]

    return file


def decoded(
    bits: int, indices: bytes, table: bytes, shape: tuple[int, ...], axis: int
) -> np.ndarray:
    """A decoder that is written from the format's description, value by value."""
    stream = "".join(f"{byte:08b}" for byte in indices)
    stride, values = table[6], np.frombuffer(table[16:], np.int8)
    out = np.empty(shape, np.int8)
    for number, place in enumerate(np.ndindex(*shape)):
        index = int(stream[number * bits : (number + 1) * bits], 2)
        out[place] = values[place[axis] * stride + index]
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_encoding_decodes_to_the_weight(data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([0, 3]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)))
    codes = data.draw(st.integers(1, 130))
    seed = data.draw(st.integers(0, 1000))
    draw = np.random.default_rng(seed)
    weight = draw.choice(draw.permutation(256)[:codes] - 128, shape).astype(np.int8)
    found = encode(weight, axis, data.draw(st.sampled_from([1, shape[axis]])))
    assert found is not None or len(np.unique(weight)) > 128
    if found is not None:
        assert 1 <= found.bits <= 7
        assert found.table[5] & 7 == found.bits
        np.testing.assert_array_equal(
            decoded(found.bits, found.indices, found.table, shape, axis), weight
        )


def test_one_table_serves_all_channels_unless_each_has_few_of_many_codes() -> None:
    draw = np.random.default_rng(0)
    shared = draw.choice([-9, 0, 9], (32, 3, 3, 16)).astype(np.int8)
    found = encode(shared, 0, 32)
    assert found is not None
    assert (found.bits, len(found.table)) == (2, 16 + 3)
    own = shared + np.arange(-48, 48, 3, dtype=np.int8)[:, None, None, None]
    found = encode(own, 0, 32)
    assert found is not None
    assert (found.bits, len(found.table)) == (2, 16 + 3 * 32)
    whole = encode(own, 0, 1)
    assert whole is not None
    assert whole.bits > 2


@pytest.mark.parametrize(("n_clusters", "bits"), [(4, 2), (8, 3), (16, 4), (32, 5), (128, 7)])
def test_smaller_and_equal_to_the_bit(
    n_clusters: int, bits: int, files: Callable, images: torch.Tensor, tmp_path: Path
) -> None:
    """All index widths; convolution, depthwise and linear; BatchNorm of both signs."""
    path, output = files(n_clusters), tmp_path / "tables.tflite"
    report = tflm(path, output, inputs=images)
    rewritten = [row for row in report.rows if not row.left]
    assert {row.index_bits for row in rewritten} == {bits}
    assert {row.operator for row in rewritten} >= {"CONV_2D"} | (
        {"DEPTHWISE_CONV_2D"} if n_clusters < 32 else set()
    )
    assert report.flash_after == output.stat().st_size < report.flash_before
    assert report.compared == 100 + len(images)
    assert report.time_ratio > 0
    before, after = Micro(path.read_bytes()), Micro(output.read_bytes())
    ports = inspect_tflite(path).inputs
    for sample in (*as_inputs(images.numpy(), ports), *random_inputs(ports, 20, seed=9)):
        np.testing.assert_array_equal(before(sample)[0], after(sample)[0])
    rewritten_file, original = inspect_tflite(output), inspect_tflite(path)
    assert (rewritten_file.inputs, rewritten_file.outputs) == (original.inputs, original.outputs)
    operators = rewritten_file.operators
    assert operators[DECODE] == len(rewritten)
    assert "bits" in str(report)


def test_more_inputs_of_a_concatenation_than_tflite_micro_takes(tmp_path: Path) -> None:
    """As the outputs of a recurrent layer's steps are: what to do stands behind its words."""

    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.relu(x - 0.1 * step) for step in range(11)], 1)

    images = torch.randn(4, 2, 8, 8)
    to_tflite(Steps(), images[:1], tmp_path / "m.tflite", calibration=[images])
    with pytest.raises(ExportError, match=r"kMaxInputNum .* takes ten inputs at most: .* h_n,"):
        Micro((tmp_path / "m.tflite").read_bytes())


def test_arenas_are_the_least_that_work(files: Callable, tmp_path: Path) -> None:
    report = tflm(files(8), tmp_path / "tables.tflite")
    for path, arena in ((files(8), report.arena_before), (report.path, report.arena_after)):
        Micro(path.read_bytes(), arena)
        with pytest.raises(ExportError, match=r"tflite-micro cannot run this file: .*[Ff]ail"):
            Micro(path.read_bytes(), arena - 16)
    assert report.arena_after > report.arena_before


def test_tensors_that_would_grow_or_have_many_codes_are_left(
    files: Callable, tmp_path: Path
) -> None:
    report = tflm(files(16), tmp_path / "tables.tflite")
    small = [row for row in report.rows if row.left]
    assert {row.left for row in small} == {"it would grow"}
    assert all(row.bytes_after == row.bytes_before < 500 for row in small)
    with pytest.raises(ExportError, match="no weight that a lookup table makes smaller: cluster"):
        tflm(files(None), tmp_path / "none.tflite")
    assert not (tmp_path / "none.tflite").exists()


def test_max_arena_cuts_the_largest_weights_or_leaves_them(files: Callable, tmp_path: Path) -> None:
    path = files(8)
    free = tflm(path, tmp_path / "free.tflite")
    cut = tflm(path, tmp_path / "cut.tflite", max_arena=free.arena_after - 2000)
    assert cut.arena_after <= free.arena_after - 2000
    assert free.flash_after < cut.flash_after < cut.flash_before
    assert len(cut.rows) > len(free.rows)
    assert sum(row.bytes_before for row in cut.rows) == sum(row.bytes_before for row in free.rows)
    assert all(row.left is None for row in cut.rows)
    assert inspect_tflite(cut.path).operators["CONCATENATION"] == 1
    bound = cut.arena_before + 700
    tight = tflm(path, tmp_path / "tight.tflite", max_arena=bound)
    assert tight.arena_after <= bound
    left = [row for row in tight.rows if row.left == "its decoding exceeds max_arena"]
    assert max(row.bytes_before for row in left) == 48 * 256
    with pytest.raises(ExportError, match=r"max_arena=1,000 is too small: .* already needs"):
        tflm(path, tmp_path / "no.tflite", max_arena=1000)
    with pytest.raises(ExportError, match="leaves no weight to decode"):
        tflm(path, tmp_path / "no.tflite", max_arena=free.arena_before + 16)
    assert not (tmp_path / "no.tflite").exists()


def test_a_weight_has_no_more_parts_than_rows(tmp_path: Path) -> None:
    """Five rows in two, four and five parts; what does not fit then is left."""
    torch.manual_seed(0)
    model, data = nn.Linear(3072, 5).eval(), torch.randn(4, 3072)
    path = written(cluster_(model, 8, codebook_dtype="int8"), tmp_path / "m.tflite", data)
    for bound, rows in ((17000, [2, 3]), (13000, [1, 1, 1, 2]), (11000, [1] * 5)):
        report = tflm(path, tmp_path / "t.tflite", max_arena=bound)
        assert report.arena_after <= bound
        assert [row.shape[0] for row in report.rows] == rows
    with pytest.raises(ExportError, match="leaves no weight to decode"):
        tflm(path, tmp_path / "t.tflite", max_arena=9500)


def test_a_convolution_in_groups_is_not_cut(tmp_path: Path) -> None:
    """Cut, its channels would belong to other groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=2)).eval()
    cluster_(model, 8, codebook_dtype="int8")
    path = written(model, tmp_path / "m.tflite", torch.randn(4, 3, 12, 12))
    free = tflm(path, tmp_path / "free.tflite")
    report = tflm(path, tmp_path / "t.tflite", max_arena=free.arena_after - 2000)
    assert report.arena_after <= free.arena_after - 2000
    left = "its decoding exceeds max_arena"
    assert [(row.shape, row.left) for row in report.rows] == [
        ((32, 3, 3, 3), None),
        ((64, 3, 3, 16), left),
    ]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_parts_answer_as_the_whole(count: int, files: Callable) -> None:
    """Also where channels do not divide evenly; weights, biases and scales are cut, not copied."""
    content = files(8).read_bytes()
    graph = read_graph(content)
    weights = [w for w in graph.weights() if w.operator.name != "DEPTHWISE_CONV_2D"]
    parts, origins = in_parts(content, {w.tensor.index: count for w in weights})
    assert sorted(origins.values()) == sorted([w.tensor.index for w in weights] * count)
    whole, cut = Micro(content), Micro(parts)
    for sample in random_inputs(inspect_tflite(files(8)).inputs, 10):
        np.testing.assert_array_equal(cut(sample)[0], whole(sample)[0])
    assert len(parts) < len(content) + 700 * count * len(weights)
    assert in_parts(content, {}) == (content, {})


def test_the_gate_catches_tables_that_are_read_wrongly(
    files: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One table, as if for one channel, where the kernel steps from channel to channel."""

    def per_tensor(weight: np.ndarray, axis: int, scales: int) -> Encoded | None:
        found = encode(weight, axis, scales)
        if found is None:
            return None
        wrong = bytearray(found.table)
        wrong[6] = min(len(found.table) - 16, 255)
        return dataclasses.replace(found, table=bytes(wrong))

    monkeypatch.setattr(table_plan, "encode", per_tensor)
    with pytest.raises(ExportError, match="answers differently with lookup tables, so nothing was"):
        tflm(files(8), tmp_path / "tables.tflite")
    assert list(tmp_path.iterdir()) == []


def test_the_gate_catches_a_single_wrong_weight(
    files: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def damaged(weight: np.ndarray, axis: int, scales: int) -> Encoded | None:
        found = encode(weight, axis, scales)
        if found is None:
            return None
        return dataclasses.replace(
            found, indices=bytes([found.indices[0] ^ 0xC0]) + found.indices[1:]
        )

    monkeypatch.setattr(table_plan, "encode", damaged)
    with pytest.raises(ExportError, match="answers differently"):
        tflm(files(4), tmp_path / "tables.tflite")


def test_the_compressor_in_the_wheel_agrees(files: Callable) -> None:
    """Its tables, one per channel, are larger than ours, and answer the same."""
    from tflite_micro.tensorflow.lite.micro.compression import compress, spec

    content = files(8).read_bytes()
    graph = read_graph(content)
    (weight,) = (w for w in graph.weights() if w.tensor.data.size == 48 * 256)
    index = weight.tensor.index
    way = spec.LookUpTableCompression(3, spec.PerChannel(0))
    theirs = bytes(compress(content, [spec.Tensor(0, index, [way])]))
    found = encode(weight.tensor.data, 0, 48)
    assert found is not None
    ours = with_tables(content, {index: found})
    assert len(ours) < len(theirs) < len(content)
    first, second = Micro(theirs), Micro(ours)
    for sample in random_inputs(inspect_tflite(files(8)).inputs, 10):
        np.testing.assert_array_equal(first(sample)[0], second(sample)[0])


def test_granularity_channel_keeps_a_table_for_each(images: torch.Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 5)).eval()
    cluster_(model, 2, granularity="channel")
    report = tflm(written(model, tmp_path / "m.tflite", images), tmp_path / "t.tflite")
    row = report.rows[1]
    assert (row.index_bits, row.left) == (1, None)
    assert row.codes > 4


def test_depthwise_separable_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cluster_(randomize_norms(mobilenet_v1()).eval(), 8, codebook_dtype="int8")
    data = torch.randn(6, 3, 32, 32)
    report = tflm(written(model, tmp_path / "m.tflite", data), tmp_path / "t.tflite", inputs=data)
    assert report.flash_after < report.flash_before
    assert least_arena((tmp_path / "t.tflite").read_bytes()) == report.arena_after


def test_a_shared_weight_is_decoded_for_each_use(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(32, 32, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(torch.relu(self.mix(x)))

    model, data = cluster_(Twice().eval(), 4, codebook_dtype="int8"), torch.randn(4, 32, 6, 6)
    report = tflm(written(model, tmp_path / "m.tflite", data), tmp_path / "t.tflite")
    decodes = inspect_tflite(report.path).operators[DECODE]
    assert decodes == 2 * sum(row.left is None for row in report.rows) or decodes == 2


def test_what_cannot_be_done_says_why(
    files: Callable, images: torch.Tensor, tmp_path: Path
) -> None:
    output = tmp_path / "t.tflite"
    floating = tmp_path / "float.tflite"
    model = network()
    to_tflite(model, images[:1], floating, calibration=None, float=True)
    with pytest.raises(ExportError, match=r"is not an int8 file: it takes float32. Write one"):
        tflm(floating, output)
    compiled = vela(files(8), output_dir=tmp_path).path
    with pytest.raises(ExportError, match="was compiled by Vela, and only an Ethos-U runs it"):
        tflm(compiled, output)
    with pytest.raises(ValueError, match="inputs holds 2 arrays, the file has 1"):
        tflm(files(8), output, inputs=(images, images))
    with pytest.raises(ValueError, match="all but the first dimension, which counts samples"):
        tflm(files(8), output, inputs=torch.zeros(2, 3, 4, 4))
    assert not output.exists()


def test_the_output_is_whole_or_what_it_was(
    files: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder that is missing says so before anything is planned."""
    path, output = files(4), tmp_path / "t.tflite"
    output.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError("no space left on the device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            tflm(path, output)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("t.tflite", b"before")
    ]
    monkeypatch.setattr(module, "plan", None)
    with pytest.raises(FileNotFoundError, match=r"cannot write .*the folder .*nowhere does not"):
        tflm(path, tmp_path / "nowhere" / "t.tflite")


def test_an_operator_that_tflite_micro_lacks(files: Callable, tmp_path: Path) -> None:
    content = files(8).read_bytes()
    operator = read_graph(content).operators[-1].name
    from torchclust.export import backends
    from torchclust.export.container import pack, unpack

    model, codes = unpack(content), backends.schema().BuiltinOperator
    for code in model.operatorCodes:
        if code.builtinCode == getattr(codes, operator):
            code.builtinCode = code.deprecatedBuiltinCode = codes.TOPK_V2
    (tmp_path / "m.tflite").write_bytes(pack(model, len(content)))
    with pytest.raises(ExportError, match="tflite-micro has no operator TOPK_V2: leave that part"):
        tflm(tmp_path / "m.tflite", tmp_path / "t.tflite")


def test_tokens_need_inputs(tmp_path: Path) -> None:
    from torchclust.export.inspect import Port

    with pytest.raises(ExportError, match="random int32 values for the input 'x' may be out"):
        random_inputs([Port("x", (1, 4), "int32", 0.0, 0)], 3)


@pytest.mark.parametrize(
    ("version", "age"),
    [("0.dev20250101000000", "older"), ("0.dev20990101000000", "newer"), (None, "not installed")],
)
def test_another_tflite_micro_is_an_error(
    version: str | None, age: str, files: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(module.metadata, "version", installed)
    with pytest.raises(ImportError, match=rf"were tested with tflite-micro .*{age}.*pip install"):
        tflm(files(8), tmp_path / "t.tflite")
