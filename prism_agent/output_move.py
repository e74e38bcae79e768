"""Takes output of ended execs out of the memory of a sandbox that has failed, onto the disk.

A failed sandbox holds no memory of its node any more, as far as the control plane knows, but its
logs can be read until it is removed.
"""

import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import Final

from prism_agent import limits
from prism_agent.data_directory import write_all
from prism_agent.supervisor.protocol import RING_HEADER_BYTES

logger = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def move_rings(memory: Path, disk: Path) -> None:
    """Copy as much as a sandbox may keep on the disk, the newest first; none of it may run.

    What of it cannot be kept is given up, as with older output.

    Args:
        memory: Has the rings. What is in them is of whoever may have taken the sandbox over.
        disk: Where they come to be, each as a whole or not at all.
    """
    left = limits.EXECS_BYTES_MAX
    rings = [path for path in memory.glob("*.ring") if path.stem.isdecimal()]
    for ring in sorted(rings, key=lambda path: int(path.stem), reverse=True):
        target = disk / ring.name
        draft = target.with_suffix(".moving")
        try:
            left -= _copy(ring, draft, left)
            draft.replace(target)
        except OSError as error:
            logger.warning("output is lost", extra={"path": str(ring), "error": str(error)})
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def _copy(source: Path, target: Path, room_bytes: int) -> int:
    """Copy a ring without its holes; return what it takes.

    Raises:
        OSError: There is no room, or it is no ring.
    """
    reading = os.open(source, _READ)
    try:
        found = os.fstat(reading)
        taken = found.st_blocks * 512
        is_ring = stat.S_ISREG(found.st_mode)
        if not is_ring or found.st_size > RING_HEADER_BYTES + limits.RING_BYTES:
            raise OSError(0, "it is no ring")
        if taken > room_bytes:
            raise OSError(0, "newer output takes all that may be kept")
        writing = os.open(target, _WRITE, 0o600)
        try:
            os.ftruncate(writing, found.st_size)
            _copy_data(reading, writing, found.st_size)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    return taken


def _copy_data(reading: int, writing: int, size: int) -> None:
    at = 0
    while at < size:
        try:
            at = os.lseek(reading, at, os.SEEK_DATA)
        except OSError:
            # Only a hole is left.
            return
        end = os.lseek(reading, at, os.SEEK_HOLE)
        os.lseek(writing, at, os.SEEK_SET)
        while at < end:
            data = os.pread(reading, min(_PIECE_BYTES, end - at), at)
            if not data:
                return
            write_all(writing, data)
            at += len(data)
