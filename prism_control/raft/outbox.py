"""What the core wants done, gathered until the next `Ready`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prism_control.raft.types import Message, ReadState


class Outbox:
    """Messages and answers to reads, in the order in which they came about."""

    __slots__ = ("_after_persist", "_now", "_reads", "_reads_dropped")

    def __init__(self) -> None:
        #: Only what a leader tells: it promises nothing that the leader's own disk must hold.
        self._now: list[Message] = []
        #: Only true once the log and hard state of this turn are durable.
        self._after_persist: list[Message] = []
        self._reads: list[ReadState] = []
        self._reads_dropped: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._now or self._after_persist or self._reads or self._reads_dropped)

    def send_now(self, message: Message) -> None:
        """Send `message` without waiting for the disk (thesis 10.2.1)."""
        self._now.append(message)

    def send_after_persist(self, message: Message) -> None:
        """Send `message` once everything before it is durable (§5.1, figure 2)."""
        self._after_persist.append(message)

    def read(self, state: ReadState) -> None:
        """Release a read."""
        self._reads.append(state)

    def drop_reads(self, contexts: list[int]) -> None:
        """Report reads that will not be answered."""
        self._reads_dropped.extend(contexts)

    def forget_messages(self) -> None:
        """Drop all messages, because the term has risen since they were written.

        An acknowledgement of the old term would be sent after the log may have been cut by the
        leader of the new one: it would promise entries that are no longer there, and the
        old leader could commit them. Any message may be lost, so all of them go.
        """
        self._now.clear()
        self._after_persist.clear()

    def take_messages(
        self, term_is_durable: bool
    ) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """Return the messages to send now and those to send after the write.

        Nothing leaves in a term that the disk does not know: after a crash this member could
        campaign in that term again, and lead it twice.
        """
        now, after = tuple(self._now), tuple(self._after_persist)
        self.forget_messages()
        return (now, after) if term_is_durable else ((), now + after)

    def take_reads(self) -> tuple[tuple[ReadState, ...], tuple[int, ...]]:
        """Return the released and the dropped reads."""
        reads, dropped = tuple(self._reads), tuple(self._reads_dropped)
        self._reads.clear()
        self._reads_dropped.clear()
        return reads, dropped
