"""Published ports: connections into a sandbox that has no network."""

import asyncio
import contextlib
import os

import grpc
import grpc.aio
import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_common.status import from_rpc_error
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.ports import ECHO, PortCall, listen
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, READY, until

#: Sends without end.
_FLOOD = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("up", flush=True)
connection = listener.accept()[0]
sent = 0
try:
    while True:
        sent += connection.send(bytes(65536))
        print(sent, flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""
#: Says how a connection ended.
_ENDING = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("up", flush=True)
connection = listener.accept()[0]
try:
    while connection.recv(65536):
        pass
    print("end", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


async def _refused(call: PortCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.connect()
    remote = from_rpc_error(caught.value)
    return remote.status_code, remote.code


async def test_bytes_and_half_closes_pass_both_ways_on_many_connections(
    agent: AgentProcess, sandbox: str
) -> None:
    servers = [
        await listen(agent, sandbox, ECHO, 8000),
        await listen(agent, sandbox, ECHO, 8001, "::1"),
    ]
    data = os.urandom(3_000_000)
    for port in (8000, 8001):
        call = await PortCall(agent.stub, sandbox, port).connect()
        for begin in range(0, len(data), 500_000):
            await call.send(data[begin : begin + 500_000])
        await call.send_eof()
        assert await call.receive_all() == data + b"|3000000"
        await call.finish()

    async def one(number: int) -> None:
        call = await PortCall(agent.stub, sandbox, 8000).connect()
        await call.send(b"%d" % number)
        await call.send_eof()
        assert (await call.receive_all()).startswith(b"%d|" % number)
        await call.finish()

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(one(number))
    # Only threads that have ended were ever in the sandbox's namespace.
    ours = os.readlink("/proc/self/ns/net")

    def elsewhere() -> list[str]:
        found = []
        for thread in os.listdir(f"/proc/{agent.pid}/task"):
            with contextlib.suppress(OSError):  # it is ending
                found.append(os.readlink(f"/proc/{agent.pid}/task/{thread}/ns/net"))
        return [each for each in found if each != ours]

    await until(lambda: not elsewhere())
    for server in servers:
        server.cancel()


async def test_what_cannot_be_connected_to_is_said(
    gateway: Gateway, agent: AgentProcess, sandbox: str
) -> None:
    wrong = grpc.StatusCode.FAILED_PRECONDITION
    assert await _refused(PortCall(agent.stub, sandbox, 8000)) == (wrong, "PORT_CLOSED")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for port in (0, -1, 65_536):
        assert (await _refused(PortCall(agent.stub, sandbox, port)))[0] is invalid
    missing = await _refused(PortCall(agent.stub, "sb-none", 8000))
    assert missing[0] is grpc.StatusCode.NOT_FOUND
    server = await listen(agent, sandbox, ECHO, 8000)
    for bad in (
        sandbox_pb2.ForwardPortRequest(data=bytes(1024 * 1024 + 1)),
        sandbox_pb2.ForwardPortRequest(start=sandbox_pb2.ForwardPortStart(sandbox=sandbox)),
    ):
        call = await PortCall(agent.stub, sandbox, 8000).connect()
        await call._call.write(bad)
        assert (await call.failure()).code() is grpc.StatusCode.INVALID_ARGUMENT
    server.cancel()
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_STOPPED)
    assert await _refused(PortCall(agent.stub, sandbox, 8000)) == (wrong, "WRONG_STATE")


async def test_a_client_that_does_not_read_holds_the_sandbox_up_and_not_the_agent(
    agent: AgentProcess, sandbox: str
) -> None:
    server = await listen(agent, sandbox, _FLOOD, 8000)
    call = await PortCall(agent.stub, sandbox, 8000).connect()

    def sent() -> int:
        lines = server.so_far.stdout.split()
        return int(lines[-1]) if len(lines) > 1 else 0

    async def follow() -> None:
        async for _ in server:
            pass

    async with asyncio.TaskGroup() as group:
        following = group.create_task(follow())
        before = -1
        while sent() != before or not before:
            before = sent()
            await asyncio.sleep(0.5)
        # What the kernel, gRPC and we hold together.
        assert sent() < 32 * 1024 * 1024
        taken = 0
        while taken < 2 * before:
            taken += len(await call.receive())
        call.cancel()
        await until(lambda: server.so_far.stdout.endswith(b"Error\n"))
        following.cancel()
    server.cancel()


async def test_a_client_that_goes_away_resets_and_one_that_ends_does_not(
    agent: AgentProcess, sandbox: str
) -> None:
    server = await listen(agent, sandbox, _ENDING, 8000)
    call = await PortCall(agent.stub, sandbox, 8000).connect()
    await call.send(b"half")
    call.cancel()
    assert (await server.result()).stdout == b"up\nConnectionResetError\n"
    server = await listen(agent, sandbox, _ENDING, 8000)
    call = await PortCall(agent.stub, sandbox, 8000).connect()
    await call.send(b"whole")
    await call.send_eof()
    assert (await server.result()).stdout == b"up\nend\n"
    assert await call.receive_all() == b""
    await call.finish()


async def test_a_connection_keeps_a_sandbox_from_being_idle_and_ends_with_it(
    gateway: Gateway, agent: AgentProcess
) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec()
    spec.idle_timeout.FromMilliseconds(3000)
    gateway.assign("sb-1", spec=spec)
    await gateway.wait_for("sb-1", READY)
    program = (
        "import os, sys, socket\n"
        "l = socket.create_server((sys.argv[1], int(sys.argv[2])))\n"
        "if os.fork():\n    os._exit(0)\n"
        "os.close(1); os.close(2)\n"
        "c = l.accept()[0]\nwhile c.recv(100): pass\n"
    )
    assert (await agent.run("sb-1", ["python3", "-c", program, "127.0.0.1", "8000"])).code == 0
    call = await PortCall(agent.stub, "sb-1", 8000).connect()
    with pytest.raises(AssertionError):
        await gateway.wait_for("sb-1", DELETED, 5.0)
    descriptors = psutil.Process(agent.pid).num_fds()
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_DELETED)
    failure = from_rpc_error(await call.failure())
    assert failure.code in ("SANDBOX_GONE", "CONNECTION_RESET")
    await gateway.wait_for("sb-1", DELETED)
    await until(lambda: psutil.Process(agent.pid).num_fds() < descriptors)
