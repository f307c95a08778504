"""Compiled files hold what the originals do; other files and damage are errors."""

from __future__ import annotations

import dataclasses
import json
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_files import compile_files, program
from export_networks import CASES, mobilenet_v2, randomize_norms
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.cli import main
from torchclust.export import (
    CompiledFileError,
    CompiledInspection,
    NotVerifiedError,
    inspect_tflite,
    to_tflite,
    vela,
    verify_compiled,
)
from torchclust.export.accelerators import ACCELERATORS
from torchclust.export.compiled.commands import read_payload
from torchclust.export.compiled.layers import read_layers
from torchclust.export.compiled.matching import match
from torchclust.export.compiled.streams import cut, decode
from torchclust.export.compiled.verification import inspect_compiled
from torchclust.export.graph import read_graph


def odd_kernels() -> nn.Module:
    """Kernels beyond 8x8, of one side only, dilated by 2 and by 3, and half sparse."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, (9, 3), stride=2, padding=4),
        nn.ReLU(),
        nn.Conv2d(24, 20, 3, dilation=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(20, 17, 3, dilation=3, padding=3),
        nn.Conv2d(17, 17, 5, groups=17, padding=2, stride=(1, 2)),
        nn.Conv2d(17, 40, 1),
        nn.Flatten(),
        nn.Linear(40 * 8 * 6, 6),
    )
    with torch.no_grad():
        model[6].weight[:, ::2] = 0
    return model


IMAGES: Sequence[Tensor] = (torch.randn(1, 3, 16, 16),)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Sequence[Tensor], int | None]] = {
    "mobile": (mobilenet_v2, (torch.randn(1, 3, 32, 32),), 4),
    "flattened": (CASES["flattened"].build, CASES["flattened"].inputs(0), 4),
    "transposed": (CASES["encoder_decoder"].build, CASES["encoder_decoder"].inputs(0), 16),
    "lstm": (CASES["lstm"].build, CASES["lstm"].inputs(0), None),
    "tied": (CASES["tied"].build, CASES["tied"].inputs(0), 16),
    "odd": (odd_kernels, IMAGES, 32),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    for name, (build, inputs, clusters) in NETWORKS.items():
        torch.manual_seed(0)
        model = randomize_norms(build()).eval()
        if clusters:
            cluster_(model, clusters, codebook_dtype="int8", strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random networks are noise in int8
            to_tflite(model, tuple(inputs), folder / f"{name}.tflite", calibration=[tuple(inputs)])
    return {name: folder / f"{name}.tflite" for name in NETWORKS}


@pytest.fixture(scope="module")
def compiled(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    return compile_files(originals.values(), ACCELERATORS, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_and_scale_is_in_the_compiled_file(
    name: str,
    accelerator: str,
    originals: dict[str, Path],
    compiled: dict[tuple[str, str], Path],
) -> None:
    found = verify_compiled(compiled[name, accelerator], originals[name])
    inspected = inspect_tflite(originals[name])
    assert found.accelerator == accelerator
    assert [row.name for row in found] == [row.name for row in inspected]
    assert [row.weights for row in found] == [np.prod(row.shape) for row in inspected]
    for row, original in zip(found, inspected, strict=True):
        if row.format != "cpu" and row.palette:
            assert row.palette <= max(2, original.codes)  # a 0 for padding is in every codebook
        assert 0 <= row.padding < 1
        assert row.bits == 8 * row.bytes / row.weights


def test_both_formats_of_the_u85_occur(compiled: dict[tuple[str, str], Path]) -> None:
    formats = {
        row.format
        for (_, accelerator), path in compiled.items()
        if "u85" in accelerator
        for row in inspect_compiled(path)
    }
    assert formats == {"slow", "fast"}


def test_optimised_for_size(originals: dict[str, Path], tmp_path: Path) -> None:
    few = ["ethos-u55-128", "ethos-u65-512", "ethos-u85-512"]
    for path in compile_files([originals["mobile"]], few, tmp_path, "--optimise", "Size").values():
        assert verify_compiled(path, originals["mobile"]).weights > 10_000


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-512", "ethos-u85-256"])
def test_every_flipped_bit_is_found(
    accelerator: str, compiled: dict[tuple[str, str], Path], originals: dict[str, Path]
) -> None:
    """In a sample of all streams; in one stream, in each bit."""
    payload, constants = program(compiled["tied", accelerator])
    device, operations = read_payload(payload)
    layers = read_layers(read_graph(originals["tied"].read_bytes()))
    rng, data = np.random.default_rng(0), bytearray(constants)
    for number, operation in enumerate(operations):
        for span in (*operation.weights, *operation.scales):
            bits = np.arange(8 * span.start, 8 * (span.start + span.length))
            for bit in bits if number == 0 else rng.choice(bits, 60):
                data[bit >> 3] ^= 1 << (bit & 7)
                try:
                    list(match([operation], bytes(data), device, layers))
                except CompiledFileError:
                    pass
                else:  # the flag that a slice of small quotients does not need
                    decoded = decode(operation, bytes(data), device)
                    assert bit - 8 * span.start == 21
                    assert np.array_equal(
                        decoded.values, decode(operation, constants, device).values
                    )
                data[bit >> 3] ^= 1 << (bit & 7)
    assert bytes(data) == constants


def test_another_file_is_not_the_original(
    originals: dict[str, Path], compiled: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    path = compiled["mobile", "ethos-u55-128"]
    with pytest.raises(NotVerifiedError, match=r"has a convolution of shape .* that no layer"):
        verify_compiled(path, originals["lstm"])
    content = bytearray(originals["mobile"].read_bytes())
    graph = read_graph(content)
    layer = next(graph.weights())
    bias = graph.bias(layer.operator)
    assert bias is not None
    bias[0] += 1
    (tmp_path / "bias.tflite").write_bytes(content)
    with pytest.raises(CompiledFileError, match="the compiled file has other scales in"):
        verify_compiled(path, tmp_path / "bias.tflite")
    layer.matrix[3, 2] ^= 1
    (tmp_path / "weight.tflite").write_bytes(content)
    with pytest.raises(CompiledFileError, match=r"other weights in .*: 1 of .* differ, the first"):
        verify_compiled(path, tmp_path / "weight.tflite")


class Gains(nn.Module):
    """Gains that are one number each, as ConvNeXt begins: the same codes in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(3))
        self.gains = nn.ParameterList(torch.full((8, 1, 1), 1e-3 * 2**i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, gain in zip(self.convolutions, self.gains, strict=True):
            x = convolution(x).relu() * gain
        return x


def test_layers_with_the_same_codes_are_told_apart_by_their_scales(tmp_path: Path) -> None:
    """In whatever order the compiler computes them."""
    images = torch.randn(16, 3, 16, 16)
    torch.manual_seed(0)
    to_tflite(Gains(), images, tmp_path / "gains.tflite", calibration=[images])
    (path,) = compile_files([tmp_path / "gains.tflite"], ["ethos-u55-128"], tmp_path).values()
    payload, constants = program(path)
    device, operations = read_payload(payload)
    layers = read_layers(read_graph((tmp_path / "gains.tflite").read_bytes()))
    forwards = [m.layer for m in match(operations, constants, device, layers)]
    backwards = [m.layer for m in match(operations[::-1], constants, device, layers)]
    assert sorted(forwards) == list(range(6))
    assert backwards == forwards[::-1]


def test_a_layer_that_is_missing(originals: dict[str, Path]) -> None:
    with pytest.raises(NotVerifiedError, match="is in no weight stream"):
        verify_compiled(originals["tied"], originals["mobile"])


def test_a_file_that_vela_left_alone_is_compared_as_it_stands(originals: dict[str, Path]) -> None:
    found = verify_compiled(originals["mobile"], originals["mobile"])
    assert {row.format for row in found} == {"cpu"}
    assert found.accelerator == ""
    assert "nothing on the accelerator" in str(found)


def test_files_that_are_none(originals: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.tflite"
    bad.write_bytes(b"nothing here")
    for pair in ((bad, originals["lstm"]), (originals["lstm"], bad), (bad, bad)):
        with pytest.raises(ValueError, match=r"bad.tflite: not a TFLite file"):
            verify_compiled(*pair)
    with pytest.raises(ValueError, match=r"bad.tflite: not a TFLite file"):
        inspect_compiled(bad)


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


COP1, U55, U85 = 0x31504F43, 7, 7 | 2 << 28


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"COP1\0", "the command stream is damaged: it is cut off"),
        (b"", "it does not begin with 'COP1'"),
        (words(0), "it does not begin with 'COP1'"),
        (words(COP1, 5, 5), "it has no commands"),
        (words(COP1, 1, U55, 0, 2 | 9 << 16, 0), "it has no commands"),
        (words(COP1, 1, U55, 0, 2 | 1 << 16, 1 << 14), "its last command is cut off"),
        (words(COP1, 1, U85, 0, 2 | 2 << 16, 0x124 | 7 << 24, 2), "an unknown micro-block"),
    ],
)
def test_damaged_command_streams(payload: bytes, message: str) -> None:
    with pytest.raises(CompiledFileError, match=message):
        read_payload(payload)


def test_weights_from_nowhere() -> None:
    far = 2 | 5 << 16, 0x128 | 3 << 16, 0x20 | 1 << 14, 0, 0x21 | 1 << 14, 16
    with pytest.raises(NotVerifiedError, match=r"weights in memory region 3 come from no copy"):
        read_payload(words(COP1, 1, U55, 0, far[0] + (1 << 16), *far[1:], 2))


def test_operations_that_cannot_be(compiled: dict[tuple[str, str], Path]) -> None:
    payload, constants = program(compiled["lstm", "ethos-u65-512"])
    device, operations = read_payload(payload)
    first = operations[0]
    with pytest.raises(CompiledFileError, match="it reads behind the constants' end"):
        cut(constants, dataclasses.replace(first.weights[0], start=len(constants)))
    huge = dataclasses.replace(first.layout, shape=(1 << 16, 1, 1, 1 << 16))
    with pytest.raises(CompiledFileError, match="an operation of too many weights"):
        decode(dataclasses.replace(first, layout=huge), constants, device)
    with pytest.raises(CompiledFileError, match="has 1 weight streams instead of 2"):
        decode(dataclasses.replace(first, weights=first.weights[:1]), constants, device)
    wide = dataclasses.replace(first.layout, shape=(*first.layout.shape[:3], 64))
    with pytest.raises(CompiledFileError, match=r"a weight stream holds .* values instead of"):
        decode(dataclasses.replace(first, layout=wide), constants, device)


def damage(path: Path) -> None:
    """Flip a bit in the first weight stream."""
    content = bytearray(path.read_bytes())
    payload, constants = program(path)
    _, operations = read_payload(payload)
    at = content.index(constants) + operations[0].weights[0].start + 12
    content[at] ^= 4
    path.write_bytes(content)


def test_vela_verifies_and_says_so(originals: dict[str, Path], tmp_path: Path) -> None:
    report = vela(originals["mobile"], output_dir=tmp_path)
    assert isinstance(report.verified, CompiledInspection)
    assert report.verified == verify_compiled(report.path, originals["mobile"])
    assert sum(row.bytes for row in report.verified) <= report.encoded_weight_bytes
    assert f"verified: {report.verified.weights:,} weights as in " in str(report)
    assert json.loads(json.dumps(report.to_dict()))["verified"]["accelerator"] == "ethos-u55-128"


def test_vela_refuses_to_hand_over_a_wrong_file(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchclust.export import vela as module

    run = module.__globals__["_run"]

    def damaging(path: Path, options: dict[str, str]) -> str:
        log: str = run(path, options)
        damage(Path(options["output-dir"]) / f"{path.stem}_vela.tflite")
        return log

    monkeypatch.setitem(module.__globals__, "_run", damaging)
    with pytest.raises(CompiledFileError, match=r"lstm_vela.tflite: "):
        vela(originals["lstm"], output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_vela_says_in_one_line_what_it_could_not_verify(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(compiled: Path, original: Path) -> CompiledInspection:
        raise NotVerifiedError(f"{compiled}: something new")

    monkeypatch.setitem(vela.__globals__, "verify_compiled", unknown)
    report = vela(originals["lstm"], output_dir=tmp_path)
    assert (report.verified, report.not_verified) == (None, "something new")
    assert str(report).endswith("\n  not verified: something new")
    assert report.to_dict()["verified"] is None


def test_report_of_a_compiled_file(
    originals: dict[str, Path],
    compiled: dict[tuple[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "lstm_vela.tflite"
    path.write_bytes(compiled["lstm", "ethos-u85-256"].read_bytes())
    assert main(["report", str(path)]) == 0
    assert "compared with no original" in capsys.readouterr().out
    (tmp_path / "lstm.tflite").write_bytes(originals["lstm"].read_bytes())
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{verify_compiled(path, tmp_path / 'lstm.tflite')}\n"
    assert main(["report", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == len(
        inspect_tflite(tmp_path / "lstm.tflite")
    )
    damage(path)
    assert main(["report", str(path)]) == 2
    assert "cannot report on" in capsys.readouterr().err
