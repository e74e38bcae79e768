"""What a core is told once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prism_control.raft.types import MemberId


class RandomSource(Protocol):
    """The part of `random.Random` that the core needs; injected, so that a seed decides all."""

    def randrange(self, start: int, stop: int, /) -> int:
        """Return an integer N with start <= N < stop."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on everything that could grow. One entry may pass a bound alone, or it never could."""

    #: Encoded entries in one AppendRequest.
    append_bytes_max: int = 1 << 20
    #: AppendRequests to one follower that are not answered yet, and their entries.
    inflight_messages_max: int = 64
    inflight_bytes_max: int = 8 << 20
    #: Data of a leader's entries that are not committed yet; past it proposals are dropped.
    uncommitted_bytes_max: int = 64 << 20
    #: Encoded entries in `Ready.committed`.
    committed_bytes_max: int = 16 << 20
    #: A learner that lacks no more entries than this has caught up.
    promotion_lag_entries_max: int = 64
    #: Reads that wait on one member; past it they are dropped.
    reads_waiting_max: int = 65536


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Identity, timing in ticks, and limits.

    Attributes:
        id: Of this member, not 0.
        election_ticks: The least election timeout; each is drawn from [e, 2e) (§5.2, §9.3).
        heartbeat_ticks: Between heartbeats of a leader; a small part of `election_ticks`.
        limits: Bounds.
        promotes_learners: Whether a leader makes voters of learners that have caught up. If not,
            somebody must propose it.
        command_version: What this member tells leaders that its state machine can apply; the core
            itself knows nothing of commands.
    """

    id: MemberId
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    limits: Limits = field(default_factory=Limits)
    promotes_learners: bool = True
    command_version: int = 0

    def __post_init__(self) -> None:
        if self.id <= 0:
            raise ValueError(f"{self.id} cannot be the id of a member")
        if not 0 < self.heartbeat_ticks < self.election_ticks:
            raise ValueError(
                f"heartbeats every {self.heartbeat_ticks} ticks do not fit into an election "
                f"timeout of {self.election_ticks}"
            )
