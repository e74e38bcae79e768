"""What a leader knows of one follower (`nextIndex` and `matchIndex` of figure 2, and more).

A follower is in one of three states. PROBE: where its log agrees is not known, so one
message is sent and answered before the next. REPLICATE: messages are sent ahead of the answers,
within a window (pipelining, thesis 10.2.1). SNAPSHOT: it needs entries that are compacted away,
so nothing but heartbeats is sent until the transport reports.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

from prism_control.raft.errors import InvariantError

SILENT_FOR_EVER_TICKS: Final = 1 << 62


class ProgressState(enum.IntEnum):
    """How a leader sends to a follower."""

    PROBE = 0
    REPLICATE = 1
    SNAPSHOT = 2


class Progress:
    """One follower, or the leader itself, as the leader sees it."""

    __slots__ = (
        "_inflight",
        "command_version",
        "commit_sent",
        "inflight_bytes",
        "match",
        "next",
        "pending_snapshot",
        "probe_sent",
        "read_round",
        "recent_active",
        "retry_due",
        "silent_ticks",
        "state",
    )

    def __init__(self, next_index: int) -> None:
        self.state = ProgressState.PROBE
        #: The follower's log is durable and equal to the leader's up to here; never goes down.
        self.match = 0
        #: First entry of the next message; next > match.
        self.next = next_index
        #: PROBE only: a message is under way, send no other before an answer or a heartbeat's.
        self.probe_sent = False
        #: SNAPSHOT only: index of the snapshot under way, else 0.
        self.pending_snapshot = 0
        #: Heard of since the last look (check-quorum, thesis 6.2).
        self.recent_active = False
        #: Ticks since it was heard of; a member that never was has been silent for ever.
        self.silent_ticks = SILENT_FOR_EVER_TICKS
        #: A heartbeat of the clock (not of a read) is out; its answer allows one retry.
        self.retry_due = False
        #: The follower has been told that everything up to here is committed.
        self.commit_sent = 0
        #: Newest round of reads that the follower has confirmed (thesis 6.4).
        self.read_round = 0
        #: Highest version of commands that it said it can apply, in the present term; None: it was
        #: not heard yet; 0: its release does not tell.
        self.command_version: int | None = None
        #: REPLICATE only: (last index, bytes) of each message not answered yet, ascending.
        self._inflight: deque[tuple[int, int]] = deque()
        #: Sum of the bytes in `_inflight`.
        self.inflight_bytes = 0

    @property
    def inflight_messages(self) -> int:
        """How many messages are not answered yet."""
        return len(self._inflight)

    def heard(self) -> None:
        """Take note of a sign of life."""
        self.recent_active = True
        self.silent_ticks = 0

    def may_send(self, messages_max: int, bytes_max: int) -> bool:
        """Whether the state and the window allow another message with entries."""
        if self.state is ProgressState.REPLICATE:
            return len(self._inflight) < messages_max and self.inflight_bytes < bytes_max
        return self.state is ProgressState.PROBE and not self.probe_sent

    def sent(self, last_index: int, size_bytes: int) -> None:
        """Take note of a message whose last entry is at `last_index`."""
        if self.state is ProgressState.REPLICATE:
            if size_bytes:
                self.next = last_index + 1
                self._inflight.append((last_index, size_bytes))
                self.inflight_bytes += size_bytes
        else:
            self.probe_sent = True

    def accepted(self, index: int) -> bool:
        """Take note that the follower's log matches up to `index`.

        Returns:
            Whether `match` has gone up; an old or repeated answer changes nothing.
        """
        inflight = self._inflight
        while inflight and inflight[0][0] <= index:
            self.inflight_bytes -= inflight.popleft()[1]
        self.next = max(self.next, index + 1)
        if index <= self.match:
            return False
        self.match = index
        self.probe_sent = False
        return True

    def is_stale_rejection(self, previous_index: int) -> bool:
        """Whether a rejection answers a message that no longer matters."""
        if self.state is ProgressState.REPLICATE:
            return previous_index <= self.match
        return self.state is ProgressState.SNAPSHOT or self.next - 1 != previous_index

    def take_retry(self) -> bool:
        """Return whether a message should be tried again, now that the follower is there.

        Lost messages are found in this way, at most once per heartbeat of the clock however
        many heartbeats the reads cause.
        """
        due, self.retry_due = self.retry_due, False
        if due:
            self.probe_sent = False
        return due and self.state is ProgressState.REPLICATE

    def become_probe(self, next_index: int) -> None:
        """Find out anew where the logs agree, beginning with `next_index`."""
        self._leave()
        self.state = ProgressState.PROBE
        self.next = max(next_index, self.match + 1)

    def become_replicate(self) -> None:
        """Send ahead of the answers: the logs agree up to `match`."""
        self._leave()
        self.state = ProgressState.REPLICATE
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        """Wait for a snapshot up to `index`."""
        self._leave()
        self.state = ProgressState.SNAPSHOT
        self.pending_snapshot = index

    def check(self, last_index: int) -> None:
        """Verify the invariants of the fields.

        Raises:
            InvariantError: One of them is broken.
        """
        indexes = [index for index, _ in self._inflight]
        sound = (
            0 <= self.match < self.next <= last_index + 1
            and indexes == sorted(indexes)
            and self.inflight_bytes == sum(size for _, size in self._inflight)
            and (self.state is ProgressState.REPLICATE or not self._inflight)
            and (self.state is ProgressState.SNAPSHOT) == (self.pending_snapshot > 0)
            and (self.state is ProgressState.PROBE or not self.probe_sent)
        )
        if not sound:
            raise InvariantError(f"progress is broken: {self!r}")

    def __repr__(self) -> str:
        return (
            f"Progress({self.state.name}, match={self.match}, next={self.next}, "
            f"inflight={list(self._inflight)}, snapshot={self.pending_snapshot})"
        )

    def _leave(self) -> None:
        self._inflight.clear()
        self.inflight_bytes = 0
        self.probe_sent = False
        self.pending_snapshot = 0
