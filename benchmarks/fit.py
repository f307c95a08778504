"""How fast, how exact and how frugal `fit_codebook` is, beside numpy.sort and its peers.

    python benchmarks/fit.py                        # all of it, a few minutes
    python benchmarks/fit.py speed error int8       # parts: speed, error, memory, int8
    python benchmarks/fit.py speed --flash /tmp/flash/bin/python
    python benchmarks/fit.py --scaling docs/scaling.png      # also what a training step adds

Times are medians over rounds in which every contestant runs once, so that a disturbance hits all of
them; ratios are medians of the rounds' ratios. The error's judge is kmeans1d, which is exact.
flash1dkmeans runs in an environment of its own (benchmarks/peers/flash1dkmeans_fit.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.fitting.channels import GRID, Channels
from torchclust.fitting.codebook import fit_codebook
from torchclust.fitting.integer_codebook import _alternate, fit_integer_codebook
from torchclust.fitting.nearest import assign
from torchclust.weight.lookup import Memory, grouped_sum, lookup

Weights = npt.NDArray[np.float32]
PARTS = ("speed", "error", "memory", "int8")


def draw(kind: str, n: int, seed: int = 0) -> Weights:
    """Weights as layers have them; "mixed" are channels whose scales differ widely."""
    rng = np.random.default_rng(seed)
    if kind == "laplace":
        return rng.laplace(size=n).astype(np.float32)
    weights = rng.standard_normal(n, dtype=np.float32)
    if kind == "pruned":
        weights[rng.random(n, dtype=np.float32) < 0.8] = 0.0
    if kind == "mixed":
        weights *= np.exp(1.5 * rng.standard_normal(n, dtype=np.float32))
    return weights


KINDS = ("gauss", "laplace", "pruned", "mixed")


def rounds(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    return median(a / b for a, b in zip(times[name], times[base], strict=True))


def speed(flash: str | None) -> None:
    print("\nTime, k = 16 (medians; targets: at most 4x the sort and an eighth of flash1dkmeans at")
    print("n = 1e7, at most 20 ms at n = 1e5)")
    print(f"{'weights':>8} {'n':>9} {'sort':>9} {'fit':>9} {'fit/sort':>9} {'flash/fit':>10}")
    for n, repeats in ((100_000, 51), (1_000_000, 21), (10_000_000, 11)):
        for kind in KINDS:
            weights = draw(kind, n)
            contestants = {
                "sort": lambda w=weights: np.sort(w),
                "fit": lambda w=weights: fit_codebook(w, 16),
            }
            times = rounds(contestants, repeats)
            peer = "-"
            if flash and n >= 1_000_000:
                found = flash_times(flash, weights, 16)
                # Two processes: compared through the sort that each of them timed.
                peer = f"{ratio(found, 'peer', 'sort') / ratio(times, 'fit', 'sort'):.1f}x"
            print(
                f"{kind:>8} {n:>9.0e} {1e3 * median(times['sort']):>6.1f} ms "
                f"{1e3 * median(times['fit']):>6.1f} ms {ratio(times, 'fit', 'sort'):>8.2f}x "
                f"{peer:>10}"
            )


def flash_times(python: str, weights: Weights, k: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npy"
        np.save(path, weights)
        script = Path(__file__).parent / "peers" / "flash1dkmeans_fit.py"
        command = [python, str(script), str(path), str(k), "3"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def error(large: bool) -> None:
    import kmeans1d

    print("\nError relative to the optimum (kmeans1d), less 1 (target: at most 1e-4)")
    cases = [(10_000, 2), (10_000, 16), (10_000, 64), (10_000, 256), (100_000, 16), (100_000, 64)]
    if large:
        cases += [(100_000, 256), (1_000_000, 16), (1_000_000, 64)]
    for n, k in cases:
        print(f"n = {n:.0e}, k = {k:>3}:", end="")
        for kind in KINDS:
            weights = draw(kind, n, seed=k)
            wide = weights.astype(np.float64)
            judge = kmeans1d.cluster(wide, k)
            least = np.square(wide - np.array(judge.centroids)[np.array(judge.clusters)]).sum()
            print(f"  {kind} {fit_codebook(wide, k).inertia / least - 1:9.1e}", end="", flush=True)
        print()


def memory() -> None:
    print("\nMemory beyond the input (targets: 4 arrays of n; the last one: 20 s and 4 GiB in all)")
    for shape, k, weighted in (
        ((10_000_000,), 16, 0),
        ((10_000_000,), 16, 1),
        ((50272, 2048), 256, 0),
    ):
        command = [sys.executable, __file__, "--measure", str(shape), str(k), str(weighted)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(result.stdout)
        size = 4 * int(np.prod(shape))
        print(
            f"{'x'.join(map(str, shape))} in {k}{', importance' * weighted}: "
            f"{found['extra'] / size:.2f} arrays, peak {found['peak'] / 2**30:.2f} GiB resident in "
            f"all, {found['seconds']:.2f} s ({found['seconds'] / found['sort']:.2f}x its sort)"
        )


def measure(shape: tuple[int, ...], k: int, weighted: bool) -> None:
    weights = draw("gauss", int(np.prod(shape))).reshape(shape)
    importance = np.square(weights) if weighted else None
    fit_codebook(weights.ravel()[:10_000], k)  # what is loaded lazily is loaded now
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = time.perf_counter()
    book = fit_codebook(weights, k, importance=importance)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    assert book.indices.shape == shape
    start = time.perf_counter()
    np.sort(weights.ravel())
    sort = time.perf_counter() - start
    print(json.dumps({"extra": peak - before, "peak": peak, "seconds": seconds, "sort": sort}))


def resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {what}: this part needs Linux")


def int8() -> None:
    print("\nInt8 codebook with channel scales: time, and error above the best of 12 random starts")
    rng = np.random.default_rng(0)
    for shape in ((64, 576), (256, 3136)):
        weights = rng.standard_normal(shape) * rng.uniform(0.2, 1.5, (shape[0], 1))
        weights = weights.astype(np.float32)
        channels = Channels(weights, None)
        typical = channels.typical()
        for k in (3, 7, 15, 31):
            start = time.perf_counter()
            book = fit_integer_codebook(torch.from_numpy(weights), k)
            seconds = time.perf_counter() - start
            best = np.inf
            for _ in range(12):
                spread = rng.uniform(1.5, 6.0) * np.exp(0.2 * rng.standard_normal(shape[0]))
                best = min(best, _alternate(channels, (k - 1) // 2, spread * typical / GRID)[0])
            best *= float(channels.peak.max()) ** 2
            print(
                f"{shape[0]}x{shape[1]}, k = {k:>2}: {seconds:.2f} s, error "
                f"{100 * (book.inertia / best - 1):+.3f} %, of one codebook without scales "
                f"{book.inertia / fit_codebook(weights, k).inertia:.2f}"
            )


def scaling(path: str) -> None:
    """Time against n, 1e4 to 1e8: fitting, and what a clustered training step adds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = [10**e for e in (4, 5, 6, 7, 8)]
    fitting: dict[str, list[float]] = {}
    stepping: dict[str, list[float]] = {}
    for n in sizes:
        weights = draw("gauss", n)
        contestants: dict[str, Callable[[], Any]] = {"numpy.sort": lambda w=weights: np.sort(w)}
        for k in (2, 16, 256):
            contestants[f"fit, k = {k}"] = lambda w=weights, k=k: fit_codebook(w, k)
        for curves, measured, repeats in (
            (fitting, contestants, 5 if n < 10**7 else 3),
            (stepping, additions(weights), 31 if n < 10**7 else 7),
        ):
            times = rounds(measured, repeats)
            for name, seconds in times.items():
                curves.setdefault(name, []).append(median(seconds))
            print(f"n = {n:.0e}: ", end="")
            print(", ".join(f"{c} {1e3 * t[-1]:.2f} ms" for c, t in curves.items()), flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, curves, title in (
        (axes[0], fitting, "Fitting one codebook"),
        (axes[1], stepping, "Added to a training step, k = 16"),
    ):
        for name, seconds in curves.items():
            color = "grey" if name == "numpy.sort" else None
            ax.loglog(sizes, seconds, "o-", label=name, color=color)
        ax.set(xlabel="weights (float32, Gaussian)", ylabel="seconds", title=title)
        ax.legend()
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def additions(weights: Weights) -> dict[str, Callable[[], Any]]:
    """The operators of a clustered weight's forward and backward pass, without the optimizer's."""
    weight = torch.from_numpy(weights)
    table = torch.linspace(-2, 2, 16)
    indices, memory = assign(weight, table), Memory()
    gradient = weight.clone()

    def fixed() -> Tensor:
        lookup(table, indices, memory=memory)
        return grouped_sum(gradient, indices, table.shape)

    def nearest() -> Tensor:
        found = assign(weight, table)
        lookup(table, found, memory=memory)
        return grouped_sum(gradient, found, table.shape)

    return {"fixed": fixed, "nearest": nearest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    parser.add_argument("--flash", metavar="PYTHON", help="interpreter that has flash1dkmeans")
    parser.add_argument("--large", action="store_true", help="judge up to n = 1e6 (minutes)")
    parser.add_argument("--scaling", metavar="PNG", help="only time n = 1e4 .. 1e8, and plot it")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        shape, k, weighted = (
            json.loads(a.replace("(", "[").replace(",)", "]").replace(")", "]"))
            for a in arguments.measure
        )
        measure(tuple(shape), k, bool(weighted))
        return
    print(f"numpy {np.__version__}, torch {torch.__version__}, {platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} threads")
    if arguments.scaling:
        scaling(arguments.scaling)
        return
    parts = arguments.parts or PARTS
    if "speed" in parts:
        speed(arguments.flash)
    if "error" in parts:
        error(arguments.large)
    if "memory" in parts:
        memory()
    if "int8" in parts:
        int8()


if __name__ == "__main__":
    main()
