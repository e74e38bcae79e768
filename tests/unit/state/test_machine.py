"""What users, agents and the leader get from the state machine."""

from __future__ import annotations

import pytest

from prism_common.errors import AmbiguousError, CompactedError, NotFoundError
from prism_control.state import commands as c
from prism_control.state import tables
from prism_control.state.events import EventRing, NodeRemoved, SandboxChanged
from prism_control.state.model import (
    NOTHING,
    Amounts,
    DesiredState,
    NodeState,
    ObservedState,
    OnNodeLoss,
    PlacementRefusal,
    SandboxState,
    held_by,
    pairs,
)
from prism_control.state.node_handlers import LOST_NODE_KEPT_MS
from prism_control.state.results import Applied, Assigned, Ok, RefusalKind, Refused
from prism_control.state.sandbox_handlers import _follow
from prism_control.state.transitions import Cause
from tests.unit.state.builders import MIB, Driver, create, register, report, reports


@pytest.fixture
def driver() -> Driver:
    return Driver()


# ── Request ids ──────────────────────────────────────────────────────────────────────────────


def test_repeat_gets_the_first_result_even_after_the_sandbox_has_moved_on(driver):
    first = driver.one(create("s1", "r1", ttl_ms=60_000))
    driver.run(register())
    driver.place()
    again = driver.one(create("s2", "r1", name="name-s1", ttl_ms=60_000), after_ms=500)
    assert again == first
    assert again.sandbox.state is SandboxState.PENDING
    assert driver.machine.sandbox("s2") is None
    assert driver.events == []


def test_repeat_with_other_contents_is_refused(driver):
    driver.run(create("s1", "r1"))
    result = driver.one(c.DeleteSandbox("r1", b"other", "s1"))
    assert result.kind is RefusalKind.REQUEST_ID_REUSED
    assert result.error().code == "REQUEST_ID_REUSED"
    assert result.error().field == "request_id"
    assert driver.sandbox().state is SandboxState.PENDING


def test_repeat_in_the_same_proposal_is_one_sandbox(driver):
    first, second = driver.run(create("s1", "r1"), create("s2", "r1", name="name-s1"))
    assert first == second
    assert driver.machine.sandbox_count == 1


def test_a_refusal_is_remembered_too(driver):
    driver.run(create("s1"))
    refused = driver.one(create("s2", "r2", name="name-s1"))
    driver.run(c.DeleteSandbox("", b"", "s1"))
    assert driver.one(create("s2", "r2", name="name-s1")) == refused


def test_delete_with_request_id_repeats_its_result_when_nothing_is_left(driver):
    driver.run(create("s1"))
    first = driver.one(c.DeleteSandbox("r", b"d", "s1"))
    assert first.sandbox.state is SandboxState.DELETED
    assert driver.one(c.DeleteSandbox("r", b"d", "s1")) == first
    assert driver.one(c.DeleteSandbox("", b"d", "s1")).kind is RefusalKind.NOT_FOUND


def test_request_ids_are_kept_for_a_day_and_not_for_ever(driver):
    driver.run(create("s1", "r1"))
    driver.run(after_ms=tables.REQUEST_KEPT_MS - 1)
    assert driver.machine.snapshot_view().requests
    driver.run(after_ms=2)
    assert not driver.machine.snapshot_view().requests


def test_request_ids_have_a_bound(driver, monkeypatch):
    monkeypatch.setattr(tables, "REQUESTS_MAX", 3)
    driver.run(*(create(f"s{k}", f"r{k}") for k in range(5)))
    kept = [row.request_id for row in driver.machine.snapshot_view().requests]
    assert kept == ["r2", "r3", "r4"]


def test_time_never_goes_back_when_a_leader_with_an_earlier_clock_takes_over(driver):
    driver.run(create("s1"))
    told_ms = driver.now_ms
    row = driver.one(create("s2", ttl_ms=5000), after_ms=-3_600_000).sandbox
    assert driver.machine.now_ms == row.create_ms == told_ms
    assert row.expire_ms == told_ms + 5000
    assert driver.one(create("s3"), after_ms=3_600_001).sandbox.create_ms == told_ms + 1


# ── Create ───────────────────────────────────────────────────────────────────────────────────


def test_create_is_pending_with_its_deadline(driver):
    row = driver.one(create("s1", ttl_ms=5000)).sandbox
    assert (row.state, row.generation, row.start_count) == (SandboxState.PENDING, 1, 1)
    assert row.create_ms == driver.now_ms
    assert row.expire_ms == driver.now_ms + 5000
    assert row.revision == row.create_revision == driver.machine.revision == 1


def test_name_is_unique_until_its_owner_is_deleted(driver):
    driver.run(create("s1", name="a"))
    refused = driver.one(create("s2", name="a"))
    assert refused.reason == "ALREADY_EXISTS"
    assert refused.error().field == "name"
    driver.run(c.DeleteSandbox("", b"", "a"))
    assert isinstance(driver.one(create("s2", name="a")), Ok)
    assert driver.sandbox("a").id == "s2"


def test_one_bad_item_fails_alone(driver):
    first, bad, last = driver.run(
        create("s1", name="a"), create("s2", name="a"), create("s3", name="b")
    )
    assert isinstance(first, Ok)
    assert isinstance(bad, Refused)
    assert isinstance(last, Ok)


def test_an_id_is_never_used_again(driver):
    driver.run(create("s1", name="a"))
    assert driver.one(create("s1", name="b")).reason == "ALREADY_EXISTS"


# ── Delete, stop, start ──────────────────────────────────────────────────────────────────────


def test_delete_of_what_runs_waits_for_its_node(driver):
    driver.bring(SandboxState.READY)
    row = driver.one(c.DeleteSandbox("", b"", "name-s1", grace_ms=5000)).sandbox
    assert (row.state, row.desired, row.grace_ms) == (
        SandboxState.DELETING,
        DesiredState.DELETED,
        5000,
    )
    driver.report(ObservedState.DELETED)
    assert driver.sandbox().state is SandboxState.DELETED
    assert driver.machine.allocated("n1") == NOTHING


def test_second_delete_can_only_shorten_the_grace_period(driver):
    driver.bring(SandboxState.DELETING)
    assert driver.one(c.DeleteSandbox("", b"", "s1", grace_ms=9000)).sandbox.grace_ms == 5000
    assert driver.events == []
    assert driver.one(c.DeleteSandbox("", b"", "s1", force=True)).sandbox.grace_ms == 0


def test_delete_of_what_failed_has_its_node_clean_up(driver):
    driver.bring(SandboxState.FAILED)
    driver.run(c.DeleteSandbox("", b"", "s1"))
    assert driver.sandbox().state is SandboxState.DELETING
    assert driver.machine.allocated("n1") == Amounts(disk_bytes=256 * MIB)


def test_delete_of_what_failed_on_a_lost_node_is_done_at_once(driver):
    driver.bring(SandboxState.FAILED)
    driver.run(c.LoseNode("n1", "i1", 5))
    assert driver.sandbox().state is SandboxState.FAILED
    assert driver.one(c.DeleteSandbox("", b"", "s1")).sandbox.state is SandboxState.DELETED


def test_stop_and_start_again(driver):
    driver.bring(SandboxState.READY)
    row = driver.one(c.StopSandbox("", b"", "s1", 3000)).sandbox
    assert (row.state, row.desired, row.grace_ms) == (
        SandboxState.STOPPING,
        DesiredState.STOPPED,
        3000,
    )
    driver.report(ObservedState.STOPPED)
    assert driver.sandbox().end_ms == driver.now_ms
    assert driver.one(c.StopSandbox("", b"", "s1", 3000)).sandbox == driver.sandbox()
    row = driver.one(c.StartSandbox("", b"", "s1")).sandbox
    assert (row.state, row.desired, row.start_count, row.end_ms) == (
        SandboxState.STARTING,
        DesiredState.RUNNING,
        2,
        0,
    )


def test_report_of_the_start_before_does_not_stop_the_new_one(driver):
    driver.bring(SandboxState.STOPPED)
    driver.run(c.StartSandbox("", b"", "s1"))
    assert driver.report(ObservedState.STOPPED, start_count=1) == Applied(0, 1)
    assert driver.sandbox().state is SandboxState.STARTING
    driver.report(ObservedState.READY, start_count=2)
    assert driver.sandbox().state is SandboxState.READY


def test_removal_by_the_agent_counts_whichever_start_it_knew(driver):
    driver.bring(SandboxState.STOPPED)
    driver.run(c.StartSandbox("", b"", "s1"))
    driver.report(ObservedState.DELETED, start_count=1, reason="TTL_EXPIRED")
    row = driver.sandbox()
    assert (row.state, row.reason) == (SandboxState.DELETED, "TTL_EXPIRED")


def test_stale_ready_does_not_undo_a_stop(driver):
    driver.bring(SandboxState.READY)
    driver.run(c.StopSandbox("", b"", "s1"))
    assert driver.report(ObservedState.READY) == Applied(0, 1)


def test_unknown_sandbox_is_not_found(driver):
    for command in (
        c.DeleteSandbox("", b"", "x"),
        c.StopSandbox("", b"", "x"),
        c.StartSandbox("", b"", "x"),
    ):
        assert driver.one(command).reason == "NOT_FOUND"


# ── Placement ────────────────────────────────────────────────────────────────────────────────


def test_placement_is_void_where_the_node_cannot_take_it(driver):
    driver.run(create("s1"), create("s2", memory_bytes=4096 * MIB), register())
    place = c.AssignSandboxes(
        (
            c.Placement("s1", 2, "n1"),  # another generation
            c.Placement("s1", 1, "nowhere"),
            c.Placement("gone", 1, "n1"),
            c.Placement("s2", 1, "n1"),  # no room
        )
    )
    assert driver.one(place) == Assigned(("s1", "s1", "gone", "s2"))
    driver.run(c.CordonNode("n1", True))
    assert driver.place() == Assigned(("s1",))
    driver.run(c.CordonNode("name-n1", False), c.SuspectNode("n1", "i1", 5))
    assert driver.place() == Assigned(("s1",))
    driver.run(c.ReviveNode("n1", "i1", 6))
    assert driver.place() == Assigned()
    row = driver.sandbox()
    assert (row.node_id, row.node_name, row.schedule_ms) == ("n1", "name-n1", driver.now_ms)


@pytest.mark.parametrize(
    "need",
    [
        {"cpu_millicores": 4001},
        {"memory_bytes": 2049 * MIB},
        {"disk_bytes": 4097 * MIB},
    ],
)
def test_placement_never_overcommits_a_node(driver, need):
    driver.run(create("s1", **need), register())
    assert driver.place() == Assigned(("s1",))


def test_placement_never_takes_more_slots_than_there_are(driver):
    driver.run(register(capacity=Amounts(10**6, 10**12, 10**12, 1)), create("s1"), create("s2"))
    assert driver.place("s1") == Assigned()
    assert driver.place("s2") == Assigned(("s2",))


def test_pending_is_explained_until_it_is_placed(driver):
    driver.run(create("s1"), create("s2"), register())
    refusals = tuple(PlacementRefusal(f"n{k}", "n", "full") for k in range(20))
    explain = c.AssignSandboxes((), (c.Explanation(("s1", "s2", "gone"), "no room", refusals),))
    driver.run(explain)
    assert driver.sandbox().placement == refusals[:16]
    assert driver.sandbox().placement is driver.sandbox("s2").placement
    driver.run(explain)
    assert driver.events == []
    driver.place()
    assert driver.sandbox().placement == ()
    assert driver.sandbox().message == ""
    driver.run(explain)
    assert driver.sandbox().placement == ()


def test_pending_comes_in_order_of_priority_and_arrival(driver):
    driver.run(create("s1"), create("s2", priority=5), create("s3"), create("s4", priority=5))
    assert [row.id for row in driver.machine.pending()] == ["s2", "s4", "s1", "s3"]


# ── Nodes ────────────────────────────────────────────────────────────────────────────────────


def test_a_node_name_belongs_to_one_living_node(driver):
    driver.run(register("n1", name="a"))
    refused = driver.one(register("n2", name="a"))
    assert (refused.kind, refused.field) == (RefusalKind.ALREADY_EXISTS, "name")
    driver.run(c.LoseNode("n1", "i1", 5))
    driver.run(register("n2", name="a"))
    assert isinstance(driver.events[0], NodeRemoved)
    assert driver.events[0].revision == driver.machine.revision - 1
    assert driver.machine.node("n1") is None
    assert driver.machine.node("a").id == "n2"
    assert driver.one(register("n1", name="a")).kind is RefusalKind.ALREADY_EXISTS


def test_a_node_keeps_its_birth_and_cordon_when_it_registers_again(driver):
    driver.run(register(), c.CordonNode("n1", True))
    born_ms = driver.now_ms
    driver.run(register(name="renamed", incarnation="i2"), after_ms=500)
    node = driver.machine.node("renamed")
    assert (node.create_ms, node.cordoned, node.incarnation) == (born_ms, True, "i2")
    assert driver.machine.node("name-n1") is None


def test_cordon_is_idempotent_and_needs_a_node(driver):
    driver.run(register())
    assert driver.one(c.CordonNode("n1", True)).node.cordoned
    driver.one(c.CordonNode("n1", True))
    assert driver.events == []
    assert driver.one(c.CordonNode("x", True)).reason == "NOT_FOUND"


def test_reports_of_an_older_process_are_fenced_off(driver):
    driver.bring(SandboxState.SCHEDULED)
    driver.run(register(incarnation="i2"))
    assert driver.one(reports(report(ObservedState.READY))) == Applied(0, 1)
    assert driver.one(reports(report(ObservedState.READY), node_id="x")) == Applied(0, 1)
    stale = reports(report(ObservedState.READY, generation=0), incarnation="i2")
    assert driver.one(stale) == Applied(0, 1)
    assert driver.sandbox().state is SandboxState.SCHEDULED


def test_reports_of_a_node_that_does_not_own_it_are_fenced_off(driver):
    driver.bring(SandboxState.SCHEDULED)
    driver.run(register("n2"))
    assert driver.one(reports(report(ObservedState.READY), node_id="n2")) == Applied(0, 1)


def test_a_report_that_is_known_changes_nothing(driver):
    driver.bring(SandboxState.READY)
    assert driver.report(ObservedState.READY) == Applied(0, 0)
    assert driver.report(ObservedState.READY, runtime="fake") == Applied(1, 0)
    assert driver.sandbox().runtime == "fake"


def test_failure_keeps_its_reason_and_wants_no_restart(driver):
    driver.bring(SandboxState.READY)
    driver.report(ObservedState.FAILED, reason="OUT_OF_MEMORY", message="x" * 9999)
    row = driver.sandbox()
    assert (row.state, row.reason, row.desired) == (
        SandboxState.FAILED,
        "OUT_OF_MEMORY",
        DesiredState.STOPPED,
    )
    assert len(row.message) == 500
    assert driver.machine.allocated("n1") == Amounts(disk_bytes=256 * MIB)


def test_a_restarted_agent_keeps_what_it_adopted(driver):
    driver.bring(SandboxState.READY)
    before = driver.sandbox()
    driver.run(register(incarnation="i2", reports=(report(ObservedState.READY),)))
    assert driver.sandbox() == before


def test_what_a_node_forgot_is_lost_and_what_it_never_had_is_assigned_again(driver):
    driver.bring(SandboxState.READY, "s1")
    driver.bring(SandboxState.SCHEDULED, "s2")
    driver.bring(SandboxState.DELETING, "s3")
    driver.bring(SandboxState.READY, "s4", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(SandboxState.FAILED, "s5")
    driver.run(register(incarnation="i2"))
    lost = driver.sandbox("s1")
    assert (lost.state, lost.reason) == (SandboxState.LOST, "NODE_FORGOT")
    assert driver.sandbox("s2").state is SandboxState.SCHEDULED
    assert driver.sandbox("s3").state is SandboxState.DELETED
    assert driver.sandbox("s4").state is SandboxState.PENDING
    assert driver.sandbox("s4").generation == 2
    assert driver.sandbox("s5").state is SandboxState.FAILED
    assert [row.id for row in driver.machine.sandboxes_on("n1")] == ["s2"]


def test_loss_of_a_node_ends_its_sandboxes_as_their_policy_says(driver):
    driver.bring(SandboxState.READY, "s1")
    driver.bring(SandboxState.READY, "s2", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(SandboxState.STOPPED, "s3", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(SandboxState.DELETING, "s4")
    seen_ms = driver.now_ms - 7
    driver.run(c.LoseNode("n1", "i1", seen_ms + 100))
    lost = driver.sandbox("s1")
    assert (lost.state, lost.reason, lost.node_id) == (SandboxState.LOST, "NODE_LOST", "n1")
    assert lost.last_seen_ms == seen_ms + 100
    again = driver.sandbox("s2")
    assert (again.state, again.generation, again.node_id) == (SandboxState.PENDING, 2, "")
    # Placing a stopped one again would start it, which nobody asked for.
    assert driver.sandbox("s3").state is SandboxState.LOST
    assert driver.sandbox("s4").state is SandboxState.DELETED
    assert driver.one(c.LoseNode("n1", "i1", 5)) == Applied(0, 1)


def test_a_node_that_returns_does_not_revive_what_was_lost(driver):
    driver.bring(SandboxState.LOST)
    driver.run(register(reports=(report(ObservedState.READY),)))
    assert driver.machine.node("n1").state is NodeState.READY
    assert driver.sandbox().state is SandboxState.LOST
    assert driver.machine.sandboxes_on("n1") == []
    assert driver.one(c.DeleteSandbox("", b"", "s1")).sandbox.state is SandboxState.DELETED


def test_suspicion_and_revival_are_of_one_incarnation(driver):
    driver.run(register())
    assert driver.one(c.ReviveNode("n1", "i1", 5)) == Applied(0, 1)
    assert driver.one(c.SuspectNode("n1", "old", 5)) == Applied(0, 1)
    assert driver.one(c.SuspectNode("n1", "i1", 5)) == Applied(1, 0)
    assert driver.machine.node("n1").state is NodeState.SUSPECT
    assert driver.one(c.LoseNode("n1", "old", 5)) == Applied(0, 1)
    assert driver.one(c.LoseNode("x", "old", 5)) == Applied(0, 1)
    assert driver.one(c.ReviveNode("n1", "i1", driver.now_ms + 5)) == Applied(1, 0)
    assert driver.machine.node("n1").last_seen_ms == driver.now_ms + 5


def test_lost_nodes_are_forgotten_after_a_day(driver):
    driver.run(register("n1"), register("n2"), c.LoseNode("n1", "i1", 5), c.LoseNode("n2", "i1", 5))
    driver.run(register("n2"), after_ms=LOST_NODE_KEPT_MS + 1)
    assert [node.id for node in driver.machine.nodes()] == ["n2"]
    assert driver.machine.node("n2").create_ms < driver.now_ms


# ── Time ─────────────────────────────────────────────────────────────────────────────────────


def test_ttl_ends_what_no_agent_holds_at_once(driver):
    driver.run(create("s1", ttl_ms=1000), create("s2"), create("s3", ttl_ms=5000))
    result = driver.one(c.ExpireSandboxes(("s1", "s2", "s3", "gone")), after_ms=1000)
    assert result == Applied(1, 3)
    row = driver.sandbox()
    assert (row.state, row.reason) == (SandboxState.DELETED, "TTL_EXPIRED")
    assert driver.one(c.ExpireSandboxes(("s1",))) == Applied(0, 1)


def test_ttl_of_what_runs_ends_it_by_its_node_and_keeps_the_reason(driver):
    driver.bring(SandboxState.READY, ttl_ms=1000)
    driver.run(c.ExpireSandboxes(("s1",)), after_ms=1000)
    assert driver.sandbox().state is SandboxState.DELETING
    driver.report(ObservedState.DELETED)
    assert driver.sandbox().reason == "TTL_EXPIRED"


def test_time_never_goes_back(driver):
    driver.run(create("s1"))
    now_ms = driver.machine.now_ms
    driver.run(create("s2"), after_ms=-5000)
    assert driver.sandbox("s2").create_ms == now_ms == driver.machine.now_ms


def test_tombstones_go_after_an_hour_or_past_their_number(driver, monkeypatch):
    driver.run(create("s1"), c.DeleteSandbox("", b"", "s1"))
    driver.run(after_ms=tables.TOMBSTONE_KEPT_MS - 1)
    assert driver.sandbox().state is SandboxState.DELETED
    driver.run(after_ms=2)
    assert driver.machine.sandbox("s1") is None
    monkeypatch.setattr(tables, "TOMBSTONES_MAX", 2)
    driver.run(*(create(f"t{k}") for k in range(4)))
    driver.run(*(c.DeleteSandbox("", b"", f"t{k}") for k in range(4)))
    assert [row.id for row in driver.machine.sandboxes()] == ["t2", "t3"]


def test_old_rows_go_in_bounded_slices(driver):
    for begin in range(0, 300, 100):
        driver.run(*(create(f"s{k}", f"r{k}") for k in range(begin, begin + 100)))
    driver.run(after_ms=tables.REQUEST_KEPT_MS)
    assert len(driver.machine.snapshot_view().requests) == 300 - 64


# ── Reading ──────────────────────────────────────────────────────────────────────────────────


def test_pages_come_in_order_of_creation_and_end(driver):
    driver.run(*(create(f"s{k}", labels=(("odd", str(k % 2)),)) for k in range(7)))
    driver.run(c.DeleteSandbox("", b"", "s2"))
    page, after = driver.machine.list_page(0, 3)
    assert [row.id for row in page] == ["s0", "s1", "s3"]
    page, after = driver.machine.list_page(after, 3)
    assert [row.id for row in page] == ["s4", "s5", "s6"]
    assert after == 0
    odd = driver.machine.list_page(0, 9, lambda row: ("odd", "1") in row.spec.labels)
    assert [row.id for row in odd[0]] == ["s1", "s3", "s5"]
    assert len(driver.machine.list_page(0, 9, tombstones=True)[0]) == 7


def test_a_page_looks_at_a_bounded_number_of_rows(driver, monkeypatch):
    monkeypatch.setattr(tables, "PASSED_OVER_MAX", 4)
    driver.run(*(create(f"s{k}", labels=(("k", str(k)),)) for k in range(10)))
    pages, after = [], 0
    while not pages or after:
        rows, after = driver.machine.list_page(
            after, 3, lambda row: dict(row.spec.labels)["k"] in "079"
        )
        pages.append([row.id for row in rows])
    assert pages == [["s0"], ["s7"], ["s9"]]


def test_pages_survive_the_sweep_of_what_was_deleted(driver, monkeypatch):
    monkeypatch.setattr(tables, "TOMBSTONES_MAX", 0)
    monkeypatch.setattr(tables, "_HOLES_MIN", 4)
    driver.run(*(create(f"s{k}") for k in range(12)))
    driver.run(*(c.DeleteSandbox("", b"", f"s{k}") for k in range(4)))
    assert [row.id for row in driver.machine.list_page(0, 2)[0]] == ["s4", "s5"]
    driver.run(*(c.DeleteSandbox("", b"", f"s{k}") for k in range(4, 10)))
    driver.run(create("s1"))  # an id long gone: only its new row counts
    rows, after = driver.machine.list_page(0, 9)
    assert [row.id for row in rows] == ["s10", "s11", "s1"]
    assert after == 0


def test_an_id_used_again_is_listed_once(driver, monkeypatch):
    monkeypatch.setattr(tables, "TOMBSTONES_MAX", 0)
    driver.run(create("s1"), create("s2"))
    driver.run(c.DeleteSandbox("", b"", "s1"))
    driver.run(create("s1"))
    assert [row.id for row in driver.machine.list_page(0, 9)[0]] == ["s2", "s1"]


def test_sandboxes_and_nodes_are_found_by_unique_prefix(driver):
    driver.run(create("sb-1", name="apple"), create("sb-2", name="apricot"), register("n-1"))
    machine = driver.machine
    assert machine.find_sandbox("app").id == "sb-1"
    assert machine.find_sandbox("sb-2").name == "apricot"
    assert machine.find_sandbox("apricot").id == "sb-2"
    assert machine.find_node("n-").id == machine.find_node("name-").id == "n-1"
    assert machine.find_node("n-1").id == "n-1"
    with pytest.raises(AmbiguousError):
        machine.find_sandbox("ap")
    for nothing in ("x", ""):
        with pytest.raises(NotFoundError):
            machine.find_sandbox(nothing)
        with pytest.raises(NotFoundError):
            machine.find_node(nothing)


def test_changes_are_resumed_from_a_revision(driver):
    driver.run(register(), create("s1"), create("s2"))
    driver.place()
    events = driver.machine.changes_since(1)
    assert [event.revision for event in events] == [2, 3, 4]
    assert [event.previous_state for event in events] == [None, None, SandboxState.PENDING]
    assert driver.machine.changes_since(1, limit=1) == events[:1]
    assert driver.machine.changes_since(4) == driver.machine.changes_since(99) == []


def test_changes_that_are_not_kept_are_said_to_be_compacted():
    driver = Driver()
    driver.run(*(create(f"s{k}") for k in range(5)))
    ring = EventRing(0, capacity=3)
    for event in driver.machine.changes_since(0):
        ring.append(event)
    assert ring.compacted == 2
    assert [event.revision for event in ring.since(2, 9)] == [3, 4, 5]
    with pytest.raises(CompactedError):
        ring.since(1, 9)
    with pytest.raises(ValueError, match="after 5"):
        ring.append(SandboxChanged(driver.sandbox("s0"), None))


def test_entries_are_applied_once_and_in_order(driver):
    driver.run(create("s1"))
    driver.machine.advance(5)
    with pytest.raises(ValueError, match="comes after"):
        driver.machine.apply(5, c.Proposal(1, 1, ()))
    assert driver.machine.applied_index == 5


def test_specs_are_shared_up_to_a_bound(driver, monkeypatch):
    driver.run(create("s1"), create("s2"))
    assert driver.sandbox("s1").spec is driver.sandbox("s2").spec
    monkeypatch.setattr(tables, "_SPECS_MAX", 1)
    driver.run(create("s3", priority=1), create("s4", priority=1))
    assert driver.sandbox("s3").spec is driver.sandbox("s4").spec


def test_a_way_on_that_the_table_lacks_is_a_broken_invariant(driver):
    row = driver.bring(SandboxState.PENDING)
    with pytest.raises(ValueError, match="no way on"):
        _follow(row, Cause.DELETE)
    assert held_by(row) == NOTHING


def test_pairs_are_sorted():
    assert pairs({"b": "1", "a": "2"}) == (("a", "2"), ("b", "1"))
