"""What is built installs and works elsewhere, and what is not installed says how to get it."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "lightning_logs", "checkpoints"
)
OUTSIDE = ("model/test_rules.py", "weight/test_lookup.py", "packing/test_coding.py")
EXTRAS = {
    "lightning": ("pytorch_lightning", "lightning", "torchmetrics"),
    "export": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "litert_quantizer",
               "flatbuffers", "ethosu"),
    "executorch": ("executorch", "torchao", "tosa", "tosa_reference_model"),
    "recipes": ("constriction", "matplotlib", "mlxtend", "pydantic", "yaml", "rich", "safetensors",
                "sklearn", "scipy", "shtab", "PIL", "tqdm"),
}  # fmt: skip


def python(code: str, folder: Path, *path: Path) -> str:
    """Run code in a new process, with these folders in front of what is installed."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from the sdist, by suffix."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    done = subprocess.run([*words, folder / "source"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {file.suffix: file for file in (folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*words, "--target", folder, built[".whl"]], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        header = Parser().parsestr(wheel.read(metadata).decode())
        (entry,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "torchclust = torchclust.cli:main" in wheel.read(entry).decode()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "torchclust").rglob("*.py")}
    package = {name for name in names if ".dist-info/" not in name}
    project = {
        str(f.relative_to(ROOT))
        for f in (ROOT / "torchclust/recipes/project").iterdir()
        if f.is_file()
    }
    assert package == modules | project | {"torchclust/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {*EXTRAS, "all", "dev", "micro"} == set(header.get_all("Provides-Extra"))
    needed = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[<>=!]", line)[0] for line in needed) == ["numpy", "torch"]


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("tests", "recipes", "docs", "notebooks", "torchclust"):
        source = (f for f in (ROOT / folder).rglob("*") if f.is_file())
        expected = {str(f.relative_to(ROOT)) for f in source if "__pycache__" not in f.parts}
        assert {name for name in expected if "/." not in name} <= names, folder
    assert {
        "Makefile",
        "constraints.txt",
        "constraints-executorch.txt",
        "pyproject.toml",
        "setup.cfg",
        "README.md",
    } <= names
    assert not [name for name in names if name.endswith((".pyc", ".pt"))]


@pytest.mark.slow
def test_tests_pass_with_what_was_installed(
    built: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    shutil.rmtree(unpacked / "torchclust")
    files = [f"tests/{name}" for name in OUTSIDE]
    printed = python(
        "import pytest, torchclust\n"
        f"assert torchclust.__file__.startswith({str(installed)!r}), torchclust.__file__\n"
        f"raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', *{files!r}]))",
        unpacked,
        installed,
    )
    assert re.search(r"^\d\d+ passed", printed, re.MULTILINE), printed


@pytest.mark.slow
def test_the_installed_program_runs(installed: Path, tmp_path: Path) -> None:
    words = [sys.executable, installed / "bin/torchclust", "--version"]
    environment = {"PYTHONPATH": str(installed)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("torchclust "), done.stderr


# Modules of extras are as if they were not installed; what is left is torch, numpy and their own.
BLOCK = """
import json
from importlib.machinery import PathFinder
def find(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] in BLOCKED else find(name, path, target)
BLOCKED = set(%r)
PathFinder.find_spec = find
"""

CORE = """
import copy, torch, torchclust
from torch import nn
teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 40))
x = torch.randn(16, 1, 5, 5)
model = copy.deepcopy(teacher)
importance = torchclust.fisher_information(model, [(x, x.new_zeros(16).long())],
                                           nn.functional.cross_entropy)
torchclust.cluster_(model, 8, importance=importance)
torchclust.distill_(model, teacher, [x], steps=2)
torchclust.refit_(model)
other = torchclust.restore_(copy.deepcopy(teacher), model.state_dict())
assert torch.equal(other(x), model(x))
assert "clusters" in str(torchclust.summary(model))
assert len(list(torchclust.named_clusterings(model))) == 2
torchclust.strip_(model)
assert not torchclust.is_clustered(model[0])
assert len(model[0].weight.unique()) == 8
assert len(torchclust.fit_codebook(range(100), 5).centroids) == 5
print("core works")
"""

ENTRIES = {
    "import torchclust.lightning": "lightning",
    "torchclust.lightning": "lightning",
    "torchclust.export.to_tflite(model, x, 'a.tflite', calibration=[x])": "export",
    "torchclust.export.to_tflite(model, x, 'a.tflite', calibration=None, float=True)": "export",
    "torchclust.export.inspect_tflite('b.tflite')": "export",
    "torchclust.export.vela('b.tflite')": "export",
    "torchclust.export.to_pte(model, x, 'a.pte', calibration=[x])": "executorch",
    "torchclust.save_packed(model, 'a.packed')": "recipes",
    "torchclust.load_packed_(model, 'b.packed')": "recipes",
    "torchclust.summary(model).plot()": "recipes",
    "main('run r.yaml')": "all",
    "main('sweep r.yaml --set seed=1,2')": "all",
    "main('check r.yaml')": "recipes",
    "main('export r.yaml c.pt d.tflite')": "all",
    "main('report b.tflite')": "export",
    "main('vela b.tflite')": "export",
    "main('--print-completion bash')": "recipes",
}

TRY = """
import contextlib, io, torch, torchclust, torchclust.export
from torchclust.cli import parser as cli
def main(words):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            status = cli.main(words.split())
        except SystemExit as end:
            status = end.code
    assert status == 2, status
    raise ImportError(errors.getvalue())
x = torch.randn(2, 64)
model = torchclust.cluster_(torch.nn.Linear(64, 64), 4)
found = {}
for entry in ENTRIES:
    try:
        exec(entry)
    except ImportError as error:
        found[entry] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_core_works_with_torch_and_numpy_alone(installed: Path, tmp_path: Path) -> None:
    blocked = [name for names in EXTRAS.values() for name in names]
    assert python(BLOCK % (blocked,) + CORE, tmp_path, installed) == "core works\n"


@pytest.mark.slow
def test_each_entry_says_which_extra_it_needs(tmp_path: Path) -> None:
    (tmp_path / "b.tflite").write_bytes(b"\0\0\0\0TFL3" + bytes(64))
    (tmp_path / "r.yaml").write_text("name: a\ndata: mnist5k\nmodel: arm_mlp\ntrain: {epochs: 0}\n")
    blocked = [name for names in EXTRAS.values() for name in names]
    code = BLOCK % (blocked,) + f"ENTRIES = {list(ENTRIES)!r}\n" + TRY
    found = json.loads(python(code, tmp_path, ROOT))
    assert list(found) == list(ENTRIES)
    for entry, extra in ENTRIES.items():
        assert f'pip install "torchclust[{extra}]"' in found[entry], (entry, found[entry])
