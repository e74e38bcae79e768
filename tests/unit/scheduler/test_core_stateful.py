"""Whatever happens, the scheduler never over-commits and its view stays that of the machine."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prism_control.scheduler.core import Scheduler
from prism_control.scheduler.placement import Strategy
from prism_control.state import commands as c
from prism_control.state.model import (
    Amounts,
    NodeState,
    ObservedState,
    OnNodeLoss,
    RuntimeRow,
    SandboxState,
)
from tests.unit.scheduler.test_core import free
from tests.unit.state.builders import MIB, Driver, create, register

NODES = [f"n{k}" for k in range(11)]  # more than are compared one by one
NODE = st.sampled_from(NODES)


class Scheduling(RuleBasedStateMachine):
    @initialize(strategy=st.sampled_from(Strategy))
    def begin(self, strategy: Strategy) -> None:
        self.driver = Driver()
        self.strategy = strategy
        self.made = 0
        self.now_ms = 0
        #: Entries under way: creates, what was decided on them or on who waits, and in vain.
        self.waiting_proposals: list[tuple[list[c.CreateSandbox], c.AssignSandboxes, int]] = []
        self._take_over()

    def _take_over(self) -> None:
        uniform = random.Random(3).random
        machine = self.driver.machine
        self.scheduler = Scheduler.from_machine(machine, uniform, strategy=self.strategy)
        self.waiting_proposals.clear()

    def _run(self, *commands: c.Command) -> tuple[object, ...]:
        results = self.driver.run(*commands)
        self.scheduler.observe(self.driver.events)
        return results

    @rule(
        node=NODE,
        slots=st.integers(0, 3),
        memory=st.sampled_from([0, 256, 600]),
        runtime=st.sampled_from(["fake", "gvisor"]),
        zone=st.sampled_from(["a", "b"]),
    )
    def register(self, node: str, slots: int, memory: int, runtime: str, zone: str) -> None:
        row = self.driver.machine.node(node)
        kept = () if row is None else self.driver.machine.sandboxes_on(node)
        self._run(
            register(
                node,
                capacity=Amounts(slots * 600, memory * MIB, 10**10, slots),
                runtimes=(RuntimeRow(runtime, True),),
                labels=(("zone", zone),),
                reports=tuple(
                    c.Report(one.id, one.generation, ObservedState.READY, start_count=9)
                    for one in kept
                ),
            )
        )

    @rule(
        count=st.integers(1, 4),
        cpu=st.sampled_from([100, 500]),
        memory=st.sampled_from([64, 256]),
        priority=st.integers(-1, 1),
        policy=st.sampled_from(OnNodeLoss),
        runtime=st.sampled_from(["", "", "gvisor"]),
        selector=st.sampled_from([(), (("zone", "a"),)]),
    )
    def create(self, count, cpu, memory, priority, policy, runtime, selector) -> None:
        for _ in range(count):
            self.made += 1
            self._run(
                create(
                    f"s{self.made}",
                    cpu_millicores=cpu,
                    memory_bytes=memory * MIB,
                    priority=priority,
                    on_node_loss=policy,
                    runtime=runtime,
                    node_selector=selector,
                )
            )

    @rule(
        count=st.integers(1, 4),
        cpu=st.sampled_from([100, 500]),
        priority=st.integers(-1, 1),
        repeated=st.booleans(),
    )
    def create_and_place(self, count, cpu, priority, repeated) -> None:
        """In one entry of the log, before which others may come."""
        names = [f"s{self.made + number + 1}" for number in range(count)]
        self.made += count
        if repeated:  # a name that is taken: the create is refused
            names.append(names[0])
        creates = [
            create(f"{name}-{number}", name=name, cpu_millicores=cpu, priority=priority)
            for number, name in enumerate(names)
        ]
        self.waiting_proposals.append((creates, *self.scheduler.decide_ahead(creates)))

    @rule(after_ms=st.sampled_from([0, 100, 1000, 40_000]), limit=st.integers(1, 6))
    def decide(self, after_ms: int, limit: int) -> None:
        self.now_ms += after_ms
        decision = self.scheduler.decide(self.now_ms, limit)
        if decision is not None:
            self.waiting_proposals.append(([], decision, 0))

    @rule(proposed=st.booleans())
    def commit(self, proposed: bool) -> None:
        if not self.waiting_proposals:
            return
        creates, decision, in_vain = self.waiting_proposals.pop(0)
        if proposed:
            (*_, result) = self._run(*creates, decision)
            self.scheduler.forget(result.refused)
        else:
            self.scheduler.forget_all(decision)
        self.scheduler.end_ahead(in_vain)

    @rule()
    def fresh_decisions_are_never_void(self) -> None:
        """Decided on what is committed, with nothing in flight, all of it can be done."""
        self._take_over()
        decision = self.scheduler.decide(self.now_ms)
        if decision is None:
            return
        machine = self.driver.machine
        for one in decision.placements:
            row, node = machine.sandbox(one.sandbox_id), machine.node(one.node_id)
            assert node.state is NodeState.READY
            assert not node.cordoned
            assert set(row.spec.node_selector) <= set(node.labels)
            assert not row.spec.runtime or row.spec.runtime == node.runtimes[0].name
        (result,) = self._run(decision)
        assert result.refused == ()

    @rule(node=NODE, kind=st.sampled_from([c.SuspectNode, c.LoseNode, c.ReviveNode]))
    def change_node(self, node: str, kind: type) -> None:
        self._run(kind(node, "i1", 5))

    @rule(node=NODE, cordoned=st.booleans())
    def cordon(self, node: str, cordoned: bool) -> None:
        self._run(c.CordonNode(node, cordoned))

    @rule(data=st.data(), state=st.sampled_from(ObservedState))
    def report(self, data: st.DataObject, state: ObservedState) -> None:
        rows = [row for row in self.driver.machine.sandboxes() if row.node_id]
        if rows:
            row = data.draw(st.sampled_from(rows))
            one = c.Report(row.id, row.generation, state, start_count=row.start_count)
            self._run(c.ReportSandboxes(row.node_id, "i1", (one,)))

    @rule(data=st.data(), kind=st.sampled_from([c.DeleteSandbox, c.StopSandbox, c.StartSandbox]))
    def use(self, data: st.DataObject, kind: type) -> None:
        rows = [
            row for row in self.driver.machine.sandboxes() if row.state is not SandboxState.DELETED
        ]
        if rows:
            self._run(kind("", b"", data.draw(st.sampled_from(rows)).id))

    @rule(data=st.data(), cpu_millicores=st.sampled_from([1, 500, 3000]))
    def resize(self, data: st.DataObject, cpu_millicores: int) -> None:
        rows = list(self.driver.machine.sandboxes())
        if rows:
            key = data.draw(st.sampled_from(rows)).id
            self._run(c.UpdateSandbox("", b"", key, cpu_millicores=cpu_millicores))

    @rule()
    def change_leader(self) -> None:
        self._take_over()

    @invariant()
    def view_is_the_machines_less_what_is_reserved(self) -> None:
        if not hasattr(self, "driver"):
            return
        fresh = Scheduler.from_machine(self.driver.machine, random.Random(1).random)
        for reservation in self.scheduler._reserved.values():
            view = fresh._nodes.get(reservation.node_id)
            if view is not None:
                view.take(reservation.held, 1)
        ours = self.scheduler._nodes
        assert {key: free(view) for key, view in ours.items()} == {
            key: free(view) for key, view in fresh._nodes.items()
        }
        assert self.scheduler._in_vain == sum(each[2] for each in self.waiting_proposals)
        pending = {row.id for row in self.driver.machine.pending()}
        assert set(self.scheduler._waiting._members) == pending - set(self.scheduler._reserved)


Scheduling.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduling = Scheduling.TestCase
