"""How far a long piece of work is: a bar on a terminal, else now and then a line."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from prism_cli.errors import printable
from prism_cli.output import console
from prism_cli.quantities import format_bytes

Unit = Literal["items", "bytes"]

#: Lines where there is no terminal: rare enough for a log, often enough to see that it lives.
_LINE_EVERY_S: Final = 5.0


@contextmanager
def progress(what: str, total: int | None, unit: Unit = "items") -> Iterator[Callable[[int], None]]:
    """Yield what is told of each step: so many items or bytes more.

    Args:
        what: Such as "creating sandboxes".
        total: How many there are; None where that is not known.
        unit: What is counted.
    """
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(what, total, unit) as advance:
            yield advance
        return
    yield _Lines(what, total, unit).advance


@contextmanager
def _bar(what: str, total: int | None, unit: Unit) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [TextColumn("{task.description}", markup=False), BarColumn()]
    counted = (
        [MofNCompleteColumn()] if unit == "items" else [DownloadColumn(True), TransferSpeedColumn()]
    )
    bar = Progress(
        *columns, *counted, TimeRemainingColumn(), console=console(stderr=True), transient=True
    )
    with bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda more: bar.advance(task, more)


class _Lines:
    """Lines on standard error."""

    def __init__(self, what: str, total: int | None, unit: Unit) -> None:
        self._what = what
        self._total = total
        self._show = str if unit == "items" else format_bytes
        self._done = 0
        self._last = time.monotonic()

    def advance(self, more: int) -> None:
        """Take a step, and write a line if the last one is old."""
        self._done += more
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        of = "" if self._total is None else f" of {self._show(self._total)}"
        sys.stderr.write(f"{printable(self._what)}: {self._show(self._done)}{of}\n")
        sys.stderr.flush()
