"""Reads that wait for the leader to confirm itself, and then for the state machine to catch up."""

import asyncio
import heapq
import secrets

from prism_common.errors import StoppingError
from prism_control.raft.core import Core
from prism_control.raft.types import Ready


class ReadBarriers:
    """The reads of one member. One round of heartbeats serves all that wait (thesis §6.4)."""

    def __init__(self) -> None:
        #: Reads that no context was asked for yet.
        self._new: list[asyncio.Future[None]] = []
        #: Context → the reads it stands for.
        self._asked: dict[int, list[asyncio.Future[None]]] = {}
        #: (index, order, reads): confirmed, waiting for the index to be applied.
        self._confirmed: list[tuple[int, int, list[asyncio.Future[None]]]] = []
        self._order = 0
        self._closed = False

    def add(self) -> asyncio.Future[None]:
        """Return what is done once all is applied that was acknowledged before this call.

        Raises:
            StoppingError: The member is stopping.
        """
        if self._closed:
            raise _stopping()
        read = asyncio.get_running_loop().create_future()
        self._new.append(read)
        return read

    def ask(self, core: Core) -> None:
        """Ask for an index for what is new, if there is a leader to ask."""
        # Also without one: callers that have gone must not pile up until there is.
        self._new = [read for read in self._new if not read.done()]
        if self._new and core.leader:
            context = secrets.randbits(63)
            self._asked[context], self._new = self._new, []
            core.read_index(context)

    def answer(self, ready: Ready, applied_index: int) -> None:
        """Release what is confirmed and applied; what was dropped is asked again."""
        for context in ready.reads_dropped:
            self._new.extend(self._asked.pop(context, ()))
        for state in ready.reads:
            reads = self._asked.pop(state.context, None)
            if reads:
                self._order += 1
                heapq.heappush(self._confirmed, (state.index, self._order, reads))
        while self._confirmed and self._confirmed[0][0] <= applied_index:
            for read in heapq.heappop(self._confirmed)[2]:
                if not read.done():
                    read.set_result(None)

    def close(self) -> None:
        """Fail all that wait, and all that come."""
        self._closed = True
        waiting = [self._new, *self._asked.values(), *(reads for _, _, reads in self._confirmed)]
        for read in (read for reads in waiting for read in reads):
            if not read.done():
                read.set_exception(_stopping())


def _stopping() -> StoppingError:
    return StoppingError("this member is stopping; ask another", retry_after_s=0.5)
