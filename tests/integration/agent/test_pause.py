"""Pause and resume of real sandboxes."""

import asyncio
import signal

import grpc
import grpc.aio
import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups
from tests.integration.agent.files import read, write
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import (
    DELETED,
    READY,
    STOPPED,
    until_no_traces,
)
from tests.integration.agent.test_restart import kill_and_restart

PAUSED = agent_pb2.OBSERVED_STATE_PAUSED
PAUSE = agent_pb2.DESIRED_STATE_PAUSED
RESUME = agent_pb2.DESIRED_STATE_RUNNING
COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"


@pytest.fixture(autouse=True)
def _needs_a_freezer() -> None:
    groups, _ = cgroups.find_on_this_machine("test-pause")
    if groups is None:
        pytest.skip("no cgroups here")
    groups.close()


async def pause(gateway: Gateway, sandbox: str) -> None:
    gateway.want(sandbox, PAUSE)
    await gateway.wait_for(sandbox, PAUSED)


async def resume(gateway: Gateway, sandbox: str) -> None:
    gateway.want(sandbox, RESUME)
    await gateway.wait_for(sandbox, READY)


async def test_nothing_runs_while_paused_and_all_goes_on_after(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", COUNT])
    so_far = await call.until(b"5\n")
    await pause(gateway, sandbox)
    process = psutil.Process(min(agent.supervised(sandbox)))
    frozen = [each.cpu_times()[:2] for each in process.children(recursive=True)]
    info = sandbox_pb2.GetExecRequest(sandbox=sandbox, exec_id=so_far.exec_id)
    before = (await agent.stub.GetExec(info)).sequence
    await asyncio.sleep(0.3)
    assert [each.cpu_times()[:2] for each in process.children(recursive=True)] == frozen
    assert (await agent.stub.GetExec(info)).sequence == before
    await resume(gateway, sandbox)
    await call.until(b"\n60\n")
    call.cancel()


async def test_exec_into_a_paused_sandbox_is_refused_and_files_are_read(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await write(agent, sandbox, "/workspace/f", b"x")
    await pause(gateway, sandbox)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, ["true"])
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "paused" in str(failure.value.details())
    assert await read(agent, sandbox, "/workspace/f") == b"x"
    await resume(gateway, sandbox)
    assert (await agent.run(sandbox, ["cat", "f"])).stdout == b"x"


async def test_pause_and_resume_again_and_again(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    for _ in range(5):
        await pause(gateway, sandbox)
        gateway.want(sandbox, PAUSE)
        await resume(gateway, sandbox)
        gateway.want(sandbox, RESUME)
    for desired in (PAUSE, RESUME) * 5:
        gateway.want(sandbox, desired)

    async def served() -> bool:
        try:
            return (await agent.run(sandbox, ["echo", "up"])).stdout == b"up\n"
        except grpc.aio.AioRpcError as error:
            # Reports of what it was in between are on their way; it is refused until it runs.
            return error.code() is not grpc.StatusCode.FAILED_PRECONDITION

    async with asyncio.timeout(20):
        while not await served():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_paused_sandbox_is_deleted(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.run(sandbox, ["sh", "-c", "trap '' TERM; sleep 1000"], detach=True)
    await pause(gateway, sandbox)
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0.0)
    await gateway.wait_for(sandbox, DELETED)
    await until_no_traces(agent, sandbox)


async def test_a_paused_sandbox_is_stopped_with_its_grace_period(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    script = "trap 'echo bye > bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    await agent.open(sandbox, ["sh", "-c", script]).until(b"up\n")
    await pause(gateway, sandbox)
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=5.0)
    await gateway.wait_for(sandbox, STOPPED)
    gateway.want(sandbox, RESUME, start_count=2)
    await gateway.wait_for(sandbox, READY)
    assert await read(agent, sandbox, "/workspace/bye") == b"bye\n"


async def test_it_stays_paused_over_a_kill_of_the_agent(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", f"{COUNT}"], request_id="once")
    so_far = await call.until(b"5\n")
    await pause(gateway, sandbox)
    await kill_and_restart(agent, gateway)
    states = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert states == {sandbox: PAUSED}
    attached = agent.attach(sandbox, so_far.exec_id)
    await attached.until(b"5\n")
    await resume(gateway, sandbox)
    await attached.until(b"\n60\n")
    attached.cancel()
    assert (await agent.run(sandbox, ["echo", "up"])).stdout == b"up\n"


async def test_resumed_while_the_agent_was_away(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await pause(gateway, sandbox)
    await agent.end(signal.SIGKILL)
    gateway.want(sandbox, RESUME)
    await agent.start()
    await gateway.wait_for(sandbox, READY)
    assert (await agent.run(sandbox, ["echo", "up"])).stdout == b"up\n"


async def test_idle_timeout_waits_for_the_resume_and_ttl_does_not(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec()
    spec.idle_timeout.FromMilliseconds(3000)
    gateway.assign("sb-idle", spec=spec)
    await gateway.wait_for("sb-idle", READY)
    await pause(gateway, "sb-idle")
    gateway.assign("sb-ttl", ttl_s=5.0)
    await gateway.wait_for("sb-ttl", READY)
    await pause(gateway, "sb-ttl")
    report = await gateway.wait_for("sb-ttl", DELETED)
    assert report.reason == "TTL_EXPIRED"
    assert gateway.reports["sb-idle"].state == PAUSED
    gateway.want("sb-idle", RESUME)
    report = await gateway.wait_for("sb-idle", DELETED)
    assert report.reason == "IDLE_TIMEOUT"


async def test_death_of_a_paused_sandbox_is_seen(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await pause(gateway, sandbox)
    groups, _ = cgroups.find_on_this_machine(agent.node_id)
    assert groups is not None
    await asyncio.to_thread(groups.kill, sandbox)
    report = await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_FAILED)
    assert report.reason == "SUPERVISOR_DIED"
    gateway.want(sandbox, RESUME, start_count=2)
    await gateway.wait_for(sandbox, READY)
    assert (await agent.run(sandbox, ["echo", "up"])).stdout == b"up\n"


async def test_a_lease_does_not_end_what_is_paused(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    gateway.lease_s = 3.0
    await kill_and_restart(agent, gateway)
    gateway.assign(
        "sb-move", spec=sandbox_pb2.SandboxSpec(on_node_loss=sandbox_pb2.ON_NODE_LOSS_RESCHEDULE)
    )
    await gateway.wait_for("sb-move", READY)
    await pause(gateway, "sb-move")
    await asyncio.sleep(1.5 * gateway.lease_s)
    await resume(gateway, "sb-move")
    await asyncio.sleep(1.5 * gateway.lease_s)
    assert (await agent.run("sb-move", ["echo", "on"])).stdout == b"on\n"
