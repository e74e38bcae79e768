"""Labels and deadlines that change, pauses, and nodes that drain."""

from __future__ import annotations

import pytest

from prism_common.limits import LABELS_MAX
from prism_control.state import commands as c
from prism_control.state.model import (
    DesiredState,
    ObservedState,
    OnNodeLoss,
    SandboxState,
    pairs,
)
from prism_control.state.results import Applied, NodeOk, RefusalKind, Refused
from tests.unit.state.builders import Driver, create, register, report, reports

S = SandboxState


def test_update_sets_and_removes_labels_and_moves_the_deadline():
    driver = Driver()
    driver.bring(S.READY, labels=pairs({"a": "1", "b": "2"}))
    row = driver.one(
        c.UpdateSandbox("", b"", "s1", pairs({"a": "", "c": "3"}), driver.now_ms + 9000)
    ).sandbox
    assert row.spec.labels == (("b", "2"), ("c", "3"))
    assert row.expire_ms == driver.now_ms + 9000
    revision = row.revision
    assert driver.one(c.UpdateSandbox("", b"", "s1")).sandbox.revision == revision
    assert driver.machine.allocated("n1").slots == 1


def test_update_is_refused_where_nothing_can_change():
    driver = Driver()
    driver.bring(S.DELETING)
    assert driver.one(c.UpdateSandbox("", b"", "s1")).kind is RefusalKind.WRONG_STATE
    assert driver.one(c.UpdateSandbox("", b"", "nobody")).kind is RefusalKind.NOT_FOUND
    driver.run(create("s2", labels=pairs({f"k{i}": "v" for i in range(LABELS_MAX)})))
    refused = driver.one(c.UpdateSandbox("", b"", "s2", (("more", "v"),)))
    assert (refused.kind, refused.field) == (RefusalKind.INVALID, "labels")


def test_pause_and_resume_are_what_the_node_says():
    driver = Driver()
    driver.bring(S.READY)
    row = driver.one(c.PauseSandbox("", b"", "s1")).sandbox
    assert (row.state, row.desired) == (S.READY, DesiredState.PAUSED)
    driver.report(ObservedState.PAUSED)
    assert driver.sandbox().state is S.PAUSED
    assert driver.one(c.PauseSandbox("", b"", "s1")).sandbox == driver.sandbox()
    row = driver.one(c.ResumeSandbox("", b"", "s1")).sandbox
    assert (row.state, row.desired) == (S.PAUSED, DesiredState.RUNNING)
    driver.report(ObservedState.READY)
    assert driver.sandbox().state is S.READY


@pytest.mark.parametrize("state", [S.PENDING, S.STARTING, S.STOPPED, S.FAILED, S.LOST])
def test_pause_and_resume_need_a_sandbox_that_runs(state):
    driver = Driver()
    driver.bring(state)
    for command in (c.PauseSandbox("", b"", "s1"), c.ResumeSandbox("", b"", "s1")):
        result = driver.one(command)
        assert isinstance(result, Refused)
        assert result.kind is RefusalKind.WRONG_STATE


def draining() -> Driver:
    driver = Driver()
    driver.bring(S.READY, "s1", on_node_loss=OnNodeLoss.RESCHEDULE)
    driver.bring(S.READY, "s2")
    result = driver.one(c.DrainNode("name-n1", 5000))
    assert isinstance(result, NodeOk)
    assert result.node.cordoned
    return driver


MOVE = c.MoveSandboxes("n1", ("s1", "s2", "nobody"))


def test_drain_moves_what_may_move_and_ends_the_rest_at_the_deadline():
    driver = draining()
    assert driver.one(MOVE) == Applied(1, 2)
    moving, stays = driver.sandbox("s1"), driver.sandbox("s2")
    assert (moving.state, moving.desired, moving.reason) == (
        S.STOPPING, DesiredState.STOPPED, "NODE_DRAINED",
    )  # fmt: skip
    assert stays.state is S.READY
    driver.report(ObservedState.STOPPED)
    moved = driver.sandbox("s1")
    assert (moved.state, moved.generation, moved.node_id) == (S.PENDING, 2, "")
    assert driver.one(MOVE, after_ms=5000) == Applied(1, 2)
    ended = driver.sandbox("s2")
    assert (ended.state, ended.reason) == (S.DELETING, "NODE_DRAINED")
    assert driver.one(MOVE) == Applied(0, 3)


def test_nothing_moves_off_a_node_that_does_not_drain():
    driver = Driver()
    driver.bring(S.READY, "s1", on_node_loss=OnNodeLoss.RESCHEDULE)
    assert driver.one(MOVE) == Applied(0, 3)


def test_one_that_moves_is_placed_anew_only_when_its_node_says_that_it_runs_no_more():
    driver = draining()
    driver.run(MOVE)
    for observed in (ObservedState.READY, ObservedState.STOPPING):
        driver.report(observed)
        row = driver.sandbox("s1")
        assert (row.state, row.generation, row.reason) == (S.STOPPING, 1, "NODE_DRAINED")
    # Not even the deadline changes that.
    assert driver.one(c.MoveSandboxes("n1", ("s1",)), after_ms=9000) == Applied(0, 1)
    driver.report(ObservedState.FAILED)
    assert (driver.sandbox("s1").state, driver.sandbox("s1").generation) == (S.PENDING, 2)


def test_one_that_moves_off_a_node_that_is_lost_is_placed_anew():
    driver = draining()
    driver.run(MOVE)
    driver.run(c.LoseNode("n1", "i1", driver.now_ms))
    assert (driver.sandbox("s1").state, driver.sandbox("s1").generation) == (S.PENDING, 2)


def test_one_that_is_stopped_while_it_moves_stays_stopped():
    driver = draining()
    driver.run(MOVE)
    assert driver.one(c.StopSandbox("", b"", "s1")).sandbox.state is S.STOPPING
    driver.report(ObservedState.STOPPED)
    row = driver.sandbox("s1")
    assert (row.state, row.generation, row.node_id) == (S.STOPPED, 1, "n1")


def test_one_that_is_deleted_while_it_moves_is_gone():
    driver = draining()
    driver.run(MOVE)
    driver.run(c.DeleteSandbox("", b"", "s1"))
    driver.report(ObservedState.DELETED)
    assert driver.sandbox("s1").state is S.DELETED


def test_logs_of_version_2_move_at_once():
    """What members of that version have applied must come out the same here."""
    driver = draining()
    driver.run(c.EvictSandboxes("n1", ("s1",)))
    assert (driver.sandbox("s1").state, driver.sandbox("s1").generation) == (S.PENDING, 2)


def test_a_node_drains_until_it_is_uncordoned_also_over_registrations():
    driver = Driver()
    driver.run(register())
    driver.run(c.DrainNode("n1", 5000))
    driver.run(register(incarnation="i2"))
    node = driver.machine.find_node("n1")
    assert node.cordoned
    assert node.drain_ms
    driver.run(c.CordonNode("n1", cordoned=True))
    assert driver.machine.find_node("n1").drain_ms == node.drain_ms
    driver.run(c.CordonNode("n1", cordoned=False))
    node = driver.machine.find_node("n1")
    assert not node.cordoned
    assert not node.drain_ms
    assert driver.one(c.DrainNode("nobody")).kind is RefusalKind.NOT_FOUND


def test_a_proposal_has_the_lowest_version_that_can_apply_it():
    assert c.propose(1, (create(), c.CordonNode("n1", cordoned=True))).version == 1
    assert c.propose(1, (create(), c.DrainNode("n1"))).version == 2
    assert c.propose(1, (c.PauseSandbox("", b"", "s1"),)).version == 2
    assert c.propose(1, (create(), MOVE)).version == 3
    assert c.propose(1, ()).version == 1
    assert c.propose(1, (reports(report(ObservedState.READY)),)).version == 1
    assert c.propose(1, (reports(report(ObservedState.PAUSED)),)).version == 2
