"""A run that is killed, as by a power cut, in every stage, and goes on to the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes/yours/accelerometer.yaml"
SETTINGS = [
    *("data.train=200", "module.width=16", "train.epochs=1", "finetune.epochs=1"),
    *("prune={sparsity: 0.5}", "cluster.preserve_sparsity=true"),
    "export.calibration_samples=20",
]
# A process for each moment kills itself when it says that line, or when that stage is computed and
# nothing of it is stored yet. They are forks of one that has imported everything and computed
# nothing, since importing takes longer than training. What each says is kept beside its output.
CHILD = """
import os, signal, sys
from pathlib import Path
from torchclust.recipes import kept, load, run

recipe, output, moments, *settings = sys.argv[1:]

def go(moment):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def say(line):
        print(line, flush=True)
        if line == moment:
            die()

    def replace(source, target):
        if Path(target).parent.name == "stages" and Path(target).name.startswith(f"{moment}-"):
            die()
        os.rename(source, target)

    kept.os = type("", (), {"replace": staticmethod(replace)})
    run.run_recipe(load.load_recipe(Path(recipe), settings), Path(output), resume=True, say=say,
                   progress=False)

for stage, moment in (pair.split(":") for pair in moments.split(",")):
    pid = os.fork()
    if pid == 0:
        said = os.open(f"{output}.{stage}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        go(moment)
        sys.stdout.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stored = any(Path(output, "stages").glob(f"{stage}-*.pt"))
    print(stage, code, stored, Path(output, "report.json").exists(), flush=True)
"""
STAGES = ("train", "control", "prune", "cluster", "finetune", "export", "vela")
MOMENTS = {stage: stage for stage in STAGES} | {"export": "  int8.tflite"}  # two files are written
FILES = ("float.tflite", "clustered_float.tflite", "int8.tflite", "baseline_int8.tflite",
         "model.packed", "recipe.yaml", "vela/int8_vela.tflite",
         "vela/baseline_int8_vela.tflite")  # fmt: skip


def run(output: Path, moments: dict[str, str]) -> list[str]:
    """For each moment the stage, the exit code, whether the stage and a report were stored."""
    pairs = ",".join(f"{stage}:{moment}" for stage, moment in moments.items())
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(RECIPE), str(output), pairs]
    done = subprocess.run([*command, *SETTINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def said(output: Path, stage: str) -> str:
    return Path(f"{output}.{stage}").read_text()


def measured(output: Path) -> dict[str, Any]:
    """The report without what a clock says."""
    report = json.loads((output / "report.json").read_text())
    del report["seconds"]
    return report


def states(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted((output / "stages").glob("*.pt"))
    found = {f.name: torch.load(f, weights_only=True).get("state", {}) for f in files}
    assert [name.partition("-")[0] for name in found] == sorted(STAGES)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_in_every_stage_and_resumed_equals_the_straight_run(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(straight, {"all": ""}) == ["all 0 False True"], said(straight, "all")
    for line, stage in zip(run(killed, MOMENTS | {"all": ""}), [*MOMENTS, "all"], strict=True):
        code, report = (0, True) if stage == "all" else (-signal.SIGKILL, False)
        assert line == f"{stage} {code} False {report}", said(killed, stage)
    assert said(killed, "all").count(": done before\n") == len(STAGES) - 1
    assert measured(killed) == measured(straight)
    for name in FILES:
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    one, other = states(straight), states(killed)
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert state.keys() == other[name].keys()
        assert all(torch.equal(value, other[name][key]) for key, value in state.items()), name
