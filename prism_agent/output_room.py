"""Where a sandbox's output is kept, and how much of it.

On the node's disk, where only its supervisor can write it, which is trusted to keep to what it was
given. Where that supervisor runs on a kernel of the sandbox's own (gVisor), whoever takes that
kernel over may write to whatever it has open. So output is then kept in memory that is the
sandbox's own and bounded: more than that cannot be written, and none of it is the node's disk.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.supervisor.protocol import RING_BYTES_MIN, RING_HEADER_BYTES
from prism_common.errors import QueueFullError
from prism_common.limits import MIB

#: In the directory of a sandbox's execs: a file system of its own, if its output is kept in memory.
MEMORY: Final = "memory"
#: One exec more than can ever run at once has room for all of its output in it.
_MEMORY_BYTES_MAX: Final = 4096 * MIB
#: Of what is left, the part that the next exec is given: the first ones get much, none gets all.
_PART: Final = 16


def memory_bytes(asked: sandbox_pb2.Limits) -> int:
    """Return the size of that file system. Its pages are memory of the sandbox."""
    return min(asked.memory_bytes // 4, _MEMORY_BYTES_MAX)


class OutputRoom:
    """Of one sandbox.

    Args:
        execs: The directory of its execs.
    """

    def __init__(self, execs: Path) -> None:
        self._disk = execs
        self._memory = execs / MEMORY

    @property
    def directory(self) -> Path:
        """Rings and inputs of its execs are here."""
        return self._memory if self._memory.is_dir() else self._disk

    def _total_bytes(self) -> int | None:
        """Return how much there is; None: it is the node's disk."""
        try:
            found = os.statvfs(self._memory)
        except FileNotFoundError:
            return None
        return found.f_blocks * found.f_frsize

    def kept_bytes_max(self) -> int:
        """Return what ended execs may keep together."""
        total = self._total_bytes()
        kept = limits.EXECS_BYTES_MAX
        return kept if total is None else min(kept, total // 4)

    def ring_bytes(self, running: Iterable[int]) -> int:
        """Return how much output the next exec may have, beside so much of each that runs.

        All of them together fit, and beside them what is kept, and some specs: none ever waits for
        room that another has.

        Raises:
            QueueFullError: There is no room for another.
        """
        total = self._total_bytes()
        if total is None:
            return limits.RING_BYTES
        left = total - total // 4 - total // 8 - sum(each + RING_HEADER_BYTES for each in running)
        if left < RING_BYTES_MIN + RING_HEADER_BYTES:
            raise QueueFullError(
                f"output of those execs that run may take all of its {total >> 20} MiB; a sandbox "
                "with more limits.memory_bytes has more",
                retry_after_s=1.0,
            )
        part = left // _PART // RING_HEADER_BYTES * RING_HEADER_BYTES
        return min(max(part, RING_BYTES_MIN), limits.RING_BYTES)
