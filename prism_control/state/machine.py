"""The replicated state machine: the same log gives the same state and answers on every member."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from prism_common.errors import AmbiguousError, NotFoundError
from prism_common.limits import PAGE_SIZE_MAX
from prism_control.state import commands, node_handlers, sandbox_handlers
from prism_control.state.commands import Command, Proposal
from prism_control.state.events import Event
from prism_control.state.model import Amounts, NodeRow, SandboxRow, SandboxState
from prism_control.state.results import Created, Ok, RefusalKind, Refused, RequestRow, Result
from prism_control.state.snapshot import SnapshotView, decode_snapshot, encode_snapshot
from prism_control.state.tables import Tables

_Handler = Callable[[Tables, Any], Result]

#: Commands of users: with a request id, a repeat gets the first answer.
_USERS: Final[dict[type, Callable[[Tables, Any], Ok | Refused]]] = {
    commands.CreateSandbox: sandbox_handlers.create,
    commands.DeleteSandbox: sandbox_handlers.delete,
    commands.StopSandbox: sandbox_handlers.stop,
    commands.StartSandbox: sandbox_handlers.start,
    commands.UpdateSandbox: sandbox_handlers.update,
    commands.PauseSandbox: sandbox_handlers.pause,
    commands.ResumeSandbox: sandbox_handlers.resume,
}
#: Commands of the leader: repeating them is harmless.
_LEADERS: Final[dict[type, _Handler]] = {
    commands.AssignSandboxes: sandbox_handlers.assign,
    commands.ExpireSandboxes: sandbox_handlers.expire,
    commands.ReportSandboxes: node_handlers.report,
    commands.RegisterNode: node_handlers.register,
    commands.SuspectNode: node_handlers.suspect,
    commands.LoseNode: node_handlers.lose,
    commands.ReviveNode: node_handlers.revive,
    commands.CordonNode: node_handlers.cordon,
    commands.DrainNode: node_handlers.drain,
    commands.EvictSandboxes: node_handlers.evict,
    commands.MoveSandboxes: node_handlers.move,
    commands.RaiseVersion: node_handlers.raise_version,
}
#: Of those that a prefix fits no more are counted.
_MANY: Final = 1000
#: Rows that any apply may drop beyond those that it adds: old rows go in small slices.
_COMPACT_MIN: Final = 64


class Machine:
    """Sandboxes, nodes and answered request ids.

    Not safe for threads: the loop that applies also reads. `snapshot_view` is what other threads
    may have.
    """

    def __init__(self) -> None:
        #: Index of the last applied entry.
        self.applied_index = 0
        self._tables = Tables()

    # ── Writing ──────────────────────────────────────────────────────────────────────────────

    def apply(
        self, index: int, proposal: Proposal | bytes
    ) -> tuple[tuple[Result, ...], list[Event]]:
        """Apply one entry of the log.

        Args:
            index: Of the entry; above all that were applied before.
            proposal: The entry's data, or what it decodes to.

        Returns:
            One result an item, in order, and what has changed, in order of revision.

        Raises:
            UnknownCommandError: A newer version proposed it. The member must stop; nothing changed.
            MalformedProposalError: The log is damaged. The same.
            ValueError: The index does not advance.
        """
        if isinstance(proposal, bytes):
            proposal = commands.decode(proposal)
        self.advance(index)
        tables = self._tables
        tables.now_ms = max(tables.now_ms, proposal.at_ms)
        events: list[Event] = []
        tables.events = events
        results = tuple([self._answer(item) for item in proposal.items])
        tables.compact(_COMPACT_MIN + 2 * (len(events) + len(results)))
        return results, events

    def advance(self, index: int) -> None:
        """Note that an entry without commands (a leader's first, a configuration) is applied."""
        if index <= self.applied_index:
            raise ValueError(f"entry {index} comes after entry {self.applied_index}")
        self.applied_index = index

    def _answer(self, item: Command) -> Result:
        kind = type(item)
        handler = _USERS.get(kind)
        if handler is None:
            return _LEADERS[kind](self._tables, item)
        request_id: str = item.request_id  # type: ignore[union-attr]  # all of _USERS have one
        if not request_id:
            return handler(self._tables, item)
        fingerprint: bytes = item.fingerprint  # type: ignore[union-attr]
        known = self._tables.requests.get(request_id)
        if known is None:
            result = handler(self._tables, item)
            answer: Ok | Refused | Created = result
            if kind is commands.CreateSandbox and isinstance(result, Ok):
                answer = Created.of(result.sandbox)
            self._tables.remember(RequestRow(request_id, fingerprint, self._tables.now_ms, answer))
            return result
        if known.fingerprint == fingerprint:
            return known.result
        return Refused(
            RefusalKind.REQUEST_ID_REUSED,
            f"the request_id {request_id!r} was used before for another request: make a new one "
            "for each request, and repeat one only with the same contents",
            "request_id",
        )

    # ── Reading ──────────────────────────────────────────────────────────────────────────────

    @property
    def revision(self) -> int:
        """Number of changes so far; the newest event has it."""
        return self._tables.revision

    @property
    def now_ms(self) -> int:
        """Highest time that a leader has told."""
        return self._tables.now_ms

    @property
    def command_version(self) -> int:
        """Commands up to this version may be proposed."""
        return self._tables.command_version

    @property
    def sandbox_count(self) -> int:
        """Sandboxes that are not DELETED."""
        return len(self._tables.names)

    @property
    def counts(self) -> dict[SandboxState, int]:
        """Number of sandboxes by state; tombstones are those that are still kept."""
        return {state: self._tables.counts[state] for state in SandboxState}

    def sandbox(self, reference: str) -> SandboxRow | None:
        """Return a sandbox by id (also a tombstone), or by exact name of one not DELETED."""
        return self._tables.sandbox(reference)

    def node(self, reference: str) -> NodeRow | None:
        """Return a node by id or exact name."""
        return self._tables.node(reference)

    def find_sandbox(self, reference: str) -> SandboxRow:
        """Return a sandbox by id, name, or unique prefix of either.

        Raises:
            NotFoundError: None fits.
            AmbiguousError: Several fit.
        """
        row = self._tables.sandbox(reference)
        if row is not None:
            return row
        found: set[str] = set()
        for key in self._tables.prefixes.beginning_with(reference):
            found |= self._tables.owners(key)
            if len(found) >= _MANY:
                break
        return self._tables.sandboxes[_only("sandbox", reference, found)]

    def find_node(self, reference: str) -> NodeRow:
        """Return a node by id, name, or unique prefix of either.

        Raises:
            NotFoundError: None fits.
            AmbiguousError: Several fit.
        """
        node = self._tables.node(reference)
        if node is not None:
            return node
        found = {
            row.id
            for row in self._tables.nodes.values()
            if row.name.startswith(reference) or row.id.startswith(reference)
        }
        return self._tables.nodes[_only("node", reference, found)]

    def list_page(
        self,
        after: int,
        limit: int,
        predicate: Callable[[SandboxRow], bool] | None = None,
        *,
        tombstones: bool = False,
    ) -> tuple[list[SandboxRow], int]:
        """Return a page of sandboxes in order of creation.

        Args:
            after: 0, or what the page before returned: what a page token holds.
            limit: 1 to 1,000; there may be fewer where the predicate keeps few, also none.
            predicate: Keeps a row; None keeps all.
            tombstones: Whether DELETED sandboxes are among them.

        Returns:
            The rows, and `after` of the next page; 0 if this one is the last.
        """
        limit = max(1, min(limit, PAGE_SIZE_MAX))
        return self._tables.page(after, limit, predicate, tombstones=tombstones)

    def nodes(self) -> list[NodeRow]:
        """Return all nodes in order of name."""
        return [self._tables.nodes[key] for _, key in sorted(self._tables.node_names.items())]

    def sandboxes_on(self, node_id: str) -> list[SandboxRow]:
        """Return what a node has work with, in order of creation: its assignments."""
        return self._tables.placed_on(node_id)

    def allocated(self, node_id: str) -> Amounts:
        """Return what is promised to a node's sandboxes."""
        return self._tables.allocated(node_id)

    def sandbox_count_on(self, node_id: str) -> int:
        """Return the number of sandboxes that a node has work with."""
        return len(self._tables.by_node.get(node_id, ()))

    def pending(self) -> list[SandboxRow]:
        """Return what waits for a node, by priority (highest first) and then arrival."""
        rows = [self._tables.sandboxes[key] for key in self._tables.pending]
        rows.sort(key=_turn)
        return rows

    def sandboxes(self) -> Iterator[SandboxRow]:
        """Yield all sandboxes, tombstones too, in order of creation."""
        return iter(self._tables.sandboxes.values())

    def changes_since(self, revision: int, limit: int = PAGE_SIZE_MAX) -> list[Event]:
        """Return the first `limit` changes after a revision, in order; empty: there are none yet.

        Go on from the last one's `revision`.

        Raises:
            CompactedError: They are not kept any more; list again.
        """
        return self._tables.ring.since(revision, limit)

    # ── Snapshots ────────────────────────────────────────────────────────────────────────────

    def snapshot_view(self) -> SnapshotView:
        """Return all rows as of now: lists of immutable rows, so that it takes milliseconds."""
        tables = self._tables
        return SnapshotView(
            self.applied_index,
            tables.revision,
            tables.now_ms,
            list(tables.sandboxes.values()),
            list(tables.nodes.values()),
            list(tables.requests.values()),
            tables.command_version,
        )

    @classmethod
    def from_snapshot(cls, chunks: Iterable[bytes]) -> Machine:
        """Restore a machine.

        Raises:
            SnapshotError: The stream is cut, damaged, or of a newer format.
        """
        view = decode_snapshot(chunks)
        machine = cls()
        machine.applied_index = view.index
        machine._tables = Tables(view.revision, view.now_ms, view.command_version)
        machine._tables.load(view.sandboxes, view.nodes, view.requests)
        return machine

    def digest(self) -> str:
        """Return a digest of the replicated state: equal on members at the same index."""
        digest = hashlib.blake2b(digest_size=16)
        for chunk in encode_snapshot(self.snapshot_view()):
            digest.update(chunk)
        return digest.hexdigest()


def _turn(row: SandboxRow) -> tuple[int, int]:
    return -row.spec.priority, row.create_revision


def _only(noun: str, reference: str, found: set[str]) -> str:
    """Return the only id among those that a prefix fits."""
    if not found or not reference:
        raise NotFoundError(f"no {noun} {reference!r}", field=noun)
    if len(found) > 1:
        count = f"{len(found)} fit" if len(found) < _MANY else f"{_MANY} or more fit"
        raise AmbiguousError(f"{reference!r} is the beginning of more than one {noun}: {count}")
    return found.pop()
