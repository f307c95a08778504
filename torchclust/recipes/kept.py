"""Stages kept as files: a result whose name holds a digest of all that it depends on.

What a stage writes beside it, for the user, has a name that tells nothing of the recipe. So its
digest is kept, and a file of another recipe that stands in its place is written anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.recipes.prepare import Prepared

if sys.platform != "win32":
    import fcntl

Result = dict[str, Any]
SUBJECT = ("seed", "data", "model", "module", "metric", "score", "trainer", "train")


@dataclass
class Stages:
    """The stages of one run: stored results, and what each new one depends on.

    Args:
        folder: where results are stored.
        say: told what is going on, one line at a time.
        progress: whether training shows its progress bar.
    """

    folder: Path
    say: Callable[[str], None] = lambda line: None
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    def result(
        self,
        name: str,
        depends: Any,
        compute: Callable[[], Result],
        *,
        folder: Path | None = None,
    ) -> Result:
        """Return the stored result of a stage, or compute and store it.

        A result holds tensors, numbers, strings, lists and dicts. It is written under another name
        and then renamed, so a file that is there is complete. With a `folder`, its ``"files"`` are
        the names of what the stage wrote there: unless these files are as it left them, it runs.
        """
        text = json.dumps([versions(), depends], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        file = self.folder / f"{name}-{digest}.pt"
        stored = _done(file, folder)
        with nullcontext() if stored is not None else _alone(file):
            stored = stored or _done(file, folder)  # by another process, while this one waited
            if stored is not None:
                self.say(f"{name}: done before")
                self.seconds[name] = stored["seconds"]
                return stored
            self.say(f"{name} ...")
            started = time.perf_counter()
            computed = compute()
            if folder is not None:
                names = computed["files"]
                computed["digests"] = {name: digest_of_file(folder / name) for name in names}
            self.seconds[name] = round(time.perf_counter() - started, 2)
            partial = file.with_suffix(".partial")
            torch.save({**computed, "seconds": self.seconds[name]}, partial)
            os.replace(partial, file)
        return computed


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Let one process at a time see to a file; the lock goes with the process, killed or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.stem}.lock").open("w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _done(file: Path, folder: Path | None) -> Result | None:
    """Return a stored result; None where there is none, or it or what it wrote was changed since.

    What it wrote may have been: by a run of another recipe in the same folder.
    """
    try:
        stored: Result = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    if folder is None:
        return stored
    digests: Mapping[str, str] | None = stored.get("digests")  # a result of before has none
    is_whole = digests is not None and all(
        (folder / name).is_file() and digest_of_file(folder / name) == digest
        for name, digest in digests.items()
    )
    return stored if is_whole else None


def digest_of_file(path: Path) -> str:
    """Return what two files have in common only if they hold the same bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of_networks(modules: Iterable[nn.Module]) -> str:
    """Return the same of their state dicts: what a file of them holds, however they came to be."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            else:  # extra state, whatever a module makes of it
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def origin(prepared: Prepared) -> dict[str, Any]:
    """Return what every stage depends on: seed, data, training, and the module as it is built.

    The module by its printed form, its tensors and the user's source: what is behind a name in the
    recipe changes, and a result of the old one must not be taken for the new one's.
    """
    recipe, module = prepared.recipe, prepared.task.module
    dumped = recipe.to_dict()
    found = {key: dumped.get(key) for key in SUBJECT}
    found["layers"] = repr(module)
    state = module.state_dict()
    found["tensors"] = {n: list(t.shape) for n, t in state.items() if isinstance(t, Tensor)}
    if recipe.subject.checkpoint is not None:
        found["checkpoint"] = digest_of_file(recipe.subject.checkpoint)
    found |= prepared.task.depends
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {
        "python": platform.python_version(),
        "torchclust": importlib.metadata.version("torchclust"),
    }
    for name in ("torch", "numpy", "pytorch-lightning", "lightning", "litert-torch",
                 "ai-edge-quantizer", "ai-edge-litert", "ethos-u-vela", "executorch",
                 "tflite-micro"):  # fmt: skip
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
