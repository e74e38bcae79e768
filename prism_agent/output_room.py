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
from prism_agent.output_move import move_rings
from prism_agent.runtime import host
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
        #: Records of its execs are here.
        self.records = execs
        self._memory = execs / MEMORY
        #: Rings and inputs of its execs are here.
        self.directory = execs
        self.look()

    def look(self) -> None:
        """See where they are to be, which a start decides; those that there are stay there."""
        self.directory = self._memory if self._memory.is_dir() else self.records

    def ring(self, number: int) -> Path:
        """Return where the output of an exec is: what has left memory once does not come back."""
        on_disk = self.records / f"{number}.ring"
        if not self.in_memory or on_disk.exists():
            return on_disk
        return self._memory / on_disk.name

    def leave_memory(self) -> None:
        """Keep on the disk what fits there, and give the memory back; no process of it may run.

        Raises:
            OSError: The memory is still taken.
        """
        move_rings(self._memory, self.records)
        host.unmount(self._memory)
        self._memory.rmdir()
        self.look()

    @property
    def in_memory(self) -> bool:
        """It is bounded, so what is given up must be gone before there is more."""
        return self.directory is self._memory

    def _total_bytes(self) -> int | None:
        """Return how much there is; None: it is the node's disk."""
        if not self.in_memory:
            return None
        found = os.statvfs(self._memory)
        return found.f_blocks * found.f_frsize

    def kept_bytes_max(self) -> int:
        """Return what ended execs may keep together."""
        total = self._total_bytes()
        kept = limits.EXECS_BYTES_MAX
        return kept if total is None else min(kept, total // 4)

    def ring_bytes(self, written: Iterable[int]) -> int:
        """Return how much output the next exec may have, beside so much of each that may grow.

        All of them together fit, and beside them what is kept, and some specs: none ever waits for
        room that another has.

        Raises:
            QueueFullError: There is no room for another.
        """
        total = self._total_bytes()
        if total is None:
            return limits.RING_BYTES
        left = total - total // 4 - total // 8 - sum(each + RING_HEADER_BYTES for each in written)
        if left < RING_BYTES_MIN + RING_HEADER_BYTES:
            raise QueueFullError(
                f"output of those execs that run, or have left something running, may take all of "
                f"its {total >> 20} MiB; a sandbox with more limits.memory_bytes has more",
                retry_after_s=1.0,
            )
        part = left // _PART // RING_HEADER_BYTES * RING_HEADER_BYTES
        return min(max(part, RING_BYTES_MIN), limits.RING_BYTES)
