"""What the scheduler knows of nodes: rows, plus what is promised there and not yet committed."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from prism_control.state.model import (
    EGRESS_LABEL,
    EGRESS_READY,
    Amounts,
    NodeRow,
    NodeState,
    Pairs,
    SandboxRow,
    Spec,
)

_MIB: Final = 1024 * 1024
#: Weights of the score; together 100.
_CPU, _MEMORY, _DISK, _LOAD = 30.0, 40.0, 20.0, 10.0
#: What the node that carries the leader loses: enough to be second choice among equals, not so much
#: that it stays empty while others fill up.
_LEADER_PENALTY: Final = 10.0


class Shape(NamedTuple):
    """What placement depends on. Requests of one shape fit on the same nodes.

    A NamedTuple, as it is a key that is hashed for each sandbox.
    """

    cpu_millicores: int
    memory_bytes: int
    disk_bytes: int
    runtime: str
    node_selector: Pairs


#: Whose turn it is: (−priority, create_revision, generation, id); the first two are unique.
Entry: TypeAlias = tuple[int, int, int, str]


def entry_of(row: SandboxRow) -> Entry:
    """Return a PENDING sandbox's place in the queue: priority, then arrival."""
    return -row.spec.priority, row.create_revision, row.generation, row.id


def shape_of(spec: Spec) -> Shape:
    """Return the shape of a spec."""
    selector = spec.node_selector
    if spec.egress is not None:
        selector = (*selector, (EGRESS_LABEL, EGRESS_READY))
    return Shape(spec.cpu_millicores, spec.memory_bytes, spec.disk_bytes, spec.runtime, selector)


class NodeView:
    """One node as the scheduler sees it.

    Invariant: free = capacity − what committed sandboxes hold − what is reserved. It can be
    negative where an agent came back with less than it had.
    """

    __slots__ = (
        "capacity",
        "cpu_free",
        "disk_free",
        "is_leader",
        "labels",
        "load_per_core",
        "memory_free",
        "row",
        "runtimes",
        "score",
        "slots_free",
    )

    def __init__(self, row: NodeRow, held: Amounts, leader_host: str) -> None:
        #: Load average by cores, as heard last.
        self.load_per_core = 0.0
        self.cpu_free = -held.cpu_millicores
        self.memory_free = -held.memory_bytes
        self.disk_free = -held.disk_bytes
        self.slots_free = -held.slots
        self.capacity = Amounts()
        self.take_over(row, leader_host)

    def take_over(self, row: NodeRow, leader_host: str) -> None:
        """Follow the node's new row."""
        old, new = self.capacity, row.capacity
        self.cpu_free += new.cpu_millicores - old.cpu_millicores
        self.memory_free += new.memory_bytes - old.memory_bytes
        self.disk_free += new.disk_bytes - old.disk_bytes
        self.slots_free += new.slots - old.slots
        self.row = row
        self.capacity = new
        self.labels = dict(row.labels)
        self.runtimes = frozenset(one.name for one in row.runtimes if one.ready)
        self.is_leader = bool(leader_host) and _host(row.address) == leader_host
        self.rescore()

    @property
    def open(self) -> bool:
        """Whether it takes anything new at all."""
        return self.row.state is NodeState.READY and not self.row.cordoned

    def suits(self, shape: Shape) -> bool:
        """Return whether it may take this shape when it has room."""
        if not (shape.runtime in self.runtimes if shape.runtime else self.runtimes):
            return False
        labels = self.labels
        return all(labels.get(key) == value for key, value in shape.node_selector)

    def fits(self, shape: Shape) -> bool:
        """Return whether it has room for one of this shape."""
        return (
            self.memory_free >= shape.memory_bytes
            and self.cpu_free >= shape.cpu_millicores
            and self.disk_free >= shape.disk_bytes
            and self.slots_free >= 1
        )

    def take(self, held: Amounts, sign: int) -> None:
        """Promise an amount, or give it back with sign −1."""
        self.cpu_free -= sign * held.cpu_millicores
        self.memory_free -= sign * held.memory_bytes
        self.disk_free -= sign * held.disk_bytes
        self.slots_free -= sign * held.slots
        self.rescore()

    def rescore(self) -> None:
        """Compute the score anew: 0–100, higher takes the next sandbox first."""
        # In one piece: each placement and each removal asks for it.
        room = self.capacity
        score = _LOAD * (1.0 - self.load_per_core) if self.load_per_core < 1.0 else 0.0
        if self.cpu_free > 0 and room.cpu_millicores > 0:
            score += _CPU * (self.cpu_free / room.cpu_millicores)
        if self.memory_free > 0 and room.memory_bytes > 0:
            score += _MEMORY * (self.memory_free / room.memory_bytes)
        if self.disk_free > 0 and room.disk_bytes > 0:
            score += _DISK * (self.disk_free / room.disk_bytes)
        #: Of the room that is free now; kept, so that comparing nodes costs nothing.
        self.score = max(0.0, score - _LEADER_PENALTY) if self.is_leader else score

    def refusal(self, shape: Shape) -> str:
        """Return for people why it does not take this shape; empty: it would."""
        row = self.row
        if row.state is not NodeState.READY:
            return f"is {row.state.name}"
        if row.cordoned:
            return "is cordoned"
        if not self.suits(shape):
            return self._unsuitable(shape)
        wants = []
        if self.cpu_free < shape.cpu_millicores:
            free = max(0, self.cpu_free)
            wants.append(f"{shape.cpu_millicores}m of CPU, {free}m free")
        if self.memory_free < shape.memory_bytes:
            wants.append(f"{_mib(shape.memory_bytes)} of memory, {_mib(self.memory_free)} free")
        if self.disk_free < shape.disk_bytes:
            wants.append(f"{_mib(shape.disk_bytes)} of disk, {_mib(self.disk_free)} free")
        if self.slots_free < 1:
            wants.append(f"a slot, all {row.capacity.slots} are taken")
        return "needs " + "; ".join(wants) if wants else ""

    def _unsuitable(self, shape: Shape) -> str:
        if not self.runtimes:
            return "has no runtime that works"
        if shape.runtime and shape.runtime not in self.runtimes:
            for one in self.row.runtimes:
                if one.name == shape.runtime and one.message:
                    return f"runtime {shape.runtime} does not work: {one.message[:120]}"
            return f"has no runtime {shape.runtime}"
        told = self.labels.get(EGRESS_LABEL, "its agent does not say that it can")
        if told != EGRESS_READY and (EGRESS_LABEL, EGRESS_READY) in shape.node_selector:
            return f"cannot give a network: {told[:200]}"
        wanted = (f"{k}={v}" for k, v in shape.node_selector if self.labels.get(k) != v)
        return f"lacks the label {', '.join(wanted)[:200]}"


class Reservation(NamedTuple):
    """A decision that is not committed yet.

    Attributes:
        entry: The sandbox's place in the queue if the decision is void; None: there is no sandbox,
            it is created in the entry that carries the decision.
    """

    node_id: str
    held: Amounts
    shape: Shape
    entry: Entry | None


def _mib(size: int) -> str:
    """Return bytes for people, rounded down, never below 0."""
    return f"{max(0, size) // _MIB} MiB"


def _host(address: str) -> str:
    """Return the host of host:port."""
    return address.rpartition(":")[0]
