"""The command line: help, completion, exit statuses, one line per error, Ctrl-C."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fake_data import fake_data, write_idx

import torchclust
from torchclust.cli import commands
from torchclust.cli import parser as cli
from torchclust.cli.file_report import describe
from torchclust.export import VelaError
from torchclust.recipes import prepare as preparing

RECIPE = """
name: tiny
data: {name: mnist5k, batch_size: 8}
model: arm_mlp
train: {epochs: 1}
cluster: {n_clusters: 8}
finetune: {epochs: 1}
"""
COMMANDS = ("run", "check", "sweep", "new", "report", "export", "vela", "kit")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setattr(preparing, "load_data", fake_data)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return "r.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run none.yaml", "cannot read /.*/none.yaml: No such file or directory"),
        ("run r.yaml --set clster=8", "unknown key clster; did you mean 'cluster'"),
        ("run r.yaml --set train.epochs=x", "train.epochs: should be a valid integer, got 'x'"),
        ("run r.yaml --set cluster.n_clusters=1", "must be between 2 and 256, got 1"),
        ("run r.yaml --set cluster.rules={stem:8}", r"rule 'stem:8' matches no parameter"),
        ("run r.yaml --set model.checkpoint=x.pt", "model.checkpoint: cannot read /.*/x.pt: No su"),
        (
            "check r.yaml --set model.checkpoint=whole.pt",
            "no checkpoint that loads without running",
        ),
        ("check r.yaml --set export={} --set tflm.max_arena=10", "10 bytes do not even hold the n"),
        ("run r.yaml --set export={} --set tflm.max_arena=783", "inputs, 784 bytes in int8; leave"),
        ("run r.yaml --output full", "full is not empty: add --resume"),
        ("run r.yaml --output r.yaml --overwrite", "r.yaml is a file"),
        ("sweep r.yaml", "no key has several values"),
        ("sweep r.yaml --set cluster.n_clusters=4,1", "must be between 2 and 256, got 1"),
        ("check r.yaml --set model=nn", "no network 'nn'"),
        ("report none.pt", "cannot report on none.pt: .*No such file"),
        ("report r.yaml", "cannot report on r.yaml: it is no .tflite file, and no checkpoint"),
        ("report cut.tflite", "cannot report on cut.tflite: .*damaged TFLite file.* its 12 bytes"),
        ("vela cut.tflite", "cut.tflite: a damaged TFLite file"),
        ("kit cut.tflite board", "cut.tflite: a damaged TFLite file"),
        ("vela none.tflite", "No such file or directory: 'none.tflite'"),
        ("vela r.yaml", "r.yaml: not a TFLite file"),
        ("vela r.yaml --accelerator u55", "accelerator must be one of .*got 'u55'"),
        ("vela", "vela needs a .tflite file: torchclust vela model.tflite"),
        ("vela --list-configs r.yaml", "r.yaml is no file of Vela configurations: "),
        ("vela r.yaml --config none.ini", "No such file or directory: 'none.ini'"),
        ("kit none.tflite board", "No such file or directory: 'none.tflite'"),
        ("kit r.yaml board", "r.yaml: not a TFLite file"),
        ("vela r.yaml --memory-mode Sram_only", "Arm/vela.ini has no .*; did you mean 'Sram_Only'"),
        ("export r.yaml none.pt out.tflite", "cannot read /.*/none.pt"),
        ("export r.yaml whole.pt out.tflite", "whole.pt is no checkpoint that .*; write one with"),
        ("export r.yaml plain.pt nowhere/out.tflite", "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_status_2_and_no_output(
    recipe: str, capsys, arguments: str, message: str
) -> None:
    Path("full").mkdir()
    Path("full/mine").write_text("")
    torch.save({"1.weight": torch.zeros(2)}, "plain.pt")
    torch.save(torch.nn.Linear(2, 2), "whole.pt")
    Path("cut.tflite").write_bytes(b"\x1c\0\0\0TFL3\0\0\0\0")
    if "nowhere" in arguments:
        model = fake_model()
        torch.save(model.state_dict(), "plain.pt")
    before = sorted(Path().rglob("*"))
    assert cli.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"torchclust: [^\n]+\n", captured.err)
    assert re.search(message, captured.err)
    assert sorted(Path().rglob("*")) == before


def fake_model() -> torch.nn.Module:
    return preparing.build_model(
        preparing.ModelSection(name="arm_mlp"), fake_data(preparing.DataSection(name="mnist5k")), 0
    )


def test_what_new_says_can_be_pasted(tmp_path: Path, capsys) -> None:
    assert cli.main(["new", str(tmp_path / "my project")]) == 0
    assert f"  cd '{tmp_path}/my project' && torchclust run" in capsys.readouterr().out


def test_missing_data_set_names_the_remedy(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    settings = ["--set", "data=fashion_mnist", "--set", "data.root=here"]
    assert cli.main(["run", "r.yaml", *settings]) == 2
    error = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in error
    assert "data.root" in error
    assert f" {tmp_path}/here" in error
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_usage_errors_have_status_2(capsys) -> None:
    for arguments in ([], ["fly"], ["run"], ["run", "r.yaml", "--resume", "--overwrite"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
    assert "not allowed with argument --resume" in capsys.readouterr().err


def _help(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    return capsys.readouterr().out


def test_help_shows_commands_examples_and_statuses(capsys) -> None:
    text = _help([], capsys)
    assert tuple(cli.EXAMPLES) == COMMANDS
    for command in COMMANDS:
        assert f"\n    {command} " in text
        assert f"\n  {cli.EXAMPLES[command][0]}\n" in text
    for status in ("0  ", "1  ", "2  ", "130"):
        assert f"\n  {status} " in text
    assert "--print-completion bash" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_shows_examples_that_parse(command: str, capsys) -> None:
    text = _help([command], capsys)
    for option in ("--json", "--quiet"):
        assert option in text
    for example in cli.EXAMPLES[command]:
        assert f"\n  {example}\n" in text
        program, *words = shlex.split(example)
        assert program == "torchclust"
        assert cli.parser().parse_args(words).command == command


def test_version_is_the_package_s(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"torchclust {torchclust.__version__}\n"
    assert version("torchclust") == torchclust.__version__


def test_python_m_is_the_program() -> None:
    words = [sys.executable, "-m", "torchclust"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"torchclust {torchclust.__version__}\n"
    assert subprocess.run([*words, "fly"], capture_output=True, check=False).returncode == 2


COMPLETIONS = {
    "torchclust ": set(COMMANDS),
    "torchclust sw": {"sweep"},
    "torchclust run --o": {"--output", "--overwrite"},
    "torchclust check fol": {"folder"},
    "torchclust report --json folder/": {"folder/a.yaml", "folder/below"},
    "torchclust sweep --output folder/": {"folder/below"},
}


def test_bash_completes_commands_options_and_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "folder/below").mkdir(parents=True)
    (tmp_path / "folder/a.yaml").touch()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print-completion", "bash"])
    script = capsys.readouterr().out + "\ncomplete -p torchclust >/dev/null\n"
    for line in COMPLETIONS:
        words = [shlex.quote(word) for word in line.split(" ")]
        script += f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        script += f'_shtab_torchclust torchclust {words[-1]}; echo "${{COMPREPLY[*]}}"\n'
    done = subprocess.run(
        ["bash", "-e"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(COMPLETIONS, found, strict=True)) == COMPLETIONS


def test_zsh_completes_commands_options_and_files(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print-completion", "zsh"])
    script = capsys.readouterr().out
    assert script.startswith("#compdef torchclust\n")
    for command in COMMANDS:
        assert f"\n    {command}:'" in script
    assert script.count(':_files"') == 12  # every file that a command takes
    assert script.count(':_files -/"') == 5  # and every folder
    if shutil.which("zsh"):  # a machine without zsh can not say more
        subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_completion_without_its_package_names_the_install(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--print-completion", "bash"])
    assert 'shtab:  pip install "torchclust[recipes]"' in capsys.readouterr().err


def test_json_is_all_that_stands_on_standard_output(recipe: str, capsys) -> None:
    assert cli.main(["run", recipe, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads(Path("runs/tiny/report.json").read_text())
    assert "train ..." in captured.err
    assert cli.main(["check", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == report["recipe"]
    assert cli.main(["run", recipe, "--resume", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_run_and_check_tell_a_person(recipe: str, capsys) -> None:
    assert cli.main(["check", recipe]) == 0
    assert "tiny is a valid recipe" in capsys.readouterr().out
    assert cli.main(["run", recipe, "--output", "out"]) == 0
    text = capsys.readouterr().out
    assert "finetune ..." in text
    assert "\x1b" not in text  # colour is for terminals
    assert "begin with out/report.md" in text
    assert cli.main(["sweep", recipe, "--set", "cluster.n_clusters=4,8", "-q"]) == 0
    assert Path("runs/tiny_sweep/sweep.md").read_text().count("n_clusters=") == 2


@pytest.mark.parametrize("options", [{}, {"codebook_dtype": "int8", "assignment": "nearest"}])
def test_report_on_checkpoints_needs_no_architecture(tmp_path: Path, options: dict) -> None:
    layers = torch.nn.ModuleDict(
        {"stem": torch.nn.Conv2d(3, 8, 3), "norm": torch.nn.BatchNorm2d(8)}
    )
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), layers)
    torchclust.cluster_(model, {"*": 4, "Conv2d": 8}, **options)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "c.ckpt")
    found = {row["name"]: row for row in describe(tmp_path / "c.ckpt").content["tensors"]}
    expected = {row.name: row for row in torchclust.summary(model).rows}
    assert set(found) == set(expected)
    for name, row in expected.items():
        for key in ("n_clusters", "distinct", "entropy_bits", "bits_per_weight"):
            assert found[name][key] == getattr(row, key), (name, key)


def test_report_on_a_checkpoint_of_other_parametrizations_and_names(tmp_path: Path) -> None:
    """Beside clustered tensors, in one module with them; the names are those of nn.Module too."""
    norm = torch.nn.utils.parametrizations
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 30),
        norm.weight_norm(torch.nn.Conv2d(3, 16, 3)),
        norm.spectral_norm(torch.nn.Linear(30, 8)),
    )
    model._modules["double"] = torch.nn.Linear(40, 8)
    model._modules["half"] = norm.orthogonal(torch.nn.Linear(8, 8))
    model[2].register_parameter("more", torch.nn.Parameter(torch.randn(30, 30)))
    torchclust.cluster_(model, {"0.weight": 4, "2.more": 4, "double.weight": 4})
    odd = {1: torch.zeros(3), "sparse": torch.eye(4).to_sparse()}
    odd |= {"training": torch.zeros(3), "my_parametrizations.a.b": torch.zeros(2)}
    odd["float8"] = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    torch.save({**model.state_dict(), **odd}, tmp_path / "c.pt")
    found = {row["name"]: row for row in describe(tmp_path / "c.pt").content["tensors"]}
    clustered = {name for name, row in found.items() if row["n_clusters"]}
    assert clustered == {"0.weight", "2.more", "double.weight"}
    stored = {key for key in model.state_dict() if "parametrizations" not in key}
    others = {
        "my_parametrizations.a.b",
        "1.weight.original0",
        "1.weight.original1",
        "2.weight.original",
        "half.weight.original",
    }
    assert set(found) - {"2.weight.0._u", "2.weight.0._v", "half.weight.0.base"} == (
        stored | others | clustered
    )


def test_report_on_a_checkpoint_that_lacks_a_part(tmp_path: Path, capsys) -> None:
    state = torchclust.cluster_(torch.nn.Linear(20, 30), 4).state_dict()
    for missing in ("parametrizations.weight.original", "parametrizations.weight.0.indices"):
        torch.save({k: v for k, v in state.items() if k != missing}, tmp_path / "c.pt")
        assert cli.main(["report", str(tmp_path / "c.pt")]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"torchclust: cannot report on [^\n]+\n", said)
        assert "parts of a clustered tensor are missing or do not fit: " in said


def test_report_refuses_what_holds_no_tensors(tmp_path: Path, capsys) -> None:
    torch.save({"epoch": 1}, tmp_path / "c.pt")
    assert cli.main(["report", str(tmp_path / "c.pt")]) == 2
    assert "holds no tensors; save model.state_dict()" in capsys.readouterr().err


def test_missing_package_names_the_install(recipe: str, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for module in ("schema", "load"):
        monkeypatch.delitem(sys.modules, f"torchclust.recipes.{module}", raising=False)
    for command, extra in (("check", "recipes"), ("run", "all")):
        assert cli.main([command, recipe]) == 2
        assert capsys.readouterr().err == (
            f"torchclust: {command} needs the package 'yaml', which is not installed:  "
            f'pip install "torchclust[{extra}]"\n'
        )


def test_a_file_that_cannot_be_written_is_one_line_and_status_1(recipe: str, capsys) -> None:
    assert cli.main(["run", recipe, "--output", "r.yaml/below"]) == 1
    assert capsys.readouterr().err == ("torchclust: [Errno 20] Not a directory: 'r.yaml/below'\n")


def test_a_step_that_fails_is_one_line_and_status_1(recipe: str, capsys, monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise VelaError("Vela could not compile it:\n  its last line")

    monkeypatch.setattr("torchclust.export.vela", failing)
    assert cli.main(["vela", "a.tflite"]) == 1
    message = "torchclust: Vela could not compile it: its last line\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": ""}, True),
     (True, {"TERM": "dumb"}, False), (False, {}, False)],
)  # fmt: skip
def test_colour_is_for_terminals_that_want_it(
    recipe: str, capsys, monkeypatch, terminal: bool, environment: dict, coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say = commands._say(cli.parser().parse_args(["run", recipe]))
    say("train ...")
    expected = "\x1b[1;36mtrain ...\x1b[0m\n" if coloured else "train ...\n"
    assert capsys.readouterr().out == expected


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3, 3)}, tmp_path / "a.pt")
    words = [sys.executable, "-m", "torchclust", "report", "a.pt"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("options", [[], ["--json", "--set", "seed=1", "--output", "a b"]])
def test_what_to_type_after_ctrl_c_says_the_same_again(
    recipe: str, capsys, monkeypatch, options: list[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchclust.recipes.run.run_recipe", interrupted)
    assert cli.main(["run", recipe, *options]) == 130
    program, *words = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert program == "torchclust"
    again, asked = (cli.parser().parse_args(w) for w in (words, ["run", recipe, *options]))
    for name in ("command", "recipe", "settings", "json", "quiet"):
        assert getattr(again, name) == getattr(asked, name), name
    assert again.resume
    assert again.output == (asked.output or Path("runs/tiny"))


def test_a_bug_is_no_input_error(recipe: str, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(preparing, "load_data", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["check", recipe])


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    """A real process, a real SIGINT in the middle of the second training, then --resume."""
    import numpy as np

    for part, count in (("train", 400), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    text = RECIPE.replace("mnist5k", "fashion_mnist").replace("batch_size: 8", "batch_size: 2")
    (tmp_path / "r.yaml").write_text(text)
    # a suite that runs in the background ignores SIGINT, and so would its children
    main = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    main += "from torchclust.cli.parser import main; raise SystemExit(main())"
    words = [sys.executable, "-c", main]
    words += ["run", "r.yaml", "--set", f"data.root={tmp_path}", "--set", "finetune.epochs=500"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=environment,
                          ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("control ..."):
                break
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    command = re.search(r"interrupted; what is finished is kept. Go on with:\n  (.*)\n$", errors)
    assert command is not None
    assert "Traceback" not in errors
    again = command[1].split()[1:]
    assert again[-1] == "--resume"
    again[again.index("finetune.epochs=500")] = "finetune.epochs=0"
    done = subprocess.run([*words[:3], *again], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: done before" in done.stdout
