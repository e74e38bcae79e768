"""The data directory: one process at a time, readable by nobody else."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from prism_common.errors import StartupError

#: Below this much free disk, new commands are refused while Raft's own small writes still fit.
RESERVE_BYTES: Final = 64 * 2**20
#: Every write asks; the reserve is far more than what all of them take within this time.
_LOOK_INTERVAL_S: Final = 0.1


class DataDirectory:
    """Holds the lock on a data directory until it is closed or the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_room = True
        self._look_at = float("-inf")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"--data-dir: {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StartupError(
                    f"--data-dir: {path} is in use by another process; give this one its own"
                ) from None
            raise StartupError(f"--data-dir: {path}: {error.strerror}") from None

    def has_room(self) -> bool:
        """Whether more than the reserve is free on the directory's filesystem, as of just now."""
        now = time.monotonic()
        if now >= self._look_at:
            status = os.statvfs(self.path)
            self._has_room = status.f_bavail * status.f_frsize > RESERVE_BYTES
            self._look_at = now + _LOOK_INTERVAL_S
        return self._has_room

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)


def sync_directory(path: Path) -> None:
    """Make renames and creations in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
