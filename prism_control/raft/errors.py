"""What the Raft core raises; plain exceptions, since the core knows nothing of RPCs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prism_control.raft.types import MemberId


class NotLeaderError(Exception):
    """Nothing was proposed: this member does not lead.

    Attributes:
        leader: Who leads as far as this member knows; 0 if unknown.
    """

    def __init__(self, leader: MemberId) -> None:
        super().__init__(f"not the leader; the leader is {leader or 'unknown'}")
        self.leader = leader


class ProposalDroppedError(Exception):
    """Nothing was proposed: too much is waiting to be committed. Try again later."""


class LeavingError(ProposalDroppedError):
    """Nothing was proposed: this leader hands over to another. Try again shortly."""


class InvalidRequestError(Exception):
    """Nothing was done: it makes no sense in the present configuration."""


class NotReadyError(Exception):
    """Nothing was done: it cannot be done now. Try again later; the message says why."""


class CorruptEntryError(Exception):
    """The bytes of an entry, or of a configuration, are not what was written.

    Attributes:
        index: Index of the entry as far as it is known; 0 if the header is unreadable.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"entry {index} is corrupt: {reason}")
        self.index = index


class InvariantError(Exception):
    """Something that Raft rules out has happened; the member must stop and stay down."""
