"""Linearizable reads without a log entry (ReadIndex, thesis 6.4).

A leader notes its commit index, confirms with one round of heartbeats that it still leads, and
releases all reads that waited for that round. Rounds are numbered; who answers round
n answers all before it, so the confirmed round is found like a commit index, and
heartbeats that a slow link replaces by newer ones are not missed. There are no lease reads: they
would need a bound on clock drift.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prism_control.raft.types import MemberId


class WaitingRead(NamedTuple):
    """One read, and the member that asked."""

    requester: MemberId
    context: int


class _Round(NamedTuple):
    number: int
    commit: int
    reads: list[WaitingRead]


class LeaderReads:
    """Reads that a leader has not confirmed yet; lives as long as its leadership."""

    __slots__ = ("_rounds", "_waiting", "length", "number")

    def __init__(self) -> None:
        #: Reads that no round has been started for.
        self._waiting: list[WaitingRead] = []
        #: Rounds under way, by ascending number and commit index.
        self._rounds: deque[_Round] = deque()
        #: Number of the newest round; 0 before the first.
        self.number = 0
        #: How many reads wait, with or without a round.
        self.length = 0

    def add(self, requester: MemberId, context: int) -> None:
        """Let a read wait for the next round."""
        self._waiting.append(WaitingRead(requester, context))
        self.length += 1

    def start_round(self, commit: int) -> bool:
        """Start a round for all reads that have none; return whether there are any.

        Args:
            commit: The commit index. It includes everything acknowledged before these reads
                were asked, provided that an entry of the leader's own term is committed.
        """
        if not self._waiting:
            return False
        self.number += 1
        self._rounds.append(_Round(self.number, commit, self._waiting))
        self._waiting = []
        return True

    def confirm(self, number: int) -> list[tuple[WaitingRead, int]]:
        """Return the reads of all rounds up to `number`, each with its index."""
        released: list[tuple[WaitingRead, int]] = []
        while self._rounds and self._rounds[0].number <= number:
            confirmed = self._rounds.popleft()
            released.extend((read, confirmed.commit) for read in confirmed.reads)
        self.length -= len(released)
        return released

    def contexts_of(self, requester: MemberId) -> list[int]:
        """Return the contexts of all waiting reads of one member, in the order asked."""
        reads = [read for started in self._rounds for read in started.reads] + self._waiting
        return [read.context for read in reads if read.requester == requester]


class ForwardedReads:
    """Reads that a follower has sent to its leader and that are not answered yet."""

    __slots__ = ("_asked_tick", "_tick", "_ticks_max")

    def __init__(self, ticks_max: int) -> None:
        self._ticks_max = ticks_max
        self._tick = 0
        #: Context to the tick at which it was asked; ascending.
        self._asked_tick: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._asked_tick)

    def add(self, context: int) -> None:
        """Take note of a read that was sent."""
        self._asked_tick[context] = self._tick

    def answered(self, context: int) -> bool:
        """Return whether the read was waiting; it no longer is. A repeated answer is not."""
        return self._asked_tick.pop(context, None) is not None

    def tick(self) -> list[int]:
        """Return, and forget, what has waited for too long: request or answer was lost."""
        self._tick += 1
        expired = []
        for context, tick in self._asked_tick.items():
            if self._tick - tick < self._ticks_max:
                break
            expired.append(context)
        for context in expired:
            del self._asked_tick[context]
        return expired

    def drop(self) -> list[int]:
        """Return, and forget, everything: the leader is another or unknown."""
        contexts = list(self._asked_tick)
        self._asked_tick.clear()
        return contexts
