"""Which sandboxes' time to live is over, for the leader to propose their removal.

Agents end what they hold by themselves, to the second and with the control plane away. The leader
ends what no agent holds (PENDING, LOST), and after a delay also what an agent should have ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Final

from prism_control.state.commands import ExpireSandboxes
from prism_control.state.events import Event, SandboxChanged
from prism_control.state.model import SandboxRow, SandboxState, is_placed

#: The agent ends its sandboxes first; the leader does so if nothing was heard of it for this time.
_AGENT_DELAY_MS: Final = 10_000
#: What was proposed is proposed again after this time if it is still there.
_RETRY_MS: Final = 5000
#: Sandboxes of one command.
EXPIRE_MAX: Final = 1000

_ENDING: Final = frozenset({SandboxState.DELETING, SandboxState.DELETED})


class Deadlines:
    """Sandboxes ordered by when the leader shall remove them. Made anew by each leader."""

    def __init__(self, rows: Iterable[SandboxRow]) -> None:
        #: When each sandbox with a TTL is due, by wall time; the truth.
        self._due_ms: dict[str, int] = {}
        #: (due, id), ascending; entries that differ from `_due_ms` are dead.
        self._heap: list[tuple[int, str]] = []
        for row in rows:
            self._put(row)

    def __len__(self) -> int:
        return len(self._due_ms)

    def observe(self, events: Sequence[Event]) -> None:
        """Take over committed changes of sandboxes."""
        for event in events:
            if isinstance(event, SandboxChanged) and event.row.expire_ms:
                self._put(event.row)
        if len(self._heap) > 2 * len(self._due_ms) + EXPIRE_MAX:
            self._heap = [(due_ms, key) for key, due_ms in self._due_ms.items()]
            heapq.heapify(self._heap)

    def due(self, now_ms: int, limit: int = EXPIRE_MAX) -> ExpireSandboxes | None:
        """Return the removal of up to `limit` sandboxes that are due; None: there are none.

        They are due again after a few seconds, unless events say that they are gone.
        """
        found: list[str] = []
        while self._heap and self._heap[0][0] <= now_ms and len(found) < limit:
            due_ms, key = heapq.heappop(self._heap)
            if self._due_ms.get(key) == due_ms:
                found.append(key)
        for key in found:
            self._set(key, now_ms + _RETRY_MS)
        return ExpireSandboxes(tuple(found)) if found else None

    def next_ms(self) -> int | None:
        """Return when something may be due next, by wall time; None: nothing has a TTL."""
        return self._heap[0][0] if self._heap else None

    def _put(self, row: SandboxRow) -> None:
        if row.state in _ENDING or not row.expire_ms:
            self._due_ms.pop(row.id, None)
        else:
            self._set(row.id, row.expire_ms + (_AGENT_DELAY_MS if is_placed(row) else 0))

    def _set(self, key: str, due_ms: int) -> None:
        if self._due_ms.get(key) != due_ms:
            self._due_ms[key] = due_ms
            heapq.heappush(self._heap, (due_ms, key))
