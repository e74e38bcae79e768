"""An agent's session with the leader, from its registration to its end."""

import asyncio
import contextlib

import pytest
from prism.agent.v1 import agent_pb2

from prism_common.errors import (
    InvalidArgumentError,
    NotLeaderError,
    StoppingError,
    WrongStateError,
)
from prism_control.state import commands
from prism_control.state.model import NodeState, SandboxState
from tests.unit.control.sessions import (
    READY,
    Agent,
    Control,
    joined,
    register,
)


async def test_register_welcome_all_that_is_assigned_and_then_changes(control: Control) -> None:
    agent = await joined(control)
    batch = await agent.get("assignments")
    assert (batch.complete, batch.term, list(batch.assignments)) == (True, 3, [])
    control.place("sb-1")
    batch = await agent.get("assignments")
    assert not batch.complete
    ((key, desired),) = [(a.sandbox_id, a.desired) for a in batch.assignments]
    assert (key, desired) == ("sb-1", agent_pb2.DESIRED_STATE_RUNNING)

    agent.report(7, agent_pb2.SandboxReport(sandbox_id="sb-1", generation=1, state=READY,
                                            start_count=1))  # fmt: skip
    assert (await agent.get("report_ack")).sequence == 7
    row = control.machine.sandbox("sb-1")
    assert row is not None
    assert row.state is SandboxState.READY
    agent.send(None)
    await agent.task


async def test_a_reconnect_gets_everything_again(control: Control) -> None:
    first = await joined(control)
    await first.get("assignments")
    control.place("sb-1")
    await first.get("assignments")
    first.send(None)
    await first.task
    control.place("sb-2")
    second = await joined(control, "sb-1")
    batch = await second.get("assignments")
    assert batch.complete
    assert {a.sandbox_id for a in batch.assignments} == {"sb-1", "sb-2"}


async def test_heartbeats_are_heard_and_answered(control: Control) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    agent.heartbeat(41, 0.75)
    assert (await agent.get("heartbeat_ack")).sequence == 41
    assert control.loads == {"node-1": 0.75}


async def test_acknowledgements_and_assignments_share_the_stream_one_at_a_time(
    control: Control,
) -> None:
    agent = await joined(control)
    for number in range(200):
        agent.heartbeat(number)
        agent.report(number, agent_pb2.SandboxReport(sandbox_id="nothing", state=READY))
        control.place(f"sb-{number}")
    seen = {"heartbeat_ack": 0, "report_ack": 0, "assignments": 0}
    while seen["heartbeat_ack"] < 200 or seen["report_ack"] < 200:
        kind = (response := await agent._responses.get()).WhichOneof("response")
        assert kind is not None
        seen[kind] += 1
        del response
    assert seen["assignments"] > 0
    assert not agent.task.done()


async def test_reports_are_acknowledged_only_once_committed(control: Control) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    control.refusal = StoppingError("not committed")
    agent.report(1, agent_pb2.SandboxReport(sandbox_id="sb-1", state=READY))
    assert (await agent.failure()).code == "STOPPING"
    assert agent._responses.empty()


async def test_what_an_agent_says_is_cut_to_what_the_state_may_hold(control: Control) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    agent.report(
        1,
        agent_pb2.SandboxReport(
            sandbox_id="sb-1", state=READY, reason="R" * 5000, message="m" * 2_000_000
        ),
        agent_pb2.SandboxReport(sandbox_id="sb-2", state=99),  # type: ignore[arg-type]
    )
    await agent.get("report_ack")
    command = control.submitted[-1]
    assert isinstance(command, commands.ReportSandboxes)
    (report,) = command.reports
    assert (len(report.reason), len(report.message)) == (64, 1024)


async def test_too_many_reports_in_a_batch_end_the_session(control: Control) -> None:
    agent = await joined(control)
    agent.report(1, *[agent_pb2.SandboxReport(sandbox_id="x", state=READY)] * 1001)
    assert isinstance(await agent.failure(), InvalidArgumentError)


async def test_a_second_registration_in_a_session_ends_it(control: Control) -> None:
    agent = await joined(control)
    agent.send(agent_pb2.SessionRequest(register=register()))
    with pytest.raises(BaseExceptionGroup) as caught:
        await agent.task
    assert caught.group_contains(InvalidArgumentError, depth=None)


async def test_a_second_session_takes_the_place_of_the_first(control: Control) -> None:
    first = await joined(control)
    await first.get("assignments")
    second = await joined(control)
    assert "another session" in (await first.failure()).message
    assert (await second.get("assignments")).complete
    control.place("sb-1")
    assert len((await second.get("assignments")).assignments) == 1
    assert first._responses.empty()


async def test_another_node_of_the_same_name_is_refused(control: Control) -> None:
    await joined(control)
    message = register()
    message.node_id = "node-2"
    assert (await Agent(control, message).failure()).code == "ALREADY_EXISTS"


async def test_an_agent_that_has_seen_a_higher_term_is_refused(control: Control) -> None:
    failure = await Agent(control, register(term=4)).failure()
    assert isinstance(failure, WrongStateError)
    assert control.submitted == []


async def test_a_node_that_was_given_up_must_register_anew(control: Control) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    control.run(commands.LoseNode("node-1", "i1", 0))
    agent.heartbeat(1)
    assert "register" in (await agent.failure()).message
    await joined(control)
    node = control.machine.node("node-1")
    assert node is not None
    assert node.state is NodeState.READY


@pytest.mark.parametrize("under_way", [False, True])
async def test_leaving_office_ends_all_sessions(control: Control, under_way: bool) -> None:
    """Also one whose report waits for a commit that will never be."""
    agent = await joined(control)
    await agent.get("assignments")
    if under_way:
        control.hang = True
        agent.report(1, agent_pb2.SandboxReport(sandbox_id="sb-1", state=READY))
        while len(control.submitted) < 2:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0)
    control.dispatcher.leave(NotLeaderError("gone", metadata={"leader": "c:3"}))
    failure = await agent.failure()
    assert (failure.code, failure.metadata) == ("NOT_LEADER", {"leader": "c:3"})
    refused = await Agent(control, register()).failure()
    assert refused.code == "NOT_LEADER"


async def test_leaving_while_one_registers_refuses_it(control: Control) -> None:
    agent = Agent(control, register())
    await asyncio.sleep(0)
    control.dispatcher.leave(NotLeaderError("gone"))
    assert (await agent.failure()).code == "NOT_LEADER"
    # And so does a new office that has begun meanwhile.
    control.open(5)
    again = Agent(control, register(term=3))
    await asyncio.sleep(0)
    control.open(6)
    assert (await again.failure()).code == "NOT_LEADER"


async def test_sessions_leave_nothing_behind(control: Control) -> None:
    for _ in range(5):
        agent = await joined(control)
        agent.send(None)
        await agent.task
    agent = await joined(control)
    agent.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await agent.task
    assert control.dispatcher._sessions == {}
    assert control.dispatcher._dispatch.agent("node-1") is None


async def test_where_a_commit_has_something_for_many_agents_the_next_shares_its_messages(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    # As if this agent were the thousandth.
    monkeypatch.setattr("prism_control.dispatch._AGENTS_AT_ONCE", -1000)
    began = asyncio.get_running_loop().time()
    for number in range(3):
        control.place(f"sb-{number}")
        for _ in range(20):
            await asyncio.sleep(0)
    batch = await agent.get("assignments")
    assert [each.sandbox_id for each in batch.assignments] == ["sb-0", "sb-1", "sb-2"]
    assert asyncio.get_running_loop().time() - began >= 1.0
    monkeypatch.setattr("prism_control.dispatch._AGENTS_AT_ONCE", 1)
    control.place("sb-3")
    assert len((await agent.get("assignments")).assignments) == 1


async def test_few_assignments_go_at_once_and_many_share_messages(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await joined(control)
    await agent.get("assignments")
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        for pause in ("_PAUSE_S", "_PAUSE_BUSY_S"):
            patch.setattr(f"prism_control.dispatch.{pause}", 60.0)
        for number in range(20):
            control.place(f"few-{number}")
            # One that waited for company would not come.
            assert len((await agent.get("assignments")).assignments) == 1

    monkeypatch.setattr("prism_control.dispatch._AT_ONCE_PER_S", 0.0)
    while control.dispatcher._at_once.take(loop.time()):
        pass  # other agents have been sent many
    for number in range(40):
        control.place(f"many-{number}")
        await asyncio.sleep(0)
    sent, messages = 0, 0
    while sent < 40:
        sent += len((await agent.get("assignments")).assignments)
        messages += 1
    assert messages < 25
