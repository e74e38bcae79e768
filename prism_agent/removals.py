"""Removes files of which nobody needs to know when they are gone, beside the loop.

To free what a file takes may have the disk do something, and takes milliseconds on some: far longer
than the exec that makes way for.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

#: A thread is woken for so many files, or bytes, that wait.
_FILES: Final = 16
_BYTES: Final = 4 << 20
#: So many wait for a thread that has not come back; what is more is removed by the caller.
_FILES_MAX: Final = 64
_BYTES_MAX: Final = 32 << 20


class Removals:
    """Of the files of one directory; what waits when the process ends is found by the next one."""

    def __init__(self) -> None:
        self._directory = Path()
        self._names: list[str] = []
        self._bytes = 0
        self._under_way = False

    def add(self, path: Path, size_bytes: int) -> None:
        """Remove a file soon.

        Args:
            path: In the same directory as all that wait; else those are removed now.
            size_bytes: What it takes.
        """
        if path.parent != self._directory:
            self.flush()
            self._directory = path.parent
        self._names.append(path.name)
        self._bytes += size_bytes
        if len(self._names) < _FILES and self._bytes < _BYTES:
            return
        if not self._under_way:
            self._begin()
        elif len(self._names) >= _FILES_MAX or self._bytes >= _BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Remove all that wait, and return when they are gone."""
        names, self._names, self._bytes = self._names, [], 0
        with contextlib.suppress(FileNotFoundError):
            if names:
                _remove(_open(self._directory), names)

    def _begin(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        try:
            # Another sandbox may be given this path: what is removed is of the directory as it is.
            directory = _open(self._directory)
        except FileNotFoundError:
            self._names, self._bytes = [], 0
            return
        names, self._names, self._bytes = self._names, [], 0
        self._under_way = True
        loop.run_in_executor(None, _remove, directory, names).add_done_callback(self._end)

    def _end(self, done: "asyncio.Future[None]") -> None:
        self._under_way = False
        if not done.cancelled():
            done.exception()


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it, of which some may be removed meanwhile.

    Raises:
        OSError: Something is left.
    """
    shutil.rmtree(path, onerror=_raise_unless_gone)


def _raise_unless_gone(_what: object, _path: str, info: Any) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _open(directory: Path) -> int:
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _remove(directory: int, names: list[str]) -> None:
    try:
        for name in names:
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("cannot remove", extra={"file": name, "error": str(error)})
    finally:
        os.close(directory)
