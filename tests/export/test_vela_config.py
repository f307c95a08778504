"""Vendors' configuration files: listed, chosen from, and passed on where Vela finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.cli.parser import main
from torchclust.export import to_tflite, vela
from torchclust.export.accelerators import Configuration
from torchclust.export.vela_config import read_vela_configs

SYSTEM = """
core_clock={clock}
axi0_port=Sram
axi1_port=OffChipFlash
Sram_clock_scale=1.0
Sram_burst_length=32
Sram_read_latency=16
Sram_write_latency=16
OffChipFlash_clock_scale=0.015625
OffChipFlash_burst_length=32
OffChipFlash_read_latency=64
OffChipFlash_write_latency=64
"""
MEMORY = "const_mem_area=Axi1\narena_mem_area=Axi0\ncache_mem_area=Axi0\n"

# As vendors lay them out: one of each (Himax), a system per core (Alif), a mode that inherits.
LAYOUTS = {
    "one": f"; file: my_vela_cfg.ini ;---\n[System_Config.My_Sys_Cfg]{SYSTEM.format(clock='400e6')}"
    f"[Memory_Mode.My_Mem_Mode_Parent]\n{MEMORY}",
    "cores": f"[System_Config.Fast_Core]{SYSTEM.format(clock='400e6')}"
    f"[System_Config.Lean_Core]{SYSTEM.format(clock='160e6')}"
    f"[Memory_Mode.Shared_Sram]\n{MEMORY}",
    "inherited": f"[System_Config.Board]{SYSTEM.format(clock='200e6')}"
    f"[Memory_Mode.Parent]\n{MEMORY}[Memory_Mode.Shared_Sram]\ninherit=Memory_Mode.Parent\n"
    "cache_mem_area=Axi0\n",
}


def configuration(
    config: Path | str | None, system: str | None, memory: str | None
) -> tuple[str, str, str]:
    found = Configuration.of("ethos-u55-128", system, memory, config)
    return found.config, found.system_config, found.memory_mode


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, text in LAYOUTS.items():
        found[name] = tmp_path / f"{name}.ini"
        found[name].write_text(text)
    return found


def test_what_a_file_has_is_listed(layouts: dict[str, Path], capsys) -> None:
    found = read_vela_configs(layouts["cores"])
    assert found.system_configs == ("Fast_Core", "Lean_Core")
    assert found.memory_modes == ("Shared_Sram",)
    assert main(["vela", "--list-configs", str(layouts["cores"])]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert main(["vela", "--list-configs", str(layouts["cores"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_modes"] == ["Shared_Sram"]
    assert str(found).count("\n") == 5
    assert main(["vela", "--list-configs", "--json"]) == 0
    assert "Sram_Only" in json.loads(capsys.readouterr().out)["memory_modes"]


def test_what_is_not_named_is_the_default_or_the_only_one(layouts: dict[str, Path]) -> None:
    assert configuration(None, None, None) == (
        "Arm/vela.ini",
        "Ethos_U55_High_End_Embedded",
        "Shared_Sram",
    )
    deep = "Ethos_U55_Deep_Embedded"
    assert configuration("Arm/vela.ini", deep, None) == ("Arm/vela.ini", deep, "Shared_Sram")
    assert configuration(layouts["one"], None, None)[1:] == (
        "My_Sys_Cfg",
        "My_Mem_Mode_Parent",
    )
    assert configuration(layouts["inherited"], None, None)[1:] == ("Board", "Shared_Sram")
    assert configuration(layouts["cores"], "Lean_Core", None)[1:] == (
        "Lean_Core",
        "Shared_Sram",
    )
    with pytest.raises(
        ValueError, match=r"several to choose from: system_config must be one of 'F"
    ):
        configuration(layouts["cores"], None, None)
    with pytest.raises(ValueError, match=r"has no 'Off': memory_mode must be one of 'My_Mem"):
        configuration(layouts["one"], None, "Off")
    with pytest.raises(ValueError, match=r"has no 'lean_core'.*'; did you mean 'Lean_Core'\?"):
        configuration(layouts["cores"], "lean_core", None)


@pytest.mark.parametrize(("system", "memory"), [("Ethos_U55_Deep", None), (None, "Sram_only")])
def test_names_are_those_of_velas_own_file(system: str | None, memory: str | None) -> None:
    with pytest.raises(ValueError, match=r"^Arm/vela\.ini has no '.*'; did you mean '\w+'\?$"):
        configuration(None, system, memory)


def test_without_vela_nothing_is_known_of_its_file(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert configuration(None, "A", None) == ("Arm/vela.ini", "A", "Shared_Sram")
    assert main(["vela", "--list-configs"]) == 2
    assert "Vela, which has a file of its own, is not installed: pip" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[System_Config.A]\n", "no section", "[A]\nb=1\n[A]\nb=2\n"])
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.ini"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"bad.ini is no file of Vela configurations: ") as raised:
        read_vela_configs(file)
    assert "needs at least one section" in str(raised.value) or "[" in text or text == "no section"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad.ini is no file of Vela"):
        read_vela_configs(file)
    with pytest.raises(OSError, match=r"none.ini"):
        read_vela_configs(tmp_path / "none.ini")


def test_vela_compiles_with_each_layout(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a relative FOLDER/FILE, which Vela itself looks for among its own files."""
    torch.manual_seed(0)
    model = cluster_(nn.Conv2d(8, 16, 3).eval(), 8, codebook_dtype="int8")
    images = torch.randn(4, 8, 8, 8)
    to_tflite(model, images, tmp_path / "m.tflite", calibration=[images])
    monkeypatch.chdir(tmp_path.parent)
    seconds = {}
    for name, system in (("one", None), ("cores", "Lean_Core"), ("inherited", None)):
        file = Path(tmp_path.name) / f"{name}.ini"
        report = vela(tmp_path / "m.tflite", config=file, system_config=system)
        assert report.system_config == configuration(file, system, None)[1]
        seconds[name] = report.inference_seconds / report.cycles
    assert seconds["one"] == pytest.approx(1 / 400e6)
    assert seconds["cores"] == pytest.approx(1 / 160e6)
    assert seconds["inherited"] == pytest.approx(1 / 200e6)
