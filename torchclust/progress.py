"""Progress bars: on a terminal, where rich is installed, and only for what takes over a second."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 1.0  # seconds without a bar


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Pass items through and show how many of `total` (default: their number) are done.

    A DataLoader of an IterableDataset has a length that raises TypeError, as good as none.
    """
    if total is None:
        total = length_hint(items, -1)
    with progress(description, None if total < 0 else total) as advance:
        for item in each(items):
            yield item
            advance(1)


def each(items: Iterable[T]) -> Iterator[T]:
    """All items in order; of a map-style dataset, without ``__iter__``, as its length says.

    Python would ask such a one for ever, since it need not say where it ends.
    """
    if hasattr(items, "__iter__") or not (
        isinstance(items, Sized) and hasattr(items, "__getitem__")
    ):
        return iter(items)
    return (items[number] for number in range(len(items)))


@contextmanager
def progress(
    description: str, total: int | None, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield what takes the number of steps done since its last call.

    The bar goes to stderr and leaves nothing behind; `total` None is one without an end.
    """
    with ExitStack() as stack:
        start, done = time.monotonic(), 0
        update: Callable[[int], None] | None = None

        def advance(steps: int) -> None:
            nonlocal done, update
            done += steps
            if update is None and time.monotonic() - start > _PATIENCE:
                update = _bar(stack, description, total)
            if update is not None:
                update(done)

        yield advance if shown and sys.stderr.isatty() else lambda steps: None


def _bar(stack: ExitStack, description: str, total: int | None) -> Callable[[int], None]:
    """Start a bar that the stack ends; returns what sets how much of it is done."""
    with contextlib.suppress(ImportError):
        from rich.console import Console
        from rich.progress import Progress

        bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = bar.add_task(description, total=total)
        return lambda done: bar.update(task, completed=done)
    return lambda done: None
