"""When which sandbox may have to go. Pure: the loop has one timer, for the nearest."""

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Deadlines:
    """A heap in which what was set anew stays behind, and is skipped.

    #: Invariant: each entry of `_due` is in the heap.
    """

    _due: dict[str, float] = field(default_factory=dict)
    _heap: list[tuple[float, str]] = field(default_factory=list)

    def set(self, sandbox_id: str, due_s: float | None) -> None:
        """Set when a sandbox is to be looked at; None: never."""
        if due_s is None:
            self._due.pop(sandbox_id, None)
        elif self._due.get(sandbox_id) != due_s:
            self._due[sandbox_id] = due_s
            heapq.heappush(self._heap, (due_s, sandbox_id))
            if len(self._heap) > 2 * len(self._due) + 64:
                self._heap = [(due, each) for each, due in self._due.items()]
                heapq.heapify(self._heap)

    def next(self) -> float | None:
        """Return when the nearest is due; None: there is none."""
        while self._heap:
            due_s, sandbox_id = self._heap[0]
            if self._due.get(sandbox_id) == due_s:
                return due_s
            heapq.heappop(self._heap)
        return None

    def take(self, now_s: float) -> list[str]:
        """Take out those that are due, the longest due first."""
        due: list[str] = []
        while (next_s := self.next()) is not None and next_s <= now_s:
            _, sandbox_id = heapq.heappop(self._heap)
            del self._due[sandbox_id]
            due.append(sandbox_id)
        return due

    def check(self) -> None:
        """Raise if an invariant is broken. For tests: call it after each step."""
        heaped = set(self._heap)
        if any((due_s, each) not in heaped for each, due_s in self._due.items()):
            raise AssertionError("a deadline is not in the heap")
