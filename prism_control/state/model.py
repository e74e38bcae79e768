"""Rows of the replicated state: immutable, equal on every member, encoded as they are.

Units stand last in each name: `_ms` are milliseconds since 1970 by the clock of the leader that
proposed the change, or a length of time where the name says so (ttl, timeout, grace, lease). 0 is
"none" or "not yet". Rows are arrays on disk: a new field goes last and has a default.

`gc=False`: rows hold only strings, numbers, tuples and other rows, so that no cycle is possible
and the garbage collector need not visit hundreds of thousands of them.
"""

from __future__ import annotations

import enum
from typing import Final, TypeAlias

from msgspec import Struct

#: Key and value pairs, sorted by key: unlike a dict they are immutable, hashable and shareable.
Pairs: TypeAlias = tuple[tuple[str, str], ...]

#: Nodes that one explanation names; an operator reads no more, and rows stay small.
REFUSALS_MAX: Final = 16


class SandboxState(enum.IntEnum):
    """Where a sandbox is in its life; the numbers are those of prism.sandbox.v1.SandboxState."""

    #: Committed; no node is chosen.
    PENDING = 1
    #: A node is chosen and has not begun.
    SCHEDULED = 2
    #: The node is making it.
    STARTING = 3
    #: It accepts execs.
    READY = 4
    #: Its processes are frozen.
    PAUSED = 5
    #: Its processes are being ended.
    STOPPING = 6
    #: No process runs; its files are kept.
    STOPPED = 7
    #: It ended by itself.
    FAILED = 8
    #: Its node is gone.
    LOST = 9
    #: Its node is removing it.
    DELETING = 10
    #: A tombstone.
    DELETED = 11


class DesiredState(enum.IntEnum):
    """What its node shall make of it; the numbers are those of prism.agent.v1.DesiredState."""

    RUNNING = 1
    STOPPED = 2
    DELETED = 3
    PAUSED = 4


class ObservedState(enum.IntEnum):
    """What an agent sees; the numbers are those of prism.agent.v1.ObservedState."""

    STARTING = 1
    READY = 2
    STOPPING = 3
    STOPPED = 4
    FAILED = 5
    DELETED = 6
    PAUSED = 7


class NodeState(enum.IntEnum):
    """What the control plane thinks of a node; as prism.node.v1.NodeState."""

    #: Heard in time.
    READY = 1
    #: Missed heartbeats; nothing new is placed there.
    SUSPECT = 2
    #: Missed its lease.
    LOST = 3


class OnNodeLoss(enum.IntEnum):
    """What happens to a sandbox whose node is lost; as prism.sandbox.v1.OnNodeLoss."""

    LOST = 1
    RESCHEDULE = 2


class Amounts(Struct, frozen=True, array_like=True, gc=False):
    """An amount of what sandboxes use: thousandths of a core, bytes, bytes, sandboxes."""

    cpu_millicores: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    slots: int = 0


NOTHING: Final = Amounts()


class EgressRow(Struct, frozen=True, array_like=True, gc=False):
    """What a sandbox may reach; as prism.sandbox.v1.EgressRule and EgressName.

    Attributes:
        target: Addresses as a.b.c.d/n, or a name.
        protocol: The number of prism.sandbox.v1.TransportProtocol.
        ports: First and last of each range, in order; empty is all.
    """

    target: str
    protocol: int = 0
    ports: tuple[tuple[int, int], ...] = ()


class Egress(Struct, frozen=True, array_like=True, gc=False):
    """A sandbox's network of mode EGRESS."""

    rules: tuple[EgressRow, ...] = ()
    names: tuple[EgressRow, ...] = ()


#: Among a node's labels, where every version keeps it: whether it takes sandboxes with a network.
#: Its value is EGRESS_READY, or why not, for people.
EGRESS_LABEL: Final = "prism/egress"
EGRESS_READY: Final = "ready"


class Spec(Struct, frozen=True, array_like=True, gc=False):
    """What the user asked for, with defaults filled in by the API. Labels and limits change.

    Attributes:
        ttl_ms: From creation to removal; 0 is none.
        idle_timeout_ms: Without an exec until removal, kept by the agent; 0 is none.
        runtime: Empty is the node's best.
        priority: Higher is placed first.
        output_bytes_per_second: Of all execs together; 0 is no bound.
        egress: What it may reach; None is no network.
    """

    image: str
    cpu_millicores: int
    memory_bytes: int
    disk_bytes: int
    processes_max: int
    open_files_max: int
    env: Pairs = ()
    labels: Pairs = ()
    ttl_ms: int = 0
    idle_timeout_ms: int = 0
    runtime: str = ""
    on_node_loss: OnNodeLoss = OnNodeLoss.LOST
    priority: int = 0
    node_selector: Pairs = ()
    output_bytes_per_second: int = 0
    egress: Egress | None = None


class PlacementRefusal(Struct, frozen=True, array_like=True, gc=False):
    """Why one node does not take a PENDING sandbox, for people."""

    node_id: str
    node_name: str
    reason: str


#: Reason of a sandbox that runs, and that its node cannot hold to its new limits yet.
LIMITS_NOT_HELD: Final = "LIMITS_NOT_HELD"
#: Reason of a sandbox that leaves a node that drains.
NODE_DRAINED: Final = "NODE_DRAINED"


class SandboxRow(Struct, frozen=True, array_like=True, gc=False):
    """One sandbox.

    Attributes:
        state: Last observed, or decided where nobody has observed anything yet.
        desired: What the node is told.
        reason: Stable code of why it is FAILED, LOST, STOPPED or gone.
        node_id: Owner; empty while PENDING, and for a FAILED one of which no node has anything any
            more. LOST and DELETED keep it for the record only.
        generation: Counts placements, from 1: the one that runs, or that a PENDING one waits for.
        start_count: Starts asked for within the generation, from 1.
        grace_ms: From SIGTERM to SIGKILL at the stop or delete that is wanted.
        revision: Of the state when it last changed; unique among all rows.
        create_revision: Of its creation: the order of lists, and of arrival.
        end_ms: When it came to STOPPED, FAILED, LOST or DELETED; 0 while it lives.
        acknowledged: The node has reported this generation at least once.
        placement: Why it is PENDING, at most REFUSALS_MAX nodes.
    """

    id: str
    name: str
    spec: Spec
    state: SandboxState
    desired: DesiredState
    generation: int
    revision: int
    create_revision: int
    create_ms: int
    expire_ms: int = 0
    start_count: int = 1
    node_id: str = ""
    node_name: str = ""
    runtime: str = ""
    reason: str = ""
    message: str = ""
    grace_ms: int = 0
    schedule_ms: int = 0
    ready_ms: int = 0
    end_ms: int = 0
    last_seen_ms: int = 0
    acknowledged: bool = False
    placement: tuple[PlacementRefusal, ...] = ()


#: Of a sandbox that was never moved.
GENERATION_FIRST: Final = 1


def new_sandbox(sandbox_id: str, name: str, spec: Spec, now_ms: int, revision: int) -> SandboxRow:
    """Return the row of a sandbox that is created now, as this revision."""
    return SandboxRow(
        sandbox_id,
        name,
        spec,
        SandboxState.PENDING,
        DesiredState.RUNNING,
        GENERATION_FIRST,
        revision,
        revision,
        now_ms,
        now_ms + spec.ttl_ms if spec.ttl_ms else 0,
    )


class RuntimeRow(Struct, frozen=True, array_like=True, gc=False):
    """Whether one runtime works on a node; as prism.node.v1.RuntimeStatus."""

    name: str
    ready: bool
    message: str = ""
    version: str = ""


class NodeRow(Struct, frozen=True, array_like=True, gc=False):
    """One node. What is promised there is derived: `Machine.allocated`.

    Attributes:
        incarnation: Random text of the agent's process: tells a restart.
        lease_ms: How long it was told that it counts as alive after a heartbeat. It is kept here
            so that the next leader waits as long as its predecessor had promised.
        heartbeat_ms: Time between heartbeats that it was told.
        last_seen_ms: When a leader had last heard it, as of the last change of this row.
        drain_ms: While it drains: when what is left there is ended; 0: it does not drain.
    """

    id: str
    name: str
    state: NodeState
    incarnation: str
    address: str
    capacity: Amounts
    runtimes: tuple[RuntimeRow, ...]
    labels: Pairs
    version: str
    lease_ms: int
    heartbeat_ms: int
    revision: int
    create_ms: int
    last_seen_ms: int
    cordoned: bool = False
    drain_ms: int = 0


#: States in which nothing of a sandbox is left on a node that its agent should know of.
_UNPLACED: Final = frozenset({SandboxState.PENDING, SandboxState.LOST, SandboxState.DELETED})


#: By state: whether a sandbox holds all that its limits promise, and its node has work with it.
HOLDS_ALL: Final = (
    False,  # states count from 1
    *(
        state
        in (
            SandboxState.SCHEDULED,
            SandboxState.STARTING,
            SandboxState.READY,
            SandboxState.PAUSED,
            SandboxState.STOPPING,
            SandboxState.STOPPED,
        )
        for state in SandboxState
    ),
)


def is_placed(row: SandboxRow) -> bool:
    """Return whether the row's node has work with it: it is among that node's assignments."""
    return row.state not in _UNPLACED and row.node_id != ""


def is_moving(row: SandboxRow) -> bool:
    """Return whether the row is ending on a node that drains, to be placed on another."""
    return row.state is SandboxState.STOPPING and row.reason == NODE_DRAINED


def need_of(spec: Spec) -> Amounts:
    """Return what a sandbox of this spec takes from its node."""
    return Amounts(spec.cpu_millicores, spec.memory_bytes, spec.disk_bytes, 1)


def holds_all(row: SandboxRow) -> bool:
    """Return whether the row has a node and holds all that its limits promise: as `held_by`.

    One that is being removed does until its processes have ended.
    """
    return HOLDS_ALL[row.state] or (row.state is SandboxState.DELETING and not row.end_ms)


def held_by(row: SandboxRow) -> Amounts:
    """Return what the row takes from its node now.

    A STOPPED sandbox keeps all, so that it can always start again. A FAILED one, and one that is
    removed after it had ended, keep only their files: no process of them runs. They never take
    again what they gave back, so no row's change can over-commit a node.
    """
    if not is_placed(row):
        return NOTHING
    return need_of(row.spec) if holds_all(row) else Amounts(disk_bytes=row.spec.disk_bytes)


def pairs(values: dict[str, str]) -> Pairs:
    """Return a map's entries sorted by key."""
    return tuple(sorted(values.items()))
