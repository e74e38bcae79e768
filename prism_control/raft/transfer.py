"""Handing leadership to another member on purpose (thesis 3.10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft.types import NOBODY, TransferResult

if TYPE_CHECKING:
    from prism_control.raft.replication import Replication
    from prism_control.raft.types import MemberId


class Transfer:
    """One transfer, from the request until it is known who leads next.

    It outlives the leadership, since only the next leader's first message tells how it went.
    """

    __slots__ = ("_is_sent", "_term", "_ticks_left", "to")

    def __init__(self, to: MemberId, term: int, ticks_max: int) -> None:
        #: Who shall lead.
        self.to = to
        #: The term of the leadership that is handed over.
        self._term = term
        #: Proposals are not refused for longer than this (an election timeout).
        self._ticks_left = ticks_max
        #: The other member was told to campaign; once, for it may lose.
        self._is_sent = False

    def is_due(self, replication: Replication, last_index: int) -> bool:
        """Return, once, that the other member has all entries and should campaign now."""
        if self._is_sent or replication.progress[self.to].match < last_index:
            return False
        self._is_sent = True
        return True

    def tick(self) -> TransferResult | None:
        """Let a tick pass; return the result if it has taken too long."""
        self._ticks_left -= 1
        return TransferResult(self.to, succeeded=False) if self._ticks_left <= 0 else None

    def led_by(self, leader: MemberId, term: int) -> TransferResult | None:
        """Return the result if a leader of a later term is known."""
        if leader == NOBODY or term == self._term:
            return None
        return TransferResult(self.to, succeeded=leader == self.to)
