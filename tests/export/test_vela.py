"""Compiling with Vela: figures as Vela wrote them, its failures as one error."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import VelaError, VelaReport, inspect_tflite, to_tflite, vela
from torchclust.export.accelerators import ACCELERATORS


def export(path: Path, model: nn.Module, k: int | None) -> Path:
    if k is not None:
        cluster_(model, k, codebook_dtype="int8")
    images = torch.randn(4, 8, 8, 8)
    to_tflite(model, images, path, calibration=[images])
    return path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 10)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    folder = tmp_path_factory.mktemp("vela")
    return {k: export(folder / f"k{k}.tflite", net(), k) for k in (None, 4, 16, 32)}


def test_the_report_is_what_vela_wrote(files: dict[int | None, Path], tmp_path: Path) -> None:
    report = vela(files[16], output_dir=tmp_path / "new" / "folder")
    (summary,) = (tmp_path / "new" / "folder").glob("*_summary_*.csv")
    (row,) = csv.DictReader(summary.read_text().splitlines())
    assert report.path == tmp_path / "new" / "folder" / "k16_vela.tflite"
    assert report.path.stat().st_size > 0
    assert report.encoded_weight_bytes == int(row["total_npu_encoded_weights"])
    assert report.original_weight_bytes == int(row["total_original_weights"])
    assert report.flash_bytes == float(row["off_chip_flash_memory_used"]) * 1024 > 0
    assert report.sram_bytes == float(row["sram_memory_used"]) * 1024 > 0
    assert report.dram_bytes == 0
    assert report.cycles == float(row["cycles_total"])
    assert report.inference_seconds == pytest.approx(report.cycles / float(row["core_clock"]))
    assert report.macs == int(row["nn_macs"]) == 36 * 32 * 72 + 16 * 32 * 288 + 512 * 10
    assert (report.cpu_ops, report.cpu_operators) == (0, ())
    assert report.npu_ops > 0
    assert report.vela_version == metadata.version("ethos-u-vela")
    assert (report.accelerator, report.system_config, report.memory_mode) == (
        "ethos-u55-128",
        "Ethos_U55_High_End_Embedded",
        "Shared_Sram",
    )
    assert sum(layer.macs for layer in report.layers) == pytest.approx(report.macs, rel=0.1)
    assert {layer.target for layer in report.layers} == {"NPU"}


@pytest.mark.parametrize("name", ["net[v2]", "n*t?", "-net", "net.v2_vela", "netz ü"])
def test_any_name_of_a_file_will_do(
    name: str, files: dict[int | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.tflite").write_bytes(files[4].read_bytes())
    report = vela(f"{name}.tflite", output_dir="out")
    assert report.path == Path("out") / f"{name}_vela.tflite"
    assert report.path.is_file()
    assert report.verified is not None


def test_weights_are_encoded_near_their_entropy(files: dict[int | None, Path]) -> None:
    sizes = []
    for path in files.values():
        inspected = inspect_tflite(path)
        entropy = sum(row.entropy_bits * np.prod(row.shape) / 8 for row in inspected)
        sizes.append(vela(path).encoded_weight_bytes)
        channels = sum(row.scales for row in inspected)
        assert entropy < sizes[-1] < 1.2 * entropy + 10 * channels + 600
    assert sizes == [sizes[0], *sorted(sizes[1:])]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_accelerator_compiles_with_its_defaults(
    accelerator: str, files: dict[int | None, Path], tmp_path: Path
) -> None:
    report = vela(files[16], accelerator=accelerator, output_dir=tmp_path)
    assert report.accelerator == accelerator
    assert report.cpu_ops == 0
    assert report.cycles > 0
    # Weights are in flash on U55 and in DRAM with the defaults of the larger ones.
    assert (report.flash_bytes > 0, report.dram_bytes > 0) == (
        (True, False) if "u55" in accelerator else (False, True)
    )
    assert accelerator in str(report)
    assert report.system_config in str(report)


def test_configurations_are_passed_on(files: dict[int | None, Path], tmp_path: Path) -> None:
    report = vela(
        files[16],
        accelerator="ethos-u85-256",
        system_config="Ethos_U85_SYS_Flash_High",
        memory_mode="Shared_Sram",
        output_dir=tmp_path,
    )
    assert (report.system_config, report.memory_mode) == ("Ethos_U85_SYS_Flash_High", "Shared_Sram")
    assert report.flash_bytes > 0
    assert report.dram_bytes == 0
    own = tmp_path / "own.ini"
    import ethosu

    (shipped,) = (Path(p) for p in ethosu.__path__)
    own.write_text(
        (shipped / "config_files" / "Arm" / "vela.ini")
        .read_text()
        .replace("Ethos_U55_High_End_Embedded", "Mine")
    )
    report = vela(files[16], system_config="Mine", config=own, output_dir=tmp_path)
    assert report.system_config == "Mine"


def test_u85_warns_about_seventeen_to_thirty_two_codes(
    files: dict[int | None, Path], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"has 31 codes: .* steps at 4 and 16 codes") as caught:
        vela(files[32], accelerator="ethos-u85-128", output_dir=tmp_path)
    assert caught[0].filename == __file__
    for k, accelerator in ((16, "ethos-u85-128"), (None, "ethos-u85-128"), (32, "ethos-u55-32")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vela(files[k], accelerator=accelerator, output_dir=tmp_path)


@pytest.mark.parametrize("accelerator", ["u55", "ethos-u55", "ethos-u55-512", "ethos-u65-128", ""])
def test_an_unknown_accelerator_lists_the_valid_ones(
    accelerator: str, files: dict[int | None, Path]
) -> None:
    match = rf"accelerator must be one of ethos-u55-32, .*2048, got {re.escape(repr(accelerator))}"
    with pytest.raises(ValueError, match=match):
        vela(files[16], accelerator=accelerator)


def test_velas_failure_is_one_error_with_its_last_line(
    files: dict[int | None, Path], tmp_path: Path
) -> None:
    """Of a vendor's file whose names are right, and which says nothing else."""
    (tmp_path / "bare.ini").write_text("[System_Config.A]\ncore_clock=4e8\n[Memory_Mode.B]\n")
    match = r"(?s)Vela cannot compile .*\(A, B\); it exited with 1.*memory not configured$"
    with pytest.raises(VelaError, match=match) as e:
        vela(files[16], output_dir=tmp_path / "out", config=tmp_path / "bare.ini")
    assert "Traceback" not in str(e.value)
    assert len(str(e.value).splitlines()) <= 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["system_config", "memory_mode"])
def test_a_name_that_velas_file_lacks_is_refused_before_it_runs(
    name: str, files: dict[int | None, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"vela.ini has no 'Nope': {name} must be one of 'Ethos|Sh"
    ):
        vela(files[16], output_dir=tmp_path, **{name: "Nope"})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_file_that_is_not_there(files: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.ini"):
        vela(files[16], output_dir=tmp_path, config="nope.ini")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing.tflite"):
        vela(tmp_path / "missing.tflite")
    (tmp_path / "bad.tflite").write_bytes(b"not a flatbuffer")
    with pytest.raises(ValueError, match=r"bad.tflite: not a TFLite file"):
        vela(tmp_path / "bad.tflite")


def test_a_missing_vela_names_the_extra(
    files: dict[int | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Vela, .*pip install .torchclust\[export\]"):
        vela(files[16])


def test_output_that_cannot_be_understood_is_an_error(
    files: dict[int | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 0, stdout="something else\n")

    monkeypatch.setattr(subprocess, "run", silent)
    with pytest.raises(VelaError, match=r"exited with 0 and said:\n  something else"):
        vela(files[16])


def test_reports_are_values(files: dict[int | None, Path], tmp_path: Path) -> None:
    report: VelaReport = vela(files[4], output_dir=tmp_path)
    assert report == vela(files[4], output_dir=tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.cycles = 0  # type: ignore[misc]


def test_a_float_file_is_refused(tmp_path: Path) -> None:
    images = torch.randn(1, 8, 8, 8)
    path = tmp_path / "float.tflite"
    to_tflite(net(), images, path, calibration=None, float=True)
    with pytest.raises(ValueError, match=r"float\.tflite is a float file, and .*:  to_tflite\(mod"):
        vela(path)
    assert list(tmp_path.iterdir()) == [path]


def test_operators_left_to_the_cpu_are_named_with_velas_reason(tmp_path: Path) -> None:
    upsampled = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Upsample(scale_factor=3, mode="bilinear"))
    report = vela(export(tmp_path / "m.tflite", upsampled, None))
    assert (report.cpu_ops, len(report.cpu_operators)) == (1, 1)
    assert re.search(r"\n  CPU: RESIZE_BILINEAR \(.*scale-factor=3\n", str(report))


def test_a_compiled_file_is_refused(files: dict[int | None, Path], tmp_path: Path) -> None:
    compiled = vela(files[16], output_dir=tmp_path).path
    with pytest.raises(ValueError, match=r"k16_vela\.tflite was compiled by Vela before: give the"):
        vela(compiled)


def test_vela_is_not_imported_into_the_process(files: dict[int | None, Path]) -> None:
    vela(files[16])
    assert not [name for name in sys.modules if name.startswith("ethosu.vela")]
