"""A board kit: C++ that compiles, an arena that is enough, operators that suffice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import (
    BoardKit,
    ExportError,
    backends,
    board_kit,
    inspect_tflite,
    tflm,
    to_tflite,
)
from torchclust.export.container import pack, unpack
from torchclust.export.cpp import Board, files
from torchclust.export.inspect import Port
from torchclust.export.kit import FILES
from torchclust.export.micro_interpreter import Micro, as_inputs, least_arena
from torchclust.export.resolver import registrations
from torchclust.zoo.data import mnist5k
from torchclust.zoo.networks import seed_cnn

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]

# What main.cc and operators.h use of tflite-micro, so that they compile without it.
DECLARATIONS = {
    "tensorflow/lite/micro/micro_mutable_op_resolver.h": """
        #pragma once
        enum TfLiteStatus { kTfLiteOk, kTfLiteError };
        #define TF_LITE_ENSURE_STATUS(a) do { if ((a) != kTfLiteOk) return kTfLiteError; } while (0)
        namespace tflite { template <unsigned n> struct MicroMutableOpResolver {
        ADDS }; }
    """,
    "tensorflow/lite/micro/micro_interpreter.h": """
        #pragma once
        #include <cstddef>
        #include <cstdint>
        namespace tflite { struct Model {}; struct MicroInterpreter {
          template <class R>
          MicroInterpreter(const Model*, const R&, std::uint8_t*, std::size_t) {}
          TfLiteStatus AllocateTensors() { return kTfLiteOk; }
          TfLiteStatus Invoke() { return kTfLiteOk; }
          template <class T> T* typed_input_tensor(int) { static T x[1 << 16]; return x; }
          template <class T> T* typed_output_tensor(int) { static T x[1 << 16]; return x; }
          std::size_t arena_used_bytes() const { return 1; } }; }
    """,
    "tensorflow/lite/schema/schema_generated.h": """
        #pragma once
        namespace tflite { inline const Model* GetModel(const void*) { return nullptr; } }
    """,
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, images: torch.Tensor) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(32, 4), nn.Softmax(1)),
    ).eval()
    cluster_(network, 4, codebook_dtype="int8")
    path = tmp_path_factory.mktemp("kit") / "net.tflite"
    to_tflite(network, images[:1], path, calibration=[images])
    return path


@pytest.fixture(scope="module")
def kit(model: Path, images: torch.Tensor) -> BoardKit:
    labels = ["cat", 'a "dog"', "Käse", "back\\slash"]
    return board_kit(model, model.with_name("board"), inputs=images, labels=labels)


class Case(NamedTuple):
    """A file, its kit, and the samples that its test vectors are made of."""

    path: Path
    kit: BoardKit
    images: torch.Tensor


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The demo's file, recipes/mnist_cnn.yaml's, but for its training; or KIT_FILE, if given."""
    torch.manual_seed(0)
    digits, _ = mnist5k().test[range(0, 1000, 100)]  # one of each
    path = tmp_path_factory.mktemp("demo") / "int8.tflite"
    if "KIT_FILE" in os.environ:
        return Path(shutil.copy(os.environ["KIT_FILE"], path)), digits
    network = cluster_(seed_cnn().eval(), 8, codebook_dtype="int8")
    to_tflite(network, digits[:1], path, calibration=[digits])
    return path, digits


@pytest.fixture(scope="module", params=["small", "demo", "demo as tables"])
def case(request: pytest.FixtureRequest, images: torch.Tensor) -> Case:
    """A small network, the demo, and the demo as lookup tables, its large layer in parts."""
    if request.param == "small":
        path = request.getfixturevalue("model")
        return Case(path, request.getfixturevalue("kit"), images)
    path, digits = request.getfixturevalue("demo")
    if request.param == "demo as tables":
        path = tflm(path, path.with_name("tables.tflite"), inputs=digits, max_arena=65536).path
    return Case(path, board_kit(path, path.with_suffix(""), inputs=digits), digits)


def constant(kit: BoardKit, name: str) -> int:
    found = re.search(rf"{name} = (\d+);", (kit.folder / "model.h").read_text())
    assert found is not None
    return int(found[1])


def built(kit: BoardKit, folder: Path, source: str, *options: str) -> str:
    """Compile the kit's sources together with this one, strictly, and run that."""
    assert COMPILER is not None
    adds = re.findall(r"to\.(Add\w+)", (kit.folder / "operators.h").read_text())
    for name, text in DECLARATIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            text.replace(
                "ADDS", " ".join(f"TfLiteStatus {a}() {{ return kTfLiteOk; }}" for a in adds)
            )
        )
    (folder / "check.cc").write_text(source)
    sources = [folder / "check.cc" if source else kit.folder / "main.cc", kit.folder / "model.cc"]
    command = [COMPILER, *STRICT, *options, f"-I{folder}", f"-I{kit.folder}"]
    command += [*map(str, sources), "-o", str(folder / "program")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([folder / "program"], capture_output=True, text=True, check=False)
    return done.stdout


def test_every_file_is_there_and_no_other(kit: BoardKit) -> None:
    assert {file.name for file in kit.folder.iterdir()} == set(FILES)
    assert all(file.stat().st_size for file in kit.folder.iterdir())
    assert str(kit).count("\n") == 2


@needs_compiler
def test_the_array_is_the_file_aligned(kit: BoardKit, model: Path, tmp_path: Path) -> None:
    said = built(kit, tmp_path, """
        #include <cstdio>
        #include "model.h"
        int main() {
          std::printf("%d ", static_cast<int>(reinterpret_cast<std::uintptr_t>(model::kData) % 16));
          for (unsigned char byte : model::kData) std::printf("%02x", byte);
          for (const char* label : model::kLabels) std::printf(" <%s>", label);
          std::printf(" %.9g %d", double{model::kInput0.scale}, model::kInput0.shape[1]);
        }
    """)  # fmt: skip
    aligned, content, rest = said.split(" ", 2)
    assert aligned == "0"
    assert (
        bytes.fromhex(content) == model.read_bytes() == (kit.folder / "model.tflite").read_bytes()
    )
    (port,) = inspect_tflite(model).inputs
    assert rest.rsplit(" ", 2)[0] == '<cat> <a "dog"> <Käse> <back\\slash>'
    assert np.float32(rest.rsplit(" ", 2)[1]) == np.float32(port.scale)
    assert rest.rsplit(" ", 2)[2] == "12"


@needs_compiler
@pytest.mark.parametrize("options", [(), ("-DSELF_TEST",)])
def test_main_compiles_without_a_warning(
    case: Case, options: tuple[str, ...], tmp_path: Path
) -> None:
    section = '-DMODEL_SECTION=__attribute__((section(".model")))'
    said = built(case.kit, tmp_path, "", section, *options)
    used = f"arena: 1 of {case.kit.arena_bytes} bytes\n"
    assert said.endswith("values differ\n" if options else used)


def test_the_arena_is_enough_and_within_five_percent(case: Case) -> None:
    """The least arena prepares and runs the model; 16 bytes less do not even prepare it."""
    content, ports = case.path.read_bytes(), inspect_tflite(case.path).inputs
    least = least_arena(content)
    assert case.kit.arena_bytes == constant(case.kit, "kArenaSize")
    assert least <= case.kit.arena_bytes <= 1.05 * least
    ample, tight = Micro(content), Micro(content, least)
    for sample in as_inputs(case.images, ports):
        np.testing.assert_array_equal(tight(sample)[0], ample(sample)[0])
    with pytest.raises(ExportError, match="tflite-micro cannot run this file"):
        Micro(content, least - 16)


def test_the_operators_suffice_and_none_can_go(case: Case) -> None:
    """Without an entry the interpreter does not find its operator, as if it had another code."""
    registered = set(re.findall(r"to\.(Add\w+)", (case.kit.folder / "operators.h").read_text()))
    content = case.path.read_bytes()
    assert registered == set(registrations(inspect_tflite(case.path).operators).values())
    builtins = vars(backends.schema().BuiltinOperator)
    assert len(registered) == len(case.kit.operators) >= 4
    for missing in case.kit.operators:
        changed = unpack(content)
        for code in changed.operatorCodes:  # of different versions of one operator
            if builtins.get(missing) == code.builtinCode or code.customCode == missing.encode():
                code.builtinCode = code.deprecatedBuiltinCode = builtins["CUSTOM"]
                code.customCode = b"not registered"
        with pytest.raises(ExportError, match="Failed to get registration from op code CUSTOM"):
            Micro(pack(changed, len(content)))


def test_the_vectors_hold_in_tflite_micro(case: Case) -> None:
    text = (case.kit.folder / "test_vectors.h").read_text()
    values = {}
    for side in ("Input", "Output"):
        body = text.split(f"kTest{side}0[kVectors]")[1].split("};")[0]
        numbers = re.findall(r"-?\d+", body.split("= {", 1)[1])
        values[side] = np.array(numbers, np.int8).reshape(10, -1)
    run, ports = Micro(case.path.read_bytes()), inspect_tflite(case.path).inputs
    given = [sample[0] for sample in as_inputs(case.images[:10], ports)]
    np.testing.assert_array_equal(values["Input"], np.stack(given).reshape(10, -1))
    for source, expected in zip(values["Input"], values["Output"], strict=True):
        np.testing.assert_array_equal(run([source.reshape(ports[0].shape)])[0][0], expected)
    assert len({row.tobytes() for row in values["Output"]}) > 1


def test_a_file_with_lookup_tables_registers_decode(model: Path, tmp_path: Path) -> None:
    report = tflm(model, tmp_path / "tables.tflite")
    kit = board_kit(report.path, tmp_path / "board")
    assert "AddDecode()" in (kit.folder / "operators.h").read_text()
    assert kit.flash_bytes == report.flash_after
    tables = sum(row.left is None for row in report.rows)
    card = (kit.folder / "MODEL_CARD.md").read_text()
    assert f"{tables} more are lookup tables" in card
    assert report.arena_after <= kit.arena_bytes <= 1.05 * report.arena_after


@needs_compiler
def test_for_an_ethos_u_the_compiled_file(model: Path, tmp_path: Path) -> None:
    kit = board_kit(model, tmp_path / "board", accelerator="ethos-u55-128")
    assert kit.operators == ("ethos-u",)
    assert "AddEthosU()" in (kit.folder / "operators.h").read_text()
    assert kit.compiled is not None
    assert kit.arena_bytes >= kit.compiled.sram_bytes
    assert inspect_tflite(kit.folder / "model.tflite").operators == {"ethos-u": 1}
    assert "cycles" in (kit.folder / "MODEL_CARD.md").read_text()
    assert "ethos-u55-128" in str(kit)
    assert built(kit, tmp_path, "").endswith(" bytes\n")
    with pytest.raises(ExportError, match="was compiled by Vela"):
        board_kit(kit.folder / "model.tflite", tmp_path / "again")


@needs_compiler
def test_several_inputs_and_outputs_of_other_types(tmp_path: Path) -> None:
    ports = (Port("image", (1, 2), "int8", 0.5, -3), Port("tokens", (1, 3), "int32", 0.0, 0))
    values = [np.array([[1, -2]], np.int8), np.array([[3, 4, 70000]], np.int32)]
    made = Board("x.tflite", b"abc", ports, ports[::-1], {"ADD": "AddAdd"}, 64, "A note.", (),
                 ((values, values[::-1]),))  # fmt: skip
    for name, text in files(made).items():
        (tmp_path / name).write_text(text)
    kit = BoardKit(tmp_path, 3, 64, ("ADD",), None)
    (tmp_path / "build").mkdir()
    for options in ((), ("-DSELF_TEST",)):
        assert built(kit, tmp_path / "build", "", *options)


def test_the_card_has_what_is_known_and_no_more(kit: BoardKit) -> None:
    card = (kit.folder / "MODEL_CARD.md").read_text()
    assert "test data" not in card
    assert "tflite-micro" in card
    assert "1 x 12 x 12 x 3" in card


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("int8.tflite", "| int8, clustered: this file | 0 |"),
        ("tflm.tflite", "| int8, clustered: this file | 0 |"),
        ("baseline_int8.tflite", "| int8, not clustered, trained as long: this file | 0.9125 |"),
        ("another.tflite", "| int8, clustered | 0 |"),
    ],
)
def test_the_card_of_a_run_has_its_metric(name: str, row: str, model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / name)
    report = {
        "name": "digits", "seed": 3, "versions": {"torch": "2.13.0"},
        "metric": {"name": "AUC", "mode": "max", "unit": ""},
        "accuracy": {"float": 0.91255, "clustered": None, "int8": 0.0, "baseline_int8": 0.9125},
        "recipe": {"data": {"name": "mnist5k"}},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    card = (board_kit(tmp_path / name, tmp_path / "board").folder / "MODEL_CARD.md").read_text()
    for text in ("# digits", "mnist5k", "| model | AUC |", "0.91255", "seed 3", "torch 2.13.0"):
        assert text in card
    assert row in card
    assert card.count("this file") == (name != "another.tflite")
    assert "float, clustered" not in card


def test_folders_and_labels_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"is not empty: overwrite=True \(--overwrite\)"):
        board_kit(model, tmp_path)
    with pytest.raises(ValueError, match="3 labels for 4 classes: give one for each"):
        board_kit(model, tmp_path / "new", labels="abc")
    with pytest.raises(NotADirectoryError, match=r"mine\.txt is a file: name a folder for the kit"):
        board_kit(model, tmp_path / "mine.txt", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    board_kit(model, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


def test_the_compiled_file_does_not_replace_its_own_source(model: Path, tmp_path: Path) -> None:
    """Without an accelerator the kit's file is the very same, and the kit may stand around it."""
    path = Path(shutil.copy(model, tmp_path / "model.tflite"))
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(
            ValueError, match=r"compiled for ethos-u55-128, would replace .* itself"
        ):
            board_kit(path, folder, accelerator="ethos-u55-128", overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.tflite", "link"}
    board_kit(path, tmp_path, overwrite=True)
    assert path.read_bytes() == model.read_bytes()


class Tokens(nn.Module):
    """Takes indices, of which most that an int32 can hold are out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(tokens).mean(1))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(x * mask.float())


@pytest.mark.parametrize(
    ("network", "samples"),
    [
        (Tokens, (torch.arange(40).reshape(8, 5) % 20,)),
        (Masked, (torch.randn(4, 8), torch.arange(32).reshape(4, 8) % 3 > 0)),
    ],
)
def test_few_samples_are_repeated_where_random_ones_would_be_invalid(
    network: type[nn.Module], samples: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    path, count = tmp_path / "net.tflite", len(samples[0])
    to_tflite(network().eval(), tuple(x[:1] for x in samples), path, calibration=[samples])
    kit = board_kit(path, tmp_path / "board", inputs=samples)
    text = (kit.folder / "test_vectors.h").read_text()
    body = text.split(f"kTestInput{len(samples) - 1}[kVectors]")[1].split("};")[0]
    rows = np.array(re.findall(r"-?\d+", body.split("= {", 1)[1]), int).reshape(10, -1)
    wanted = samples[-1].numpy().astype(int)
    np.testing.assert_array_equal(rows, wanted[np.arange(10) % count])
    with pytest.raises(ExportError, match="may be out of range: give some that are valid"):
        board_kit(path, tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "dtype", "scale", "message"),
    [
        (torch.tensor([[0.5, torch.nan]]), "int8", 0.1, "hold 1 NaN for the file's input 'x', and"),
        (torch.tensor([[0.5, torch.nan]]), "int32", 0.0, "hold 1 NaN for the file's input 'x'"),
        (torch.tensor([[0.5, 1.0]]), "int32", 0.0, "float32 values from 0.5 to 1.0, which the"),
        (torch.tensor([[0, 200]], dtype=torch.uint8), "int8", 0.1, "'x', int8, cannot hold: give"),
        (torch.tensor([[0, 2]]), "bool", 0.0, "int64 values from 0 to 2, which the file's input"),
    ],
)
def test_values_that_an_input_cannot_hold(
    given: torch.Tensor, dtype: str, scale: float, message: str
) -> None:
    """A cast would make others of them."""
    with pytest.raises(ValueError, match=re.escape(message)):
        list(as_inputs(given, [Port("x", (1, 2), dtype, scale, 0)]))


def test_float_files_are_refused(images: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "float.tflite"
    to_tflite(nn.Conv2d(3, 4, 3).eval(), images[:1], path, calibration=None, float=True)
    with pytest.raises(ExportError, match="is not an int8 file: it takes float32"):
        board_kit(path, tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_operators_left_to_the_cpu_alone_are_no_npu_program(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchclust.export import kit as module

    class Nothing:
        path = model

    monkeypatch.setattr(module, "vela", lambda *args, **options: Nothing)
    with pytest.raises(ExportError, match="Vela left every operator to the CPU for ethos-u55-32"):
        board_kit(model, tmp_path / "board", accelerator="ethos-u55-32")


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root writes anywhere")
        with pytest.raises(PermissionError):
            board_kit(model, tmp_path / "board")
        with pytest.raises(PermissionError):
            tflm(model, tmp_path / "tables.tflite")
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


def test_names_of_registrations() -> None:
    found = registrations(["CONV_2D", "ADD", "RESIZE_NEAREST_NEIGHBOR", "LOG_SOFTMAX", "RELU6"])
    assert list(found.values()) == [
        "AddConv2D", "AddAdd", "AddResizeNearestNeighbor", "AddLogSoftmax", "AddRelu6"
    ]  # fmt: skip
    with pytest.raises(ExportError, match="tflite-micro has no operator TOPK_V2, FLEX: leave"):
        registrations(["TOPK_V2", "ADD", "FLEX"])
