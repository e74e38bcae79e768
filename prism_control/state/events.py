"""What has changed, in the past tense, and the bounded memory of it that watches resume from."""

from __future__ import annotations

from typing import Final, TypeAlias

from msgspec import Struct

from prism_common.errors import CompactedError
from prism_control.state.model import NodeRow, SandboxRow, SandboxState

#: Changes that are kept, about 300 bytes each: a watcher may be behind by most of a burst of 10,000
#: sandboxes, which is four changes each, or by minutes of usual work.
EVENTS_MAX: Final = 32_768


class SandboxChanged(Struct, frozen=True, gc=False):
    """A sandbox is new or another.

    Attributes:
        previous: The row before; None: it was created.
    """

    row: SandboxRow
    previous: SandboxRow | None

    @property
    def revision(self) -> int:
        """The state's revision with this change; each event has its own."""
        return self.row.revision

    @property
    def previous_state(self) -> SandboxState | None:
        """The state before; None: it was created."""
        return None if self.previous is None else self.previous.state


class NodeChanged(Struct, frozen=True, gc=False):
    """A node is new or another.

    Attributes:
        previous: The row before; None: it registered for the first time.
    """

    row: NodeRow
    previous: NodeRow | None

    @property
    def revision(self) -> int:
        """The state's revision with this change."""
        return self.row.revision


class NodeRemoved(Struct, frozen=True, gc=False):
    """A LOST node is forgotten.

    Attributes:
        row: As it was last.
    """

    row: NodeRow
    revision: int


Event: TypeAlias = SandboxChanged | NodeChanged | NodeRemoved


class EventRing:
    """The last changes, one for each revision.

    Not part of the replicated state: a member restored from a snapshot begins with an empty one,
    and says COMPACTED to who asks for more.
    """

    def __init__(self, revision: int, capacity: int = EVENTS_MAX) -> None:
        #: Events of revisions above this one are kept, as far as the capacity goes.
        self._begin = revision
        #: Revision of the newest event; `_begin` while there is none.
        self._end = revision
        #: The event of revision r stands at r modulo the capacity.
        self._slots: list[Event | None] = [None] * capacity

    @property
    def compacted(self) -> int:
        """Highest revision after which not all changes are known any more."""
        return max(self._begin, self._end - len(self._slots))

    def append(self, event: Event) -> None:
        """Add the event of the next revision."""
        revision = event.revision
        if revision != self._end + 1:
            raise ValueError(f"event of revision {revision} after {self._end}")
        self._slots[revision % len(self._slots)] = event
        self._end = revision

    def since(self, revision: int, limit: int) -> list[Event]:
        """Return the first `limit` changes after `revision`; none if it is the newest, or ahead.

        Raises:
            CompactedError: Changes after that revision are not kept any more.
        """
        if revision < self.compacted:
            raise CompactedError(
                f"changes after revision {revision} are not kept any more, only those after "
                f"{self.compacted}: list again, and watch from the list's revision"
            )
        size = len(self._slots)
        last = min(self._end, revision + limit)
        kept = (self._slots[number % size] for number in range(revision + 1, last + 1))
        return [event for event in kept if event is not None]
