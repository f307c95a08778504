"""What `import torchclust` and `torchclust --help` cost beside `import torch`.

    python benchmarks/startup.py [--repeats 25]

Each round starts one process of every kind in turn; printed are medians of CPU time (user and
system, the interpreter's own start included) and of the wall clock, and the CPU time's ratio to
`import torch`.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from statistics import median

KINDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torchclust": ["-c", "import torchclust"],
    "import torch, torchclust": ["-c", "import torch, torchclust"],
    "from torchclust import cluster_": ["-c", "from torchclust import cluster_"],
    "from torchclust import *": ["-c", "from torchclust import *"],
    "torchclust --help": ["-m", "torchclust", "--help"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """CPU and wall-clock seconds of one process."""
    before, started = _children(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return _children() - before, time.perf_counter() - started


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    for arguments in KINDS.values():  # compiled and in the page cache
        measure(arguments)
    rounds = [
        {kind: measure(arguments) for kind, arguments in KINDS.items()} for _ in range(repeats)
    ]
    print(f"Python {platform.python_version()}, torch {version('torch')}, {repeats} rounds")
    plain = median(found["import torch"][0] for found in rounds)
    for kind in KINDS:
        cpu = median(found[kind][0] for found in rounds)
        wall = median(found[kind][1] for found in rounds)
        print(f"{kind:32} {cpu * 1e3:7.0f} ms CPU {wall * 1e3:7.0f} ms {cpu / plain:7.3f}x")


if __name__ == "__main__":
    main()
