"""What the reconciler speaks of: what is wanted of a sandbox, and where it is.

Pure, as the reconciler is.
"""

from dataclasses import dataclass
from enum import StrEnum

import msgspec
from msgspec.structs import replace


class Desired(StrEnum):
    """What the leader wants of a sandbox."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"
    PAUSED = "paused"


class Phase(StrEnum):
    """Where a sandbox is on this node."""

    QUEUED = "queued"
    STARTING = "starting"
    READY = "ready"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


#: An action is under way, and its outcome will be observed.
BUSY = frozenset({Phase.STARTING, Phase.PAUSING, Phase.RESUMING, Phase.STOPPING, Phase.DELETING})
#: It was started, and is not being ended: it has processes, frozen or not.
UP = frozenset({Phase.READY, Phase.PAUSING, Phase.PAUSED, Phase.RESUMING})
#: Processes of the sandbox may run.
LIVE = UP | {Phase.STARTING, Phase.STOPPING}
#: Reason of a sandbox that is not held to new limits yet.
LIMITS_NOT_HELD = "LIMITS_NOT_HELD"
#: Reason of a sandbox that was ended because the leader may have placed it elsewhere.
LEASE_EXPIRED = "LEASE_EXPIRED"


class Assignment(msgspec.Struct, frozen=True):
    """One desired sandbox. `spec` is opaque here; `expire_time_s` 0 means never."""

    sandbox_id: str
    generation: int
    desired: Desired
    start_count: int = 1
    name: str = ""
    spec: bytes = b""
    expire_time_s: float = 0.0
    grace_s: float = 5.0
    reschedules: bool = False

    def deleted(self, grace_s: float) -> "Assignment":
        """Return the same, to be deleted."""
        return replace(self, desired=Desired.DELETED, grace_s=grace_s)

    def stopped(self) -> "Assignment":
        """Return the same, to be stopped at once."""
        return replace(self, desired=Desired.STOPPED, grace_s=0.0)

    def with_spec_of(self, old: "Assignment") -> "Assignment":
        """Return this with what is known: one that does not start anything carries no spec."""
        runs = self.desired is Desired.RUNNING
        return replace(
            self,
            name=old.name,
            spec=old.spec,
            expire_time_s=self.expire_time_s if runs else old.expire_time_s,
            reschedules=old.reschedules,
        )


@dataclass(slots=True)
class Sandbox:
    """One sandbox of this node."""

    # ── durable: kept in the journal ──
    #: The latest assignment that was obeyed.
    wanted: Assignment
    phase: Phase
    #: start_count of the last start that was begun; -1: none was.
    start_count: int = -1
    runtime: str = ""
    reason: str = ""
    message: str = ""

    # ── volatile ──
    #: A higher generation, or a restart, that waits until this one is out of the way.
    successor: Assignment | None = None
    #: The start under way is with limits that are not wanted any more.
    resize_due: bool = False

    @property
    def sandbox_id(self) -> str:
        """Its id."""
        return self.wanted.sandbox_id

    @property
    def generation(self) -> int:
        """Its placement."""
        return self.wanted.generation
