"""Whatever is proposed, in whatever order: members agree, and the invariants hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism_control.state import commands as c
from prism_control.state import tables
from prism_control.state.machine import Machine
from prism_control.state.model import (
    ObservedState,
    OnNodeLoss,
    PlacementRefusal,
    SandboxState,
)
from prism_control.state.snapshot import encode_snapshot
from prism_control.state.transitions import TRANSITIONS
from tests.unit.state.builders import Driver, check, create, register

IDS = st.sampled_from([f"s{k}" for k in range(6)])
NAMES = st.sampled_from(["a", "b", "c"])
NODES = st.sampled_from(["n1", "n2"])
INCARNATIONS = st.sampled_from(["i1", "i2"])
REQUESTS = st.sampled_from(["", "", "r1", "r2", "r3"])
FINGERPRINTS = st.sampled_from([b"f", b"g"])
REFERENCES = IDS | NAMES
REPORTS = st.builds(
    c.Report,
    IDS,
    st.integers(1, 3),
    st.sampled_from(ObservedState),
    reason=st.sampled_from(["", "OUT_OF_MEMORY"]),
    start_count=st.integers(1, 2),
)
REPORT_LISTS = st.lists(REPORTS, max_size=4).map(tuple)
COMMANDS = st.one_of(
    st.builds(
        lambda sandbox_id, request_id, fingerprint, name, policy, ttl_ms: c.CreateSandbox(
            request_id,
            fingerprint,
            sandbox_id,
            name,
            create(on_node_loss=policy, ttl_ms=ttl_ms).spec,
        ),
        IDS,
        REQUESTS,
        FINGERPRINTS,
        NAMES,
        st.sampled_from(OnNodeLoss),
        st.sampled_from([0, 100]),
    ),
    st.builds(c.DeleteSandbox, REQUESTS, FINGERPRINTS, REFERENCES, st.booleans()),
    st.builds(c.StopSandbox, REQUESTS, FINGERPRINTS, REFERENCES),
    st.builds(c.StartSandbox, REQUESTS, FINGERPRINTS, REFERENCES),
    st.builds(
        c.UpdateSandbox,
        REQUESTS,
        FINGERPRINTS,
        REFERENCES,
        cpu_millicores=st.sampled_from([0, 100, 500, 3000]),
        memory_bytes=st.sampled_from([0, 2**24, 2**30]),
    ),
    st.builds(
        c.AssignSandboxes,
        st.lists(st.builds(c.Placement, IDS, st.integers(1, 3), NODES), max_size=4).map(tuple),
        st.lists(
            st.builds(
                c.Explanation,
                st.lists(IDS, max_size=3).map(tuple),
                st.just("no room"),
                st.sampled_from([(), (PlacementRefusal("n1", "n1", "full"),)]),
            ),
            max_size=1,
        ).map(tuple),
    ),
    st.builds(c.ReportSandboxes, NODES, INCARNATIONS, REPORT_LISTS),
    st.builds(
        lambda node, name, incarnation, reports: register(
            node, name=name, incarnation=incarnation, reports=reports
        ),
        NODES,
        st.sampled_from(["x", "y"]),
        INCARNATIONS,
        REPORT_LISTS,
    ),
    st.builds(c.SuspectNode, NODES, INCARNATIONS, st.integers(0, 10)),
    st.builds(c.LoseNode, NODES, INCARNATIONS, st.integers(0, 10)),
    st.builds(c.ReviveNode, NODES, INCARNATIONS, st.integers(0, 10)),
    st.builds(c.CordonNode, NODES, st.booleans()),
    st.builds(c.ExpireSandboxes, st.lists(IDS, max_size=3).map(tuple)),
)
ALLOWED = {(old, new) for (old, _), new in TRANSITIONS.items()}


class Members(RuleBasedStateMachine):
    """One member follows the log, one restores snapshots now and then, one replays at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.other = Machine()
        self.driver.run(register("n1"), register("n2"))
        self._follow()

    def _follow(self) -> tuple[object, object]:
        index = len(self.driver.log)
        return self.other.apply(index, self.driver.log[-1])

    @rule(
        items=st.lists(COMMANDS, min_size=1, max_size=5),
        after_ms=st.sampled_from([0, 1, 100, tables.TOMBSTONE_KEPT_MS, tables.REQUEST_KEPT_MS]),
    )
    def apply(self, items: list[c.Command], after_ms: int) -> None:
        before = {row.id: row for row in self.driver.machine.sandboxes()}
        results = self.driver.run(*items, after_ms=after_ms)
        assert self._follow() == (results, self.driver.events)
        for event in self.driver.events:
            if hasattr(event, "previous_state"):
                if event.previous is None:
                    assert event.row.state is SandboxState.PENDING
                    continue
                old, new = event.previous, event.row
                assert old.state == new.state or (old.state, new.state) in ALLOWED
                assert new.generation >= old.generation
                assert old.state is not SandboxState.DELETED
        for row in self.driver.machine.sandboxes():
            was = before.get(row.id)
            if was is not None and was.create_revision == row.create_revision:
                assert row.revision >= was.revision

    @rule()
    def restore_the_other(self) -> None:
        chunks = list(encode_snapshot(self.other.snapshot_view()))
        self.other = Machine.from_snapshot(chunks)
        check(self.other)

    @invariant()
    def members_agree(self) -> None:
        assert self.other.digest() == self.driver.machine.digest()
        assert self.other.pending() == self.driver.machine.pending()

    def teardown(self) -> None:
        replayed = Machine()
        for index, proposal in enumerate(self.driver.log, start=1):
            replayed.apply(index, proposal)
        assert replayed.digest() == self.driver.machine.digest()


Members.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMembers = Members.TestCase
