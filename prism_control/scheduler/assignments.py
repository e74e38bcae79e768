"""What each agent is told: the pure part of dispatch.

Level-triggered: an agent that connects is told all it shall have, then changes. What was sent is
remembered only to send less; a lost message is repaired by the next session.

Starts are bounded for each agent: a start is in flight from when it is sent until the sandbox is
READY, or ended, or goes. The agent has the rest of its sandboxes told as its reports come in, so
that a slow node slows itself and no one else. Stops and deletes are never held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final, TypeAlias

from msgspec import Struct

from prism_control.state.events import Event, SandboxChanged
from prism_control.state.model import (
    DesiredState,
    SandboxRow,
    SandboxState,
    Spec,
    is_placed,
)

#: Starts that an agent is given at once. It makes a few at a time; the rest bridges the time until
#: its report has come, is committed, and the next start has arrived. That is a fifth of a second
#: under load, in which a fast agent starts hundreds.
STARTS_MAX: Final = 256
#: Assignments of one batch.
BATCH_MAX: Final = 1000
#: Bytes of environment and labels in one batch, so that it stays below a message's 4 MiB.
_BATCH_BYTES_MAX: Final = 2 * 1024 * 1024
#: What an assignment takes besides.
_ASSIGNMENT_BYTES: Final = 512

_UNDER_WAY: Final = frozenset({SandboxState.SCHEDULED, SandboxState.STARTING})


class Assignment(Struct, frozen=True, gc=False):
    """One desired sandbox; as prism.agent.v1.Assignment.

    Attributes:
        spec: None where it shall have no processes.
        expire_ms: By wall time; 0: never.
    """

    sandbox_id: str
    generation: int
    desired: DesiredState
    spec: Spec | None
    expire_ms: int
    name: str
    grace_ms: int
    start_count: int


#: What an assignment asks for beyond its sandbox's fixed facts: equal ones need no second message.
_Wish: TypeAlias = tuple[int, DesiredState, int, int, int, int, int, int, int]


def assignment_of(row: SandboxRow) -> Assignment:
    """Return what a placed sandbox's node is told."""
    running = row.desired in (DesiredState.RUNNING, DesiredState.PAUSED)
    return Assignment(
        row.id,
        row.generation,
        row.desired,
        row.spec if running else None,
        row.expire_ms,
        row.name,
        row.grace_ms,
        row.start_count,
    )


class AgentDispatch:
    """One agent's session.

    Args:
        rows: What the state has for the node (`Machine.sandboxes_on`) once its registration is
            applied. Every event after that must come to `observe`.
        has: Ids of the sandboxes that the agent's registration listed.
        starts_max: Starts in flight at most.
    """

    def __init__(
        self,
        node_id: str,
        rows: Iterable[SandboxRow],
        has: Collection[str],
        starts_max: int = STARTS_MAX,
    ) -> None:
        self.node_id = node_id
        self._starts_max = starts_max
        #: What the agent has been told.
        self._sent: dict[str, _Wish] = {}
        #: Ids of the starts in flight.
        self._starting: set[str] = set()
        #: What it shall delete because the sandbox has left it, as another generation or for good.
        self._removals: deque[Assignment] = deque()
        #: Rows with news for the agent, in order, except starts that it was never told.
        self._news: dict[str, SandboxRow] = {}
        #: Rows that the agent has yet to start, in order.
        self._starts: dict[str, SandboxRow] = {}
        self._completed = False
        self._has = frozenset(has)
        for row in rows:
            self._put(row)

    @property
    def starting_count(self) -> int:
        """Starts in flight."""
        return len(self._starting)

    @property
    def held_back_count(self) -> int:
        """Starts that wait for one in flight to end."""
        return len(self._starts)

    @property
    def ready(self) -> bool:
        """Whether `take` has something to send."""
        if not self._completed or self._news or self._removals:
            return True
        return bool(self._starts) and len(self._starting) < self._starts_max

    def observe(self, event: SandboxChanged) -> None:
        """Take over a change of a sandbox that is, or was, on this node."""
        row = event.row
        if row.node_id == self.node_id and is_placed(row):
            self._put(row)
        else:
            self._leave(row, event.previous)

    def complete(self) -> list[list[Assignment]]:
        """Return the session's first batches: all that the agent has and shall keep.

        What it has beyond all of them it deletes. Starts are among them up to the bound; the agent
        does not have the others yet, so that leaving them out deletes nothing.
        """
        self._completed = True
        batches: list[list[Assignment]] = []
        while batch := self.take():
            batches.append(batch)
        return batches or [[]]

    def take(self, limit: int = BATCH_MAX) -> list[Assignment]:
        """Return up to `limit` changes, and no more than fit into a message; empty: none."""
        batch: list[Assignment] = []
        size = 0
        while self._removals and len(batch) < limit:
            batch.append(self._removals.popleft())
        for queue in (self._news, self._starts):
            while queue and len(batch) < limit and size < _BATCH_BYTES_MAX:
                if queue is self._starts and len(self._starting) >= self._starts_max:
                    break
                key = next(iter(queue))
                row = queue.pop(key)
                self._sent[key] = _wish_of(row)
                if _is_start(row):
                    self._starting.add(key)
                assignment = assignment_of(row)
                size += _size(assignment)
                batch.append(assignment)
        return batch

    def _put(self, row: SandboxRow) -> None:
        key, is_start = row.id, _is_start(row)
        if not is_start:
            self._starting.discard(key)
        sent = self._sent.get(key)
        if sent is not None and sent == _wish_of(row):
            self._news.pop(key, None)
            self._starts.pop(key, None)
        elif is_start and key not in self._has and key not in self._starting:
            self._starts[key] = row
        else:
            self._starts.pop(key, None)
            self._news[key] = row

    def _leave(self, row: SandboxRow, previous: SandboxRow | None) -> None:
        """Forget a sandbox; where the agent may still have it, tell it to delete its copy."""
        key = row.id
        self._starting.discard(key)
        self._starts.pop(key, None)
        self._news.pop(key, None)
        told = self._sent.pop(key, None) is not None or key in self._has
        if told and previous is not None and row.state is not SandboxState.DELETED:
            self._removals.append(
                Assignment(
                    key,
                    previous.generation,
                    DesiredState.DELETED,
                    None,
                    0,
                    row.name,
                    0,
                    previous.start_count,
                )
            )


class Dispatch:
    """All sessions of the leader; routes events to them."""

    def __init__(self) -> None:
        self._agents: dict[str, AgentDispatch] = {}

    def open(self, agent: AgentDispatch) -> None:
        """Begin a session; one of the same node that was open before is forgotten."""
        self._agents[agent.node_id] = agent

    def close(self, agent: AgentDispatch) -> None:
        """End a session, unless another of its node has begun."""
        if self._agents.get(agent.node_id) is agent:
            del self._agents[agent.node_id]

    def agent(self, node_id: str) -> AgentDispatch | None:
        """Return a node's session."""
        return self._agents.get(node_id)

    def observe(self, events: Sequence[Event]) -> list[str]:
        """Take over committed changes; return the nodes whose sessions have something to send.

        Each is named once, in the order of the changes.
        """
        touched: dict[str, None] = {}
        agents = self._agents
        for event in events:
            if not isinstance(event, SandboxChanged):
                continue
            node_id, previous = event.row.node_id, event.previous
            before = node_id if previous is None else previous.node_id
            for one in (node_id,) if before == node_id else (before, node_id):
                agent = agents.get(one)
                if agent is not None:
                    agent.observe(event)
                    touched[one] = None
        return [node_id for node_id in touched if self._agents[node_id].ready]


def _is_start(row: SandboxRow) -> bool:
    return row.desired is DesiredState.RUNNING and row.state in _UNDER_WAY


def _wish_of(row: SandboxRow) -> _Wish:
    spec = row.spec
    return (
        row.generation,
        row.desired,
        row.start_count,
        row.grace_ms,
        row.expire_ms,
        spec.cpu_millicores,
        spec.memory_bytes,
        spec.disk_bytes,
        spec.processes_max,
    )


def _size(assignment: Assignment) -> int:
    spec = assignment.spec
    if spec is None or not (spec.env or spec.labels or spec.egress):
        return _ASSIGNMENT_BYTES
    texts = sum(len(key) + len(value) for key, value in spec.env + spec.labels)
    if spec.egress is not None:
        rows = spec.egress.rules + spec.egress.names
        texts += sum(len(row.target) + 8 * len(row.ports) + 8 for row in rows)
    return _ASSIGNMENT_BYTES + 2 * texts
