"""What real sandboxes use, and limits that change while they run."""

import asyncio

import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import READY, STOPPED
from tests.integration.agent.test_pause import PAUSED, pause
from tests.integration.agent.test_restart import kill_and_restart

MIB = 2**20
NOT_HELD = "LIMITS_NOT_HELD"


@pytest.fixture(autouse=True)
def _needs_cgroups() -> None:
    groups, _ = cgroups.find_on_this_machine("test-limits")
    if groups is None:
        pytest.skip("no cgroups here")
    groups.close()


def spec(**changes: int) -> sandbox_pb2.SandboxSpec:
    limits = {
        "cpu_millicores": 500,
        "memory_bytes": 256 * MIB,
        "disk_bytes": 128 * MIB,
        "processes_max": 50,
    } | changes
    return sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(**limits))


async def begin(gateway: Gateway) -> str:
    await gateway.wait_registrations(1)
    gateway.assign("sb-1", spec=spec())
    await gateway.wait_for("sb-1", READY)
    return "sb-1"


async def usage(agent: AgentProcess, *sandboxes: str) -> sandbox_pb2.SandboxUsage:
    request = sandbox_pb2.MeasureSandboxesRequest(sandbox_ids=sandboxes)
    (found,) = (await agent.stub.MeasureSandboxes(request)).usages
    return found


async def until_memory_is(agent: AgentProcess, sandbox: str, size_bytes: int) -> None:
    async with asyncio.timeout(20):
        while (await usage(agent, sandbox)).limits.memory_bytes != size_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_usage_is_what_the_kernel_says(agent: AgentProcess, gateway: Gateway) -> None:
    sandbox = await begin(gateway)
    idle = await usage(agent)
    assert idle.processes == 0
    script = "head -c 30000000 /dev/zero > f; sleep 1000 & i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo up; wait"  # noqa: E501
    call = agent.open(sandbox, ["sh", "-c", script])
    await call.until(b"up\n")
    busy = await usage(agent, sandbox, "sb-unknown")
    assert (busy.sandbox_id, busy.processes, busy.oom_kills) == (sandbox, 2, 0)
    assert busy.memory_bytes >= busy.disk_bytes >= 30_000_000
    assert busy.limits.memory_bytes == 256 * MIB
    assert busy.limits.disk_bytes == 128 * MIB
    assert busy.cpu_time.ToNanoseconds() > idle.cpu_time.ToNanoseconds()
    assert busy.measure_time.ToNanoseconds() > idle.measure_time.ToNanoseconds()
    call.cancel()
    hog = await agent.run(sandbox, ["sh", "-c", "head -c 400000000 /dev/zero | tail >/dev/null"])
    assert hog.code != 0
    assert (await usage(agent, sandbox)).oom_kills >= 1
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for(sandbox, STOPPED)
    assert not (await agent.stub.MeasureSandboxes(sandbox_pb2.MeasureSandboxesRequest())).usages


async def test_new_limits_hold_without_a_restart_and_after_one_of_the_agent(
    agent: AgentProcess, gateway: Gateway
) -> None:
    sandbox = await begin(gateway)
    call = agent.open(sandbox, ["sh", "-c", "echo up; read x; echo $x"], stdin=True)
    await call.until(b"up\n")
    gateway.assign(sandbox, spec=spec(memory_bytes=64 * MIB, processes_max=5, disk_bytes=8 * MIB))
    await until_memory_is(agent, sandbox, 64 * MIB)
    # Its files are the last that is changed, and then it is reported.
    await gateway.wait(lambda: sum(each.state == READY for each in gateway.history) >= 2)
    now = await usage(agent, sandbox)
    assert (now.limits.memory_bytes, now.limits.disk_bytes) == (64 * MIB, 8 * MIB)
    full = await agent.run(sandbox, ["sh", "-c", "head -c 9000000 /dev/zero > f"])
    assert b"No space left" in full.stderr
    forks = await agent.run(sandbox, ["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 9 & done"])
    assert b"fork" in forks.stderr
    await kill_and_restart(agent, gateway)
    now = await usage(agent, sandbox)
    assert (now.limits.memory_bytes, now.limits.processes_max) == (64 * MIB, 5)
    assert now.limits.disk_bytes == 8 * MIB
    gateway.assign(sandbox, spec=spec(memory_bytes=128 * MIB))
    await until_memory_is(agent, sandbox, 128 * MIB)


async def test_a_paused_sandbox_is_held_to_new_limits_and_stays_paused(
    agent: AgentProcess, gateway: Gateway
) -> None:
    sandbox = await begin(gateway)
    await pause(gateway, sandbox)
    assignment = agent_pb2.Assignment()
    assignment.CopyFrom(gateway.assignments[sandbox])
    assignment.spec.CopyFrom(spec(memory_bytes=64 * MIB))
    gateway.send(assignment)
    await until_memory_is(agent, sandbox, 64 * MIB)
    assert gateway.reports[sandbox].state == PAUSED
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_RUNNING)
    await gateway.wait_for(sandbox, READY)


async def test_memory_in_use_is_told_or_taken_back(agent: AgentProcess, gateway: Gateway) -> None:
    sandbox = await begin(gateway)
    groups, _ = cgroups.find_on_this_machine(agent.node_id)
    if not isinstance(groups, cgroups.CgroupsV1):
        pytest.skip("version 2 kills where it cannot free: nothing is told")
    await agent.run(sandbox, ["sh", "-c", "head -c 60000000 /dev/zero > f"])
    gateway.assign(sandbox, spec=spec(memory_bytes=32 * MIB))
    await gateway.wait(lambda: gateway.reports[sandbox].reason == NOT_HELD)
    assert "it uses more memory than 32 MiB" in gateway.reports[sandbox].message
    assert (await usage(agent, sandbox)).limits.memory_bytes == 256 * MIB
    await agent.run(sandbox, ["rm", "f"])
    await kill_and_restart(agent, gateway)  # the next process goes on with it
    await gateway.wait(lambda: not gateway.reports[sandbox].reason)
    assert (await usage(agent, sandbox)).limits.memory_bytes == 32 * MIB


async def test_limits_that_change_while_it_is_stopped_are_there_when_it_starts(
    agent: AgentProcess, gateway: Gateway
) -> None:
    sandbox = await begin(gateway)
    await agent.run(sandbox, ["sh", "-c", "echo kept > f"])
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for(sandbox, STOPPED)
    changed = spec(memory_bytes=64 * MIB, disk_bytes=16 * MIB)
    gateway.assign(sandbox, spec=changed, start_count=2)
    await gateway.wait_for(sandbox, READY)
    now = await usage(agent, sandbox)
    assert (now.limits.memory_bytes, now.limits.disk_bytes) == (64 * MIB, 16 * MIB)
    assert (await agent.run(sandbox, ["cat", "f"])).stdout == b"kept\n"
