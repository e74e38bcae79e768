"""Commands and machines for tests, with what a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prism_control.state import commands as c
from prism_control.state.events import Event
from prism_control.state.machine import Machine
from prism_control.state.model import (
    Amounts,
    NodeState,
    ObservedState,
    RuntimeRow,
    SandboxRow,
    SandboxState,
    Spec,
    held_by,
    is_placed,
)
from prism_control.state.results import Result

MIB = 1024 * 1024


def spec(**changes: Any) -> Spec:
    values: dict[str, Any] = {
        "image": "host",
        "cpu_millicores": 500,
        "memory_bytes": 256 * MIB,
        "disk_bytes": 256 * MIB,
        "processes_max": 128,
        "open_files_max": 1024,
    }
    return Spec(**(values | changes))


def register(node_id: str = "n1", **changes: Any) -> c.RegisterNode:
    values: dict[str, Any] = {
        "node_id": node_id,
        "name": f"name-{node_id}",
        "incarnation": "i1",
        "address": f"{node_id}.example:7117",
        "capacity": Amounts(4000, 2048 * MIB, 4096 * MIB, 8),
        "runtimes": (RuntimeRow("fake", True),),
        "labels": (),
        "version": "0.1.0",
        "lease_ms": 15_000,
        "heartbeat_ms": 1000,
    }
    return c.RegisterNode(**(values | changes))


def create(sandbox_id: str = "s1", request_id: str = "", **changes: Any) -> c.CreateSandbox:
    name = changes.pop("name", f"name-{sandbox_id}")
    return c.CreateSandbox(request_id, b"f", sandbox_id, name, spec(**changes))


def reports(*items: c.Report, node_id: str = "n1", incarnation: str = "i1") -> c.ReportSandboxes:
    return c.ReportSandboxes(node_id, incarnation, items)


def report(state: ObservedState, sandbox_id: str = "s1", **changes: Any) -> c.Report:
    return c.Report(sandbox_id, changes.pop("generation", 1), state, **changes)


class Driver:
    """A machine with its log; checks all invariants after each step."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.log: list[c.Proposal] = []
        self.now_ms = 1_000_000
        self.events: list[Event] = []

    def run(self, *items: c.Command, after_ms: int = 0) -> tuple[Result, ...]:
        self.now_ms += after_ms
        proposal = c.Proposal(1, self.now_ms, items)
        self.log.append(proposal)
        results, self.events = self.machine.apply(len(self.log), c.encode(proposal))
        check(self.machine)
        return results

    def one(self, item: c.Command, after_ms: int = 0) -> Any:
        (result,) = self.run(item, after_ms=after_ms)
        return result

    def sandbox(self, reference: str = "s1") -> SandboxRow:
        row = self.machine.sandbox(reference)
        assert row is not None
        return row

    def place(self, sandbox_id: str = "s1", node_id: str = "n1") -> Any:
        generation = self.sandbox(sandbox_id).generation
        return self.one(c.AssignSandboxes((c.Placement(sandbox_id, generation, node_id),)))

    def report(self, state: ObservedState, sandbox_id: str = "s1", **changes: Any) -> Any:
        row = self.sandbox(sandbox_id)
        changes = {"generation": row.generation, "start_count": row.start_count} | changes
        return self.one(reports(report(state, sandbox_id, **changes), node_id=row.node_id))

    def bring(self, state: SandboxState, sandbox_id: str = "s1", **changes: Any) -> SandboxRow:
        """Create a sandbox and bring it to a state on node n1."""
        if self.machine.node("n1") is None:
            self.run(register())
        self.run(create(sandbox_id, **changes))
        steps = {
            SandboxState.PENDING: (),
            SandboxState.SCHEDULED: ("place",),
            SandboxState.STARTING: ("place", ObservedState.STARTING),
            SandboxState.READY: ("place", ObservedState.READY),
            SandboxState.STOPPING: ("place", ObservedState.READY, ObservedState.STOPPING),
            SandboxState.STOPPED: ("place", ObservedState.READY, ObservedState.STOPPED),
            SandboxState.FAILED: ("place", ObservedState.FAILED),
            SandboxState.LOST: ("place", ObservedState.READY, "lose"),
            SandboxState.DELETING: ("place", ObservedState.READY, "delete"),
            SandboxState.DELETED: ("place", ObservedState.READY, ObservedState.DELETED),
        }
        for step in steps[state]:
            if step == "place":
                self.place(sandbox_id)
            elif step == "delete":
                self.run(c.DeleteSandbox("", b"", sandbox_id, grace_ms=5000))
            elif step == "lose":
                self.run(c.LoseNode("n1", "i1", self.now_ms - 5))
            else:
                self.report(step, sandbox_id)
        row = self.sandbox(sandbox_id)
        assert row.state is state
        return row


def check(machine: Machine) -> None:
    """Check what must hold after each applied entry."""
    rows = list(machine.sandboxes())
    live = [row for row in rows if row.state is not SandboxState.DELETED]
    assert len({row.name for row in live}) == len(live), "two live sandboxes have one name"
    assert machine.sandbox_count == len(live)
    for row in live:
        assert machine.sandbox(row.id) is row
        named = machine.sandbox(row.name)
        assert named is row or (named is not None and named.id == row.name)
        keys = set(machine._tables.prefixes.beginning_with(row.name[:-1]))
        assert row.name in keys
    machine._tables.prefixes.check()
    for state in SandboxState:
        assert machine.counts[state] == sum(row.state is state for row in rows)
    assert [row.create_revision for row in rows] == sorted(row.create_revision for row in rows)
    assert {row.id for row in machine.pending()} == {
        row.id for row in rows if row.state is SandboxState.PENDING
    }
    revisions = [row.revision for row in rows] + [node.revision for node in machine.nodes()]
    assert len(set(revisions)) == len(revisions)
    assert all(revision <= machine.revision for revision in revisions)
    _check_nodes(machine, rows)


def _check_nodes(machine: Machine, rows: Iterable[SandboxRow]) -> None:
    nodes = {node.id: node for node in machine.nodes()}
    assert len({node.name for node in nodes.values()}) == len(nodes)
    by_node: dict[str, list[SandboxRow]] = {}
    for row in rows:
        if is_placed(row):
            assert row.node_id in nodes, "a sandbox is placed on a node that is forgotten"
            by_node.setdefault(row.node_id, []).append(row)
        elif row.state is SandboxState.PENDING:
            assert not row.node_id
    for node in nodes.values():
        placed = by_node.get(node.id, [])
        assert machine.sandboxes_on(node.id) == placed
        assert machine.sandbox_count_on(node.id) == len(placed)
        assert machine.allocated(node.id) == total(held_by(row) for row in placed)
        if node.state is NodeState.LOST:
            assert not placed, "a LOST node still has sandboxes"


def total(amounts: Iterable[Amounts]) -> Amounts:
    items: Sequence[Amounts] = list(amounts)
    return Amounts(
        sum(one.cpu_millicores for one in items),
        sum(one.memory_bytes for one in items),
        sum(one.disk_bytes for one in items),
        sum(one.slots for one in items),
    )
