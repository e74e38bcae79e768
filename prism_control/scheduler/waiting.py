"""What waits for a node: sandboxes by shape, shapes by their first sandbox.

A shape that fits nowhere is parked with all its sandboxes at once, so that a hundred thousand that
cannot be placed cost no more than one. Within a shape, and among the shapes that are not parked,
the order is priority (highest first), then arrival.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import Final

from prism_control.scheduler.placement import Candidates
from prism_control.scheduler.views import Entry, Shape
from prism_control.state.commands import Explanation
from prism_control.state.model import Amounts, PlacementRefusal

#: A parked shape is tried again after the first of these times, then double, up to the second: a
#: safety net only, for every gain of room unparks what it could suit.
_RETRY_MS_MIN: Final = 1000
_RETRY_MS_MAX: Final = 30_000
#: Of a shape whose explanation changes, so many of the first are told again: rows cost revisions.
_TOLD_AGAIN_MAX: Final = 100
#: Dead entries are swept once they are half of a queue, and more than this.
_DEAD_MAX: Final = 64
#: Entries that one search for sandboxes to tell looks at.
_SEARCHED_MAX: Final = 2000


class ShapeQueue:
    """Sandboxes of one shape."""

    __slots__ = (
        "attempts",
        "candidates",
        "candidates_epoch",
        "cursor",
        "entries",
        "explain_ms",
        "explanation",
        "held",
        "members",
        "parked",
        "retry_ms",
        "shape",
        "told",
        "turn",
    )

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        #: What one takes.
        self.held = Amounts(shape.cpu_millicores, shape.memory_bytes, shape.disk_bytes, 1)
        #: Heap; entries of sandboxes that wait no more, or as another generation, are dead.
        self.entries: list[Entry] = []
        #: Number of entries that live.
        self.members = 0
        #: The entry for which it has its turn; None: it has none.
        self.turn: Entry | None = None
        #: Whether it waits for room, or for `retry_ms`, rather than for its turn.
        self.parked = False
        self.attempts = 0
        self.retry_ms = 0
        #: Nodes with room, as of `candidates_epoch`.
        self.candidates: Candidates | None = None
        self.candidates_epoch = -1
        #: Message and refusals, made last; may be made again from `explain_ms` on.
        self.explanation: tuple[str, tuple[PlacementRefusal, ...]] | None = None
        self.explain_ms = 0
        #: Members that know the explanation, or one that was right once.
        self.told: set[str] = set()
        #: Where in `entries` the search for those who do not goes on.
        self.cursor = 0

    def park(self, now_ms: int) -> None:
        """Try it again later."""
        self.parked = True
        self.retry_ms = now_ms + min(_RETRY_MS_MIN << min(self.attempts, 10), _RETRY_MS_MAX)
        self.attempts += 1


class Waiting:
    """All that waits."""

    def __init__(self) -> None:
        #: Shape and generation of each sandbox that waits: the truth.
        self._members: dict[str, tuple[int, ShapeQueue]] = {}
        self._shapes: dict[Shape, ShapeQueue] = {}
        #: Heap of (entry, shape) of each shape's turn; dead where the shape has another turn now.
        self._turns: list[tuple[Entry, Shape]] = []

    def __len__(self) -> int:
        return len(self._members)

    def shapes(self) -> list[ShapeQueue]:
        """Return the shapes that have members."""
        return list(self._shapes.values())

    def holds(self, shape: Shape) -> bool:
        """Whether any of a shape waits."""
        return shape in self._shapes

    def add(self, entry: Entry, shape: Shape) -> None:
        """Let a PENDING sandbox wait; once more does nothing."""
        key = entry[3]
        known = self._members.get(key)
        if known is not None:
            if known[0] == entry[2]:
                return
            self.remove(key)
        queue = self._shapes.get(shape)
        if queue is None:
            queue = self._shapes[shape] = ShapeQueue(shape)
        heapq.heappush(queue.entries, entry)
        queue.members += 1
        self._members[key] = (entry[2], queue)
        if not queue.parked:
            self._give_turn(queue)

    def remove(self, sandbox_id: str) -> None:
        """Let a sandbox wait no more; one that does not wait is no error."""
        known = self._members.pop(sandbox_id, None)
        if known is not None:
            queue = known[1]
            queue.members -= 1
            queue.told.discard(sandbox_id)
            if not queue.members:
                del self._shapes[queue.shape]
            elif len(queue.entries) > 2 * queue.members + _DEAD_MAX:
                queue.entries = [one for one in queue.entries if self._lives(one, queue)]
                heapq.heapify(queue.entries)
                queue.cursor = 0

    def first(self) -> tuple[Entry, ShapeQueue] | None:
        """Return whose turn it is; None: nothing waits that is not parked."""
        while self._turns:
            entry, shape = self._turns[0]
            queue = self._shapes.get(shape)
            if queue is not None and queue.turn is entry:
                self._drop_dead(queue)
                if queue.entries[0] is entry:
                    return entry, queue
                heapq.heappop(self._turns)
                queue.turn = None
                self._give_turn(queue)
            else:
                heapq.heappop(self._turns)
        return None

    def take(self, queue: ShapeQueue) -> None:
        """Take out whom `first` returned."""
        heapq.heappop(self._turns)
        queue.turn = None
        entry = heapq.heappop(queue.entries)
        self.remove(entry[3])
        if queue.members:
            self._drop_dead(queue)
            self._give_turn(queue)

    def park(self, queue: ShapeQueue, now_ms: int) -> None:
        """Take the shape that `first` returned out of turn."""
        heapq.heappop(self._turns)
        queue.turn = None
        queue.park(now_ms)

    def unpark(self, queue: ShapeQueue, *, gained: bool) -> None:
        """Give a parked shape its turn again; with `gained` room its patience begins anew."""
        queue.parked = False
        if gained:
            queue.attempts = 0
        self._drop_dead(queue)
        self._give_turn(queue)

    def set_explanation(
        self, queue: ShapeQueue, message: str, refusals: tuple[PlacementRefusal, ...]
    ) -> None:
        """Say from now on why; where that is news, some of the first are told again."""
        if queue.explanation != (message, refusals):
            queue.explanation = (message, refusals)
            alive = (entry[3] for entry in queue.entries if self._lives(entry, queue))
            queue.told.difference_update(itertools.islice(alive, _TOLD_AGAIN_MAX))
            queue.cursor = 0

    def explain(self, queue: ShapeQueue, limit: int) -> Explanation | None:
        """Return the explanation for up to `limit` members that do not know it yet."""
        if queue.explanation is None or len(queue.told) >= queue.members:
            return None
        found: list[str] = []
        end = min(queue.cursor + _SEARCHED_MAX, len(queue.entries))
        while queue.cursor < end and len(found) < limit:
            entry = queue.entries[queue.cursor]
            queue.cursor += 1
            if entry[3] not in queue.told and self._lives(entry, queue):
                found.append(entry[3])
                queue.told.add(entry[3])
        if queue.cursor >= len(queue.entries):
            queue.cursor = 0
        return Explanation(tuple(found), *queue.explanation) if found else None

    def retell(self, sandbox_ids: Iterable[str]) -> None:
        """Take note that these do not know their explanation after all."""
        for key in sandbox_ids:
            known = self._members.get(key)
            if known is not None:
                known[1].told.discard(key)
                known[1].cursor = 0

    def _lives(self, entry: Entry, queue: ShapeQueue) -> bool:
        known = self._members.get(entry[3])
        return known is not None and known[0] == entry[2] and known[1] is queue

    def _drop_dead(self, queue: ShapeQueue) -> None:
        while queue.entries and not self._lives(queue.entries[0], queue):
            heapq.heappop(queue.entries)

    def _give_turn(self, queue: ShapeQueue) -> None:
        """Let the first entry of a shape that has members stand for it, dead or not."""
        first = queue.entries[0]
        if queue.turn is not first:
            queue.turn = first
            heapq.heappush(self._turns, (first, queue.shape))
