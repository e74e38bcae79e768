"""The transition table is closed, and agrees with the outward contract."""

from __future__ import annotations

import itertools

import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_control.state import commands as c
from prism_control.state.model import (
    DesiredState,
    NodeState,
    ObservedState,
    OnNodeLoss,
    SandboxState,
)
from prism_control.state.results import Applied, Assigned, Ok, Refused
from prism_control.state.transitions import CAUSE_OF_REPORT, TRANSITIONS, Cause, next_state
from tests.unit.state.builders import Driver, create, register, report, reports


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (SandboxState, sandbox_pb2.SandboxState, "SANDBOX_STATE_"),
        (OnNodeLoss, sandbox_pb2.OnNodeLoss, "ON_NODE_LOSS_"),
        (NodeState, node_pb2.NodeState, "NODE_STATE_"),
        (DesiredState, agent_pb2.DesiredState, "DESIRED_STATE_"),
        (ObservedState, agent_pb2.ObservedState, "OBSERVED_STATE_"),
    ],
)
def test_enums_have_the_numbers_of_the_protos(ours, theirs, prefix):
    expected = {name.removeprefix(prefix): number for name, number in theirs.items() if number}
    assert {one.name: int(one) for one in ours} == expected


def test_lookup_agrees_with_the_table():
    for state, cause in itertools.product(SandboxState, Cause):
        assert next_state(state, cause) is TRANSITIONS.get((state, cause))


def test_deleted_is_an_end_and_lost_leads_only_there():
    assert not any(state is SandboxState.DELETED for state, _ in TRANSITIONS)
    ends = {new for (state, _), new in TRANSITIONS.items() if state is SandboxState.LOST}
    assert ends == {SandboxState.DELETED}


def test_every_live_state_can_be_deleted():
    for state in SandboxState:
        if state is not SandboxState.DELETED:
            causes = {Cause.DELETE, Cause.REMOVE}
            assert any((state, cause) in TRANSITIONS for cause in causes), state


COMMANDS = [
    c.DeleteSandbox("", b"", "s1"),
    c.DeleteSandbox("", b"", "s1", force=True),
    c.StopSandbox("", b"", "s1", 1000),
    c.StartSandbox("", b"", "s1"),
    c.AssignSandboxes((c.Placement("s1", 1, "n1"),)),
    c.ExpireSandboxes(("s1",)),
    c.LoseNode("n1", "i1", 5),
    register(),
    register(incarnation="i2"),
    create("s1"),
    *(reports(report(state)) for state in ObservedState),
    *(register(reports=(report(state),)) for state in ObservedState),
]
REACHED = [state for state in SandboxState if state is not SandboxState.PAUSED]


@pytest.mark.parametrize("policy", list(OnNodeLoss))
@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.name)
def test_every_command_has_an_outcome_in_every_state(state, policy):
    allowed = {(old, new) for (old, _), new in TRANSITIONS.items()}
    for command in COMMANDS:
        driver = Driver()
        if state is SandboxState.LOST:
            before = driver.bring(state, on_node_loss=OnNodeLoss.LOST, ttl_ms=1)
        else:
            before = driver.bring(state, on_node_loss=policy, ttl_ms=1)
        driver.one(command, after_ms=10)  # also checks the invariants
        after = driver.sandbox()
        steps = [event for event in driver.events if getattr(event.row, "id", "") == "s1"]
        for event in steps:
            assert (event.previous_state, event.row.state) in allowed, command
        assert steps or after == before


@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.name)
def test_users_commands_are_done_or_refused_as_the_table_says(state):
    for command, cause in (
        (c.StopSandbox("", b"", "s1", 1000), Cause.STOP),
        (c.StartSandbox("", b"", "s1"), Cause.START),
    ):
        driver = Driver()
        driver.bring(state)
        result = driver.one(command)
        if (state, cause) in TRANSITIONS:
            assert isinstance(result, Ok)
            assert result.sandbox.state is TRANSITIONS[state, cause]
            assert result.sandbox == driver.sandbox()
        else:
            assert isinstance(result, Refused)
            wanted = "NOT_FOUND" if state is SandboxState.DELETED else "WRONG_STATE"
            assert result.reason == result.error().code == wanted


@pytest.mark.parametrize("observed", list(ObservedState), ids=lambda one: one.name)
@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.name)
def test_reports_are_taken_or_ignored_as_the_table_says(state, observed):
    driver = Driver()
    before = driver.bring(state)
    result = driver.one(reports(report(observed)))
    expected = TRANSITIONS.get((state, CAUSE_OF_REPORT[observed]))
    if state in (SandboxState.PENDING, SandboxState.LOST) or expected is None:
        assert result == Applied(0, 1)
        assert driver.sandbox() == before
    else:
        assert result.ignored == 0
        assert driver.sandbox().state is expected


@pytest.mark.parametrize("state", REACHED, ids=lambda state: state.name)
def test_only_pending_is_placed(state):
    driver = Driver()
    driver.bring(state)
    result = driver.one(c.AssignSandboxes((c.Placement("s1", 1, "n1"),)))
    assert result == (Assigned() if state is SandboxState.PENDING else Assigned(("s1",)))
