"""The packages behind export: imported on first use, kept quiet, and one clear error without them.

LiteRT, its quantizer and their dependencies take seconds to import and write their own news to the
terminal (oneDNN, XNNPACK, absl, torchao). A user of `to_tflite` asked for none of it; when
something fails, what they wrote is in the error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_LONGEST = 300
_SOURCE_LINE = re.compile(r"/\S+:\d+:\d+: ")  # of the compiler's user, inside torch
INSTALL = 'pip install "torchclust[export]"'
INSTALL_MICRO = 'pip install "torchclust[micro]"'

# The quantizer was renamed; the API is the same, so the first that imports is used.
_QUANTIZERS = ("ai_edge_quantizer", "litert_quantizer")


class ExportError(RuntimeError):
    """A model that cannot be exported as asked; the message names the layer and the remedy."""


def first_line(error: BaseException) -> str:
    """What a third party's error says, without the compiler output that may follow."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = _SOURCE_LINE.sub("", line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def litert_torch() -> Any:
    """The converter from torch to LiteRT, with its progress lines off."""
    module = _load("litert_torch")
    module.config.show_progress = False
    return module


def quantizer() -> tuple[Any, Any, Any]:
    """The quantizer's modules `quantizer`, `recipe`, `qtyping`, under either package name."""
    for name in _QUANTIZERS:
        try:
            package: Any = _load(name)
        except ImportError:
            if name == _QUANTIZERS[-1]:
                raise
            continue
        break
    root = package.__name__
    return _load(f"{root}.quantizer"), _load(f"{root}.recipe"), _load(f"{root}.qtyping")


def interpreter() -> Any:
    """LiteRT's `Interpreter` and `OpResolverType`."""
    return _load("ai_edge_litert.interpreter")


def schema() -> Any:
    """The TFLite flatbuffer's generated classes."""
    return _load("ai_edge_litert.schema_py_generated")


def micro() -> Any:
    """tflite-micro's interpreter."""
    return _load("tflite_micro.python.tflite_micro.runtime", INSTALL_MICRO)


def flatbuffers() -> Any:
    """The flatbuffers package, which the schema is written against."""
    return _load("flatbuffers")


def _load(name: str, install: str = INSTALL) -> ModuleType:
    found = sys.modules.get(name)
    if found is not None:
        return found
    try:
        with quietly():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"exporting needs the package {error.name!r}, which is not installed:  {install}",
            name=error.name,
        ) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep third-party code off the terminal; if it raises, print what it had to say."""
    said = ""
    try:
        with heard() as text:
            try:
                yield
            finally:
                said = text()
    except BaseException:
        sys.stderr.write(said)
        raise


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage once, at the end, and only what was made meanwhile.

    A converter makes millions of objects that it needs, and looking through them again and again
    takes a sixth of its time; looking through all that is older, as much again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            gc.collect(generation=0)


@contextlib.contextmanager
def heard() -> Iterator[Callable[[], str]]:
    """Keep third-party code off the terminal; what is yielded returns what it has said so far.

    Covers warnings, logging, and stderr both as Python sees it and as the process does (file
    descriptor 2, where C++ code writes). Other threads are silenced meanwhile.
    """
    level = logging.root.manager.disable
    with tempfile.TemporaryFile("w+", errors="replace") as captured, warnings.catch_warnings():

        def text() -> str:
            captured.flush()
            captured.seek(0)
            return captured.read()

        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            with contextlib.redirect_stderr(captured):
                yield text
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            logging.disable(level)
