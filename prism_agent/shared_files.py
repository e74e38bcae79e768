"""How execs get to a sandbox that no descriptor can be passed into: as files of a shared directory.

`supervisor/named.c` is the other end. The directory is the sandbox's kernel's, so what is found
there may be anything: only what was just made here is opened, and no link is followed.
"""

import contextlib
import errno
import itertools
import os
from pathlib import Path
from typing import Final

from prism_agent.data_directory import write_all
from prism_agent.runtime.base import Shared

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Entries that a sweep looks at. An agent that died has left a few; whoever has taken over the
#: sandbox's own kernel may have made a million, and would hold the loop up with each connection.
_SWEPT_MAX: Final = 4096


class SharedFiles:
    """Of one sandbox.

    Args:
        shared: The directory, and whose it is.
        execs: Where rings and inputs are, under the same names; on the same file system.
    """

    def __init__(self, shared: Shared, execs: Path) -> None:
        self._shared = shared
        self._execs = execs

    def put(self, number: int, spec: bytes, with_input: bool) -> None:
        """Give an exec's files to the supervisor, which takes their names away.

        Raises:
            OSError: Something is there already, or there is no room left.
        """
        uid = self._shared.uid
        path = self._shared.directory / f"{number}.spec"
        descriptor = os.open(path, _NEW, 0o600)
        try:
            os.fchown(descriptor, uid, uid)
            write_all(descriptor, spec)
        except OSError:
            # What there was room for would stay, and leave none for the next.
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)
        if with_input:
            os.mkfifo(self._input(number), 0o600)
        for name in (f"{number}.ring", f"{number}.in") if with_input else (f"{number}.ring",):
            os.chown(self._execs / name, uid, uid)
            os.link(self._execs / name, self._shared.directory / name)

    def _input(self, number: int) -> Path:
        return self._execs / f"{number}.in"

    def open_input(self, number: int) -> int:
        """Return a descriptor that writes to an exec's input; -1: nobody reads it any more."""
        try:
            descriptor = os.open(
                self._input(number), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return -1
            raise
        return descriptor

    def end_input(self, number: int) -> None:
        """Let nobody open it again; what was written is still read."""
        self._input(number).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what an earlier agent has put there, and the supervisor never heard of.

        It takes away the names of what it has heard of, and answers one agent at a time.
        """
        with os.scandir(self._shared.directory) as entries:
            for entry in itertools.islice(entries, _SWEPT_MAX):
                if entry.name.partition(".")[0].isdecimal():
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
