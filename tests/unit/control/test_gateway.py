"""Agents' sessions over gRPC: how they begin, what is refused, and where to go instead."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2, agent_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_agent.registration import registration_messages
from prism_common import channels, limits
from prism_common.addresses import Address
from prism_common.calls import CallMetrics
from prism_common.errors import (
    PrismError,
)
from prism_common.server import RpcServer
from prism_common.signal import Signal
from prism_common.status import from_rpc_error
from prism_control.api.gateway import GatewayServicer
from prism_control.state import commands
from prism_control.state.model import SandboxState
from tests.unit.control.sessions import (
    Control,
    node_of,
    register,
    report_ready,
)


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
