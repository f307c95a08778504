"""What each command does, from its arguments to its files and its JSON, in one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import fake_data

from torchclust import cluster_, save_packed, strip_
from torchclust.cli.parser import main
from torchclust.export import inspect_tflite
from torchclust.recipes import prepare as preparing
from torchclust.recipes.prepare import build_model

RECIPE = """
name: tiny
data: {name: mnist5k, batch_size: 8}
model: arm_mlp
train: {epochs: 0}
cluster: {n_clusters: 8}
export: {calibration_samples: 5}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)


def network() -> torch.nn.Module:
    section = preparing.ModelSection(name="arm_mlp")
    return build_model(section, fake_data(preparing.DataSection(name="mnist5k")), 0)


def as_json(words: str, capsys) -> dict:
    assert main([*words.split(), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)


@pytest.mark.slow
def test_from_a_checkpoint_to_the_compiled_file(capsys) -> None:
    model = network()
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    torch.save(cluster_(model, 4, codebook_dtype="int8").state_dict(), "clustered.pt")
    assert main(["export", "r.yaml", "clustered.pt", "int8.tflite"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("export int8.tflite ...\n")
    assert str(inspect_tflite("int8.tflite")) in shown
    assert [row.codes for row in inspect_tflite("int8.tflite")] == [3] * len(names)

    found = as_json("report int8.tflite", capsys)
    assert found["bytes"] == Path("int8.tflite").stat().st_size
    assert [row["codes"] for row in found["tensors"]] == [3] * len(names)
    assert (found["inputs"][0]["dtype"], found["outputs"][0]["dtype"]) == ("int8", "int8")

    exported = as_json("export r.yaml clustered.pt float.tflite --float", capsys)
    assert exported["inputs"][0]["dtype"] == "float32"
    assert exported["bytes"] > 3 * found["bytes"]

    assert main(["vela", "int8.tflite", "--output", "compiled"]) == 0
    assert "ethos-u55-128" in capsys.readouterr().out
    compiled = as_json("vela int8.tflite --accelerator ethos-u55-256 -o compiled", capsys)
    assert (compiled["accelerator"], compiled["cpu_ops"]) == ("ethos-u55-256", 0)
    assert Path(compiled["path"]).parent == Path("compiled")
    assert Path(compiled["path"]).is_file()
    Path("int8.tflite").rename("kept")
    alone = as_json("report compiled/int8_vela.tflite", capsys)
    Path("kept").rename("int8.tflite")  # as a run leaves it, one folder above
    beside = as_json("report compiled/int8_vela.tflite", capsys)
    assert (alone["original"], beside["original"]) == (None, str(Path("int8.tflite").absolute()))
    assert main(["vela", "compiled/int8_vela.tflite"]) == 2
    assert "was compiled by Vela before: give the file that Vela read" in capsys.readouterr().err
    assert main(["vela", "float.tflite"]) == 2
    assert "float.tflite is a float file, and an Ethos-U" in capsys.readouterr().err
    assert main(["vela", "int8.tflite", "-q"]) == 0
    assert capsys.readouterr().out == ""
    check_kit(capsys)


def check_kit(capsys) -> None:
    """`torchclust kit` on int8.tflite: its files, its JSON, and a folder that is not empty."""
    np.save("images.npy", np.zeros((3, 28, 28, 1), np.float32))
    labels = "a, b," + ",".join("cdefghij")
    status = main(["kit", "int8.tflite", "board", "--labels", labels, "--inputs", "images.npy"])
    assert status == 0, capsys.readouterr().err
    assert "operators: " in capsys.readouterr().out
    assert 'kLabels[] = {"a", "b"' in Path("board/model.h").read_text()
    assert main(["kit", "int8.tflite", "board"]) == 2
    assert "board is not empty: overwrite=True (--overwrite)" in capsys.readouterr().err
    written = as_json("kit int8.tflite board --overwrite --accelerator ethos-u55-128", capsys)
    assert written["compiled"]["accelerator"] == "ethos-u55-128"
    assert written["flash_bytes"] == Path("board/model.tflite").stat().st_size
    Path("file").write_text("")
    assert main(["kit", "int8.tflite", "file/board"]) == 1
    assert "Not a directory: 'file/board'" in capsys.readouterr().err


@pytest.mark.parametrize("stripped", [False, True])
def test_report_of_a_packed_model(capsys, stripped: bool) -> None:
    model = cluster_(network(), 8)
    size = save_packed(strip_(model) if stripped else model, "model.packed")
    assert main(["report", "model.packed"]) == 0
    assert capsys.readouterr().out == f"model.packed\n{size}\n"
    expected = json.loads(json.dumps(size.to_dict()))
    assert as_json("report model.packed", capsys) == {"file": "model.packed", **expected}


def test_report_of_a_damaged_packed_model_is_one_line(capsys) -> None:
    save_packed(network(), "model.packed")
    content = Path("model.packed").read_bytes()
    Path("model.packed").write_bytes(content[:-7])
    assert main(["report", "model.packed"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchclust: cannot report on model.packed: ")
    assert error.endswith("Copy it anew, or write it again: save_packed(model, path)\n")


def test_a_sweep_is_resumed_or_replaced_as_asked(capsys) -> None:
    words = ["sweep", "r.yaml", "--set", "cluster.n_clusters=4,8", "--set", "export=null", "-q"]
    assert main(words) == 0
    output = Path("runs/tiny_sweep")
    first = (output / "sweep.json").read_text()
    assert [row["label"] for row in json.loads(first)] == ["n_clusters=4", "n_clusters=8"]
    stages = sorted((output / "stages").iterdir())
    (output / "n_clusters=4" / "mine.txt").write_text("")
    (output / "n_clusters=4" / "int8.tflite").write_text("an earlier run's")

    assert main(words) == 2
    assert "runs/tiny_sweep is not empty: add --resume" in capsys.readouterr().err
    written = {file: file.stat().st_mtime_ns for file in stages}
    assert main([*words, "--resume"]) == 0
    assert {file: file.stat().st_mtime_ns for file in stages} == written
    assert main([*words, "--overwrite"]) == 0
    assert all(file.stat().st_mtime_ns > before for file, before in written.items())
    assert (output / "sweep.json").read_text() == first
    assert (output / "n_clusters=4" / "mine.txt").exists()
    assert not (output / "n_clusters=4" / "int8.tflite").exists()
    assert capsys.readouterr().out == ""
