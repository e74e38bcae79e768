"""What runtimes have in common whose sandboxes have a cgroup, and a directory on the host."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Final

from prism_agent.cgroups import Cgroups
from prism_agent.journal import Journal
from prism_agent.record import Record
from prism_agent.removals import remove_tree

#: What the program that makes a sandbox says goes to this file of its directory.
START_LOG: Final = "start.log"
_LOG_BYTES_MAX: Final = 2000


class Contained:
    """A part of a `Runtime`.

    Args:
        journal: Knows the sandboxes' directories.
        cgroups: Where they are; None: they are in none.
    """

    def __init__(self, journal: Journal, cgroups: Cgroups | None) -> None:
        self._journal = journal
        self._cgroups = cgroups

    def _start_log(self, record: Record) -> Path:
        """Return where what is said when it is started is kept."""
        return self._journal.directory(record.sandbox_id) / START_LOG

    def explain(self, record: Record) -> str:
        """Return what was said when it was started last."""
        path = self._start_log(record)
        try:
            with path.open("rb") as log:
                # Whoever has taken over a sandbox's own kernel may have made it of any length.
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_BYTES_MAX))
                text = log.read(_LOG_BYTES_MAX).decode("utf-8", "replace").strip()
        except OSError:
            text = ""
        return text or "it said nothing"

    async def pause(self, record: Record) -> None:
        """Freeze its cgroup."""
        if self._cgroups is None or not record.cgroup:
            raise OSError(errno.EOPNOTSUPP, "it runs without a cgroup, so it cannot be frozen")
        await asyncio.to_thread(self._cgroups.freeze, record.cgroup)

    async def resume(self, record: Record) -> None:
        """Thaw its cgroup."""
        if self._cgroups is not None and record.cgroup:
            await asyncio.to_thread(self._cgroups.thaw, record.cgroup)

    def oom_kills(self, record: Record) -> int:
        """Return how many processes the kernel has killed for memory, which a cgroup counts."""
        if self._cgroups is None or not record.cgroup:
            return 0
        return self._cgroups.oom_kills(record.cgroup)

    def _procs_files(self, record: Record) -> list[Path]:
        return list(self._cgroups.procs_files(record.cgroup)) if self._cgroups else []

    def _remove_files(self, record: Record) -> None:
        """Remove all in its directory, where nothing is mounted any more."""
        directory = self._journal.directory(record.sandbox_id)
        for entry in list(directory.iterdir()) if directory.is_dir() else []:
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            else:
                entry.unlink(missing_ok=True)
