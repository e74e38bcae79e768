"""An agent's session with the leader, from its registration to its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prism.node.v1 import node_pb2
from prometheus_client import CollectorRegistry

from prism_agent.registration import registration_messages
from prism_common import channels, limits
from prism_common.addresses import Address
from prism_common.errors import (
    InvalidArgumentError,
    NotLeaderError,
    PrismError,
    StoppingError,
    WrongStateError,
)
from prism_common.server import CallMetrics, RpcServer
from prism_common.signal import Signal
from prism_common.status import from_rpc_error
from prism_control.api.gateway import GatewayServicer
from prism_control.dispatch import Dispatcher, Office
from prism_control.metrics import LeaderMetrics
from prism_control.rows import amounts_of, runtime_of
from prism_control.scheduler.liveness import Liveness
from prism_control.state import commands
from prism_control.state.commands import Command, Placement
from prism_control.state.machine import Machine
from prism_control.state.model import NodeState, ObservedState, SandboxState
from prism_control.state.results import Result
from tests.unit.state.builders import create

READY = agent_pb2.OBSERVED_STATE_READY


class Control:
    """The leader's side: a machine that commits at once, or not, as a test has it."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.dispatcher = Dispatcher(LeaderMetrics(CollectorRegistry()))
        self.submitted: list[Command] = []
        self.refusal: PrismError | None = None
        self.hang = False
        self.loads: dict[str, float] = {}
        self.liveness = Liveness((), 0)
        self.open(3)

    def open(self, term: int) -> None:
        self.liveness = Liveness(self.machine.nodes(), 0)
        self.dispatcher.open(
            Office(
                cluster_id="cl-1",
                term=term,
                machine=self.machine,
                liveness=self.liveness,
                submit=self.submit,
                heard_load=self.loads.__setitem__,
                control_addresses=["a:1", "b:2"],
            )
        )

    async def submit(self, command: Command, size: int) -> Result:
        assert size > 0
        self.submitted.append(command)
        if self.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        return self.run(command)

    def run(self, command: Command) -> Result:
        index = self.machine.applied_index + 1
        proposal = commands.Proposal(1, 1000 + index, (command,))
        (result,), events = self.machine.apply(index, commands.encode(proposal))
        self.liveness.observe(events, 0)
        self.dispatcher.observe(events)
        return result

    def place(self, sandbox_id: str, node_id: str = "node-1") -> None:
        self.run(create(sandbox_id))
        self.run(commands.AssignSandboxes((Placement(sandbox_id, 1, node_id),)))


def register(term: int = 0, incarnation: str = "i1", *has: str) -> agent_pb2.Register:
    return agent_pb2.Register(
        node_id="node-1",
        name="worker",
        incarnation=incarnation,
        address="127.0.0.1:7117",
        capacity=node_pb2.ResourceAmounts(
            cpu_millicores=64_000, memory_bytes=2**40, disk_bytes=2**40, slots=1000
        ),
        runtimes=[node_pb2.RuntimeStatus(name="fake", ready=True)],
        version="0.1.0",
        term=term,
        sandboxes=[
            agent_pb2.SandboxReport(sandbox_id=key, generation=1, state=READY, start_count=1)
            for key in has
        ],
    )


def node_of(message: agent_pb2.Register) -> commands.RegisterNode:
    return commands.RegisterNode(
        message.node_id, message.name, message.incarnation, message.address,
        amounts_of(message.capacity), tuple(map(runtime_of, message.runtimes)), (),
        message.version, 15_000, 5_000,
    )  # fmt: skip


def report_ready(sandbox_id: str) -> commands.ReportSandboxes:
    seen = commands.Report(sandbox_id, 1, ObservedState.READY, runtime="fake")
    return commands.ReportSandboxes("node-1", "i1", (seen,))


class Agent:
    """The agent's side of one session."""

    def __init__(self, control: Control, message: agent_pb2.Register) -> None:
        self._requests: asyncio.Queue[agent_pb2.SessionRequest | None] = asyncio.Queue()
        self._responses: asyncio.Queue[agent_pb2.SessionResponse] = asyncio.Queue()
        self._writing = False
        self.task = asyncio.get_running_loop().create_task(
            control.dispatcher.serve(message, self._read(), self._write)
        )

    async def _read(self) -> AsyncIterator[agent_pb2.SessionRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _write(self, response: agent_pb2.SessionResponse | bytes) -> None:
        if isinstance(response, bytes):
            response = agent_pb2.SessionResponse.FromString(response)
        # As gRPC has it: one write at a time.
        assert not self._writing
        self._writing = True
        await asyncio.sleep(0)
        self._writing = False
        self._responses.put_nowait(response)

    def send(self, request: agent_pb2.SessionRequest | None) -> None:
        self._requests.put_nowait(request)

    def report(self, sequence: int, *items: agent_pb2.SandboxReport) -> None:
        batch = agent_pb2.ReportBatch(sequence=sequence, reports=items)
        self.send(agent_pb2.SessionRequest(reports=batch))

    def heartbeat(self, sequence: int, load: float = 0.0) -> None:
        beat = agent_pb2.Heartbeat(sequence=sequence, load_per_core=load)
        self.send(agent_pb2.SessionRequest(heartbeat=beat))

    async def get(self, kind: str) -> Any:
        response = await self._responses.get()
        assert response.WhichOneof("response") == kind
        return getattr(response, kind)

    async def failure(self) -> PrismError:
        with pytest.raises(PrismError) as caught:
            await self.task
        return caught.value


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    async with asyncio.timeout(10):
        yield Control()


async def joined(control: Control, *has: str) -> Agent:
    agent = Agent(control, register(0, "i1", *has))
    welcome = await agent.get("welcome")
    assert (welcome.term, welcome.cluster_id) == (3, "cl-1")
    assert list(welcome.control_addresses) == ["a:1", "b:2"]
    assert welcome.lease.ToMilliseconds() > welcome.heartbeat_interval.ToMilliseconds() > 0
    return agent


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


# ── Through the gateway ──────────────────────────────────────────────────────────────────────────


class View:
    leads = True
    leader_api_address = ""
    changed = Signal()


@pytest.fixture
async def gateway(control: Control) -> AsyncIterator[tuple[View, agent_pb2_grpc.AgentGatewayStub]]:
    view = View()
    server = RpcServer(Address("127.0.0.1", 0), "--api", CallMetrics(CollectorRegistry()))
    server.add(
        agent_pb2_grpc.add_AgentGatewayServicer_to_server,
        GatewayServicer(view, control.dispatcher),
    )
    address = server.bind()
    await server.start([])
    async with channels.open_channel(str(address)) as channel:
        yield view, agent_pb2_grpc.AgentGatewayStub(channel)
    await server.stop(0)


async def _refused(stub: Any, request: agent_pb2.SessionRequest) -> PrismError:
    call = stub.Session(timeout=5)
    await call.write(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return from_rpc_error(caught.value)


async def test_a_session_over_grpc_under_load(
    control: Control, gateway: tuple[View, Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, stub = gateway
    call = stub.Session()
    await call.write(agent_pb2.SessionRequest(register=register()))
    assert (await call.read()).HasField("welcome")

    async def talk() -> None:
        for number in range(300):
            await call.write(
                agent_pb2.SessionRequest(heartbeat=agent_pb2.Heartbeat(sequence=number))
            )
            control.place(f"sb-{number}")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(talk())
        acknowledged = 0
        while acknowledged < 300:
            acknowledged += (await call.read()).HasField("heartbeat_ack")
    call.cancel()
    while control.dispatcher._sessions:  # noqa: ASYNC110 - it has no event of its own
        await asyncio.sleep(0.001)
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.ClearField("name"), "register.name"),
        (lambda r: r.ClearField("node_id"), "register.node_id"),
        (lambda r: setattr(r, "incarnation", "x" * 65), "register.incarnation"),
        (lambda r: setattr(r, "address", "x" * 261), "register.address"),
        (lambda r: r.labels.update({"-": ""}), "register.labels"),
    ],
)
async def test_a_registration_is_checked(
    gateway: tuple[View, Any], change: Callable[[agent_pb2.Register], None], field: str
) -> None:
    message = register()
    change(message)
    failure = await _refused(gateway[1], agent_pb2.SessionRequest(register=message))
    assert (failure.code, failure.field) == ("INVALID_ARGUMENT", field)


async def test_very_many_sandboxes_are_registered_in_parts(
    control: Control, gateway: tuple[View, Any]
) -> None:
    control.run(node_of(register()))
    for key in ("first", "last", "gone"):
        control.place(key)
        control.run(report_ready(key))
    many = [f"sb-{number:026}" for number in range(90_000)]
    messages = registration_messages(register(0, "i2", "first", *many, "last"))
    assert len(messages) > 3
    assert max(message.ByteSize() for message in messages) < limits.MESSAGE_BYTES_MAX
    call = gateway[1].Session()
    for message in messages:
        await call.write(message)
    assert (await call.read()).HasField("welcome")
    call.cancel()
    states = {key: control.machine.sandbox(key).state for key in ("first", "last", "gone")}  # type: ignore[union-attr]
    assert states == {
        "first": SandboxState.READY, "last": SandboxState.READY, "gone": SandboxState.LOST
    }  # fmt: skip
    registered = control.submitted[-1]
    assert isinstance(registered, commands.RegisterNode)
    assert len(registered.reports) == 90_002


async def test_few_sandboxes_are_registered_in_one_message_as_ever() -> None:
    message = register(0, "i1", *(f"sb-{number:026}" for number in range(1000)))
    (only,) = registration_messages(message)
    assert only.register == message


async def test_a_registration_is_bounded(
    gateway: tuple[View, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_control.api.gateway._REGISTER_BYTES_MAX", 1000)
    part = agent_pb2.RegisterPart(sandboxes=register(0, "i1", *map(str, range(200))).sandboxes)
    failure = await _refused(gateway[1], agent_pb2.SessionRequest(register_part=part))
    assert (failure.code, failure.field) == ("INVALID_ARGUMENT", "register.sandboxes")


async def test_a_follower_refuses_at_the_first_part(gateway: tuple[View, Any]) -> None:
    view, stub = gateway
    view.leads = False
    part = agent_pb2.SessionRequest(register_part=agent_pb2.RegisterPart())
    assert (await _refused(stub, part)).code == "NOT_LEADER"


async def test_a_session_begins_with_a_registration(gateway: tuple[View, Any]) -> None:
    beat = agent_pb2.SessionRequest(heartbeat=agent_pb2.Heartbeat())
    assert (await _refused(gateway[1], beat)).code == "INVALID_ARGUMENT"


async def test_a_stream_that_says_nothing_is_not_kept(
    gateway: tuple[View, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_control.api.gateway._REGISTER_TIMEOUT_S", 0.05)
    call = gateway[1].Session()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_follower_names_the_leader(gateway: tuple[View, Any]) -> None:
    view, stub = gateway
    view.leads, view.leader_api_address = False, "leader:8008"
    failure = await _refused(stub, agent_pb2.SessionRequest(register=register()))
    assert (failure.code, failure.metadata) == ("NOT_LEADER", {"leader": "leader:8008"})
    assert failure.retry_after_s
