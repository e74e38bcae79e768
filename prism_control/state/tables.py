"""The rows of the state with their indexes, and the only functions that write them.

Indexes are derived: a member that restores a snapshot rebuilds them, in whatever order. Therefore
nothing that decides may depend on the order of a set: `placed_on` sorts.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from msgspec.structs import replace

from prism_control.state.commands import VERSION_UNTOLD
from prism_control.state.events import (
    Event,
    EventRing,
    NodeChanged,
    NodeRemoved,
    SandboxChanged,
)
from prism_control.state.model import (
    HOLDS_ALL,
    Amounts,
    NodeRow,
    SandboxRow,
    SandboxState,
    Spec,
    held_by,
    holds_all,
    is_placed,
)
from prism_control.state.prefixes import PrefixIndex
from prism_control.state.results import RequestRow

#: Request ids are remembered this long at least, …
REQUEST_KEPT_MS: Final = 24 * 3600 * 1000
#: … as long as there are no more than this: about 600 bytes each. Past it the oldest go early, for
#: a retry comes after seconds, and refusing all creates for a day would be worse.
REQUESTS_MAX: Final = 1_000_000
#: A DELETED sandbox still says why it is gone for this long, …
TOMBSTONE_KEPT_MS: Final = 3600 * 1000
#: … as long as there are no more than this.
TOMBSTONES_MAX: Final = 20_000
#: Rows that one page looks at: some milliseconds, in which nobody else is served.
PASSED_OVER_MAX: Final = 5000
#: They are looked at in pieces of at least so many.
_LOOKED_AT_MIN: Final = 64
#: Specs are mostly equal: each is kept once. Past this many different ones sharing begins anew.
_SPECS_MAX: Final = 4096
#: Holes in the list of ids are closed once they are half of it, and more than this.
_HOLES_MIN: Final = 1024


class Tables:
    """Rows and indexes. Mutable, and mutated only through `put_…`, `remember` and `compact`."""

    def __init__(
        self, revision: int = 0, now_ms: int = 0, command_version: int = VERSION_UNTOLD
    ) -> None:
        # Durable: what a snapshot holds.
        #: Number of changes so far; each change takes the next one.
        self.revision = revision
        #: Highest time that a leader has told.
        self.now_ms = now_ms
        #: Commands up to this version may be proposed; it never goes down.
        self.command_version = command_version
        #: By id, in order of creation.
        self.sandboxes: dict[str, SandboxRow] = {}
        #: By id.
        self.nodes: dict[str, NodeRow] = {}
        #: By request id, in the order in which they were answered.
        self.requests: dict[str, RequestRow] = {}

        # Derived from the rows.
        #: Id of each sandbox that is not DELETED, by name.
        self.names: dict[str, str] = {}
        #: Names and ids of sandboxes that are not DELETED, and of some that are.
        self.prefixes = PrefixIndex()
        #: Ids of PENDING sandboxes.
        self.pending: set[str] = set()
        #: Ids of the sandboxes that have work for a node (`is_placed`).
        self.by_node: dict[str, set[str]] = {}
        #: Sum of `held_by` of each node's sandboxes: cpu, memory, disk, slots.
        self.held: dict[str, list[int]] = {}
        #: Id of each node, by name: no two have the same.
        self.node_names: dict[str, str] = {}
        #: Number of sandboxes by state.
        self.counts: list[int] = [0] * (max(SandboxState) + 1)
        #: Ids of DELETED sandboxes in the order in which they came to be so.
        self.tombstones: deque[str] = deque()
        #: Keys of `requests` in order; popping a dict's front is slow.
        self.request_order: deque[str] = deque()
        #: Creation revisions, ascending, and the ids beside them; ids of dropped rows may be left.
        self._order_revisions = array("q")
        self._order_ids: list[str] = []
        self._specs: dict[Spec, Spec] = {}

        # Volatile.
        self.ring = EventRing(revision)
        #: Events of the apply that is under way.
        self.events: list[Event] = []

    # ── Reading ──────────────────────────────────────────────────────────────────────────────

    def sandbox(self, reference: str) -> SandboxRow | None:
        """Return a sandbox by id, or by the exact name of one that is not DELETED."""
        row = self.sandboxes.get(reference)
        if row is None:
            owner = self.names.get(reference)
            row = None if owner is None else self.sandboxes[owner]
        return row

    def owners(self, key: str) -> set[str]:
        """Return the ids of sandboxes that are not DELETED and have this name or id."""
        owner = self.names.get(key)
        owners = set() if owner is None else {owner}
        row = self.sandboxes.get(key)
        if row is not None and row.state is not SandboxState.DELETED:
            owners.add(key)
        return owners

    def _lives(self, key: str) -> bool:
        """Return whether this is the name or the id of a sandbox that is not DELETED."""
        if key in self.names:
            return True
        row = self.sandboxes.get(key)
        return row is not None and row.state is not SandboxState.DELETED

    def node(self, reference: str) -> NodeRow | None:
        """Return a node by id or exact name."""
        row = self.nodes.get(reference)
        if row is None:
            owner = self.node_names.get(reference)
            row = None if owner is None else self.nodes[owner]
        return row

    def placed_on(self, node_id: str) -> list[SandboxRow]:
        """Return the sandboxes that a node has work with, in order of creation."""
        rows = [self.sandboxes[key] for key in self.by_node.get(node_id, ())]
        rows.sort(key=_creation)
        return rows

    def allocated(self, node_id: str) -> Amounts:
        """Return what is promised to a node's sandboxes."""
        return Amounts(*self.held.get(node_id, ()))

    def page(
        self,
        after: int,
        limit: int,
        keep: Callable[[SandboxRow], bool] | None,
        *,
        tombstones: bool,
    ) -> tuple[list[SandboxRow], int]:
        """Return up to `limit` rows created after revision `after`, and where the next page begins.

        The cost is that of the rows passed over, not of the table, and bounded: where `keep` keeps
        few, a page has fewer than `limit`, or none. The second value is 0 on the last page.
        """
        found: list[SandboxRow] = []
        get, deleted = self.sandboxes.get, SandboxState.DELETED
        begin = bisect_right(self._order_revisions, after)
        last = begin + PASSED_OVER_MAX
        while begin < min(last, len(self._order_ids)):
            # Some at once: a list of all is a hundred thousand rows.
            end = min(begin + max(limit + 1 - len(found), _LOOKED_AT_MIN), last)
            rows = [
                row
                for revision, row in zip(
                    self._order_revisions[begin:end],
                    map(get, self._order_ids[begin:end]),
                    strict=True,
                )
                if row is not None
                and row.create_revision == revision
                and (row.state is not deleted or tombstones)
            ]
            found += rows if keep is None else filter(keep, rows)
            begin = end
            if len(found) > limit:
                return found[:limit], found[limit - 1].create_revision
        if last < len(self._order_ids):
            return found, self._order_revisions[last - 1]
        return found, 0

    # ── Writing ──────────────────────────────────────────────────────────────────────────────

    def intern(self, spec: Spec) -> Spec:
        """Return an equal spec that other rows share."""
        shared = self._specs.get(spec)
        if shared is None:
            if len(self._specs) >= _SPECS_MAX:
                self._specs.clear()
            self._specs[spec] = shared = spec
        return shared

    def create_sandbox(self, row: SandboxRow) -> SandboxRow:
        """Add a row whose revision and create_revision are the next revision."""
        self._emit(SandboxChanged(row, None))
        self._index_order(row)
        self.sandboxes[row.id] = row
        self._index(row)
        return row

    def put_sandbox(self, row: SandboxRow, **changes: object) -> SandboxRow:
        """Replace a row by itself with changes, and give it the next revision."""
        return self.succeed_sandbox(row, replace(row, revision=self.revision + 1, **changes))

    def succeed_sandbox(self, row: SandboxRow, fresh: SandboxRow) -> SandboxRow:
        """Replace a row by one that has the next revision.

        As `put_sandbox`, for what happens to every sandbox: names of changes that are handed on
        cost several times what `replace` does.
        """
        self._emit(SandboxChanged(fresh, row))
        self.sandboxes[fresh.id] = fresh
        self._reindex(row, fresh)
        return fresh

    def put_node(self, row: NodeRow) -> NodeRow:
        """Add or replace a node; the caller has made sure that its name is free."""
        previous = self.nodes.get(row.id)
        fresh = replace(row, revision=self.revision + 1)
        if previous is not None:
            del self.node_names[previous.name]
        self._emit(NodeChanged(fresh, previous))
        self.nodes[fresh.id] = fresh
        self.node_names[fresh.name] = fresh.id
        return fresh

    def drop_node(self, row: NodeRow) -> None:
        """Forget a node. Sandboxes that name it keep its name."""
        self._emit(NodeRemoved(row, self.revision + 1))
        del self.nodes[row.id]
        del self.node_names[row.name]

    def remember(self, request: RequestRow) -> None:
        """Keep the answer to a request id that is not known yet."""
        self.requests[request.request_id] = request
        self.request_order.append(request.request_id)

    def compact(self, budget: int) -> None:
        """Drop up to `budget` each of request ids and tombstones that are past their bounds."""
        horizon = self.now_ms - REQUEST_KEPT_MS
        for _ in range(min(budget, len(self.request_order))):
            key = self.request_order[0]
            if self.requests[key].at_ms > horizon and len(self.requests) <= REQUESTS_MAX:
                break
            self.request_order.popleft()
            del self.requests[key]
        horizon = self.now_ms - TOMBSTONE_KEPT_MS
        for _ in range(min(budget, len(self.tombstones))):
            key = self.tombstones[0]
            if self.sandboxes[key].end_ms > horizon and len(self.tombstones) <= TOMBSTONES_MAX:
                break
            self.tombstones.popleft()
            del self.sandboxes[key]
            self.counts[SandboxState.DELETED] -= 1
        self._close_holes()

    def load(
        self,
        sandboxes: Iterable[SandboxRow],
        nodes: Iterable[NodeRow],
        requests: Iterable[RequestRow],
    ) -> None:
        """Fill empty tables from a snapshot, whose rows share equal specs already."""
        for row in sandboxes:
            self.intern(row.spec)
            self.sandboxes[row.id] = row
            self._index_order(row)
            self._index(row)
        dead = [row for row in self.sandboxes.values() if row.state is SandboxState.DELETED]
        dead.sort(key=_change)
        self.tombstones.extend(row.id for row in dead)
        for node in nodes:
            self.nodes[node.id] = node
            self.node_names[node.name] = node.id
        for request in requests:
            self.remember(request)

    # ── Indexes ──────────────────────────────────────────────────────────────────────────────

    def _emit(self, event: Event) -> None:
        self.ring.append(event)
        self.events.append(event)
        self.revision += 1

    def _index_order(self, row: SandboxRow) -> None:
        self._order_revisions.append(row.create_revision)
        self._order_ids.append(row.id)

    def _close_holes(self) -> None:
        holes = len(self._order_ids) - len(self.sandboxes)
        if holes > _HOLES_MIN and holes > len(self.sandboxes):
            rows = self.sandboxes.values()
            self._order_revisions = array("q", (row.create_revision for row in rows))
            self._order_ids = list(self.sandboxes)

    def _index(self, row: SandboxRow) -> None:
        state = row.state
        self.counts[state] += 1
        if state is not SandboxState.DELETED:
            self.names[row.name] = row.id
            self.prefixes.add(row.name, row.id)
        if state is SandboxState.PENDING:
            self.pending.add(row.id)
        elif is_placed(row):
            self._put_on(row.node_id, row)

    def _reindex(self, row: SandboxRow, fresh: SandboxRow) -> None:
        """Bring the indexes from a row to what replaces it: most changes touch only the counts."""
        before, state = row.state, fresh.state
        self.counts[before] -= 1
        self.counts[state] += 1
        if (
            HOLDS_ALL[before]
            and holds_all(fresh)
            and row.node_id == fresh.node_id
            and row.spec is fresh.spec
        ):
            return  # most changes: what its node holds stays as it is
        if before is not state:
            self._reindex_state(row, before, state)
        was_on = row.node_id if is_placed(row) else ""
        is_on = fresh.node_id if is_placed(fresh) else ""
        if was_on != is_on:
            if was_on:
                members = self.by_node[was_on]
                members.remove(row.id)
                if members:
                    add(self.held[was_on], held_by(row), -1)
                else:
                    del self.by_node[was_on], self.held[was_on]
            if is_on:
                self._put_on(is_on, fresh)
        elif is_on:
            held, holds = held_by(row), held_by(fresh)
            if held != holds:
                add(self.held[is_on], held, -1)
                add(self.held[is_on], holds, 1)

    def _reindex_state(self, row: SandboxRow, before: SandboxState, state: SandboxState) -> None:
        if before is SandboxState.PENDING:
            self.pending.remove(row.id)
            if not self.pending:
                self.pending = set()  # a set keeps the memory of its largest size
        elif state is SandboxState.PENDING:
            self.pending.add(row.id)
        if state is SandboxState.DELETED:
            del self.names[row.name]
            self.prefixes.remove(2, self._lives)
            self.tombstones.append(row.id)

    def _put_on(self, node_id: str, row: SandboxRow) -> None:
        self.by_node.setdefault(node_id, set()).add(row.id)
        add(self.held.setdefault(node_id, [0, 0, 0, 0]), held_by(row), 1)


def add(total: list[int], amounts: Amounts, sign: int) -> None:
    """Add to a sum of (cpu, memory, disk, slots), or subtract with sign −1."""
    total[0] += sign * amounts.cpu_millicores
    total[1] += sign * amounts.memory_bytes
    total[2] += sign * amounts.disk_bytes
    total[3] += sign * amounts.slots


def _creation(row: SandboxRow) -> int:
    return row.create_revision


def _change(row: SandboxRow) -> int:
    return row.revision
