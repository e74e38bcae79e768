"""The life of sandboxes: stop, start, delete, deadlines, limits, fencing; with the real runtime."""

import asyncio
import os
import signal
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.runtime import host
from prism_common.limits import MIB
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess, Result

READY = agent_pb2.OBSERVED_STATE_READY
STOPPED = agent_pb2.OBSERVED_STATE_STOPPED
DELETED = agent_pb2.OBSERVED_STATE_DELETED
FAILED = agent_pb2.OBSERVED_STATE_FAILED


def traces(agent: AgentProcess, sandbox_id: str) -> list[str]:
    """Return what the machine still has of a sandbox."""
    found = [f"process {pid}" for pid in agent.supervised(sandbox_id)]
    found += [f"mount {path}" for path in host.mounts_below(agent.data_dir / "sandboxes")]
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        if directory.endswith(f"/prism/{agent.node_id}"):
            found += [f"cgroup {directory}/{name}" for name in names if name == sandbox_id]
    if (agent.data_dir / "sandboxes" / sandbox_id).exists():
        found.append("directory")
    return found


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for something of the machine that tells nobody when it changes."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_no_traces(agent: AgentProcess, sandbox_id: str) -> None:
    await until(lambda: not traces(agent, sandbox_id))


async def test_delete_leaves_nothing(agent: AgentProcess, gateway: Gateway, sandbox: str) -> None:
    await agent.run(sandbox, ["sh", "-c", "setsid sleep 1000 & echo x > f"])
    kinds = {each.split()[0] for each in traces(agent, sandbox)}
    assert kinds == {"process", "mount", "cgroup", "directory"}
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(sandbox, DELETED)
    # When DELETED is said only the record is left, until the leader has heard it.
    assert set(traces(agent, sandbox)) <= {"directory"}
    await until_no_traces(agent, sandbox)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, ["true"])
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND


async def test_files_survive_stop_and_start(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    first = await agent.run(sandbox, ["sh", "-c", "echo kept > f; echo said"])
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for(sandbox, STOPPED)
    assert not [each for each in traces(agent, sandbox) if each.startswith("process")]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await agent.run(sandbox, ["true"])
    assert failure.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    logs = agent.stub.StreamLogs(sandbox_pb2.StreamLogsRequest(sandbox=sandbox))
    assert [piece.data async for piece in logs] == [b"said\n"]
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_RUNNING, start_count=2)
    report = await gateway.wait_for(sandbox, READY)
    assert report.start_count == 2
    assert (await agent.run(sandbox, ["cat", "f"])).stdout == b"kept\n"
    again = await agent.attach(sandbox, first.exec_id).result()
    assert (again.stdout, again.code) == (b"said\n", 0)


async def test_stop_is_sigterm_first(agent: AgentProcess, gateway: Gateway, sandbox: str) -> None:
    script = "trap 'echo bye > /workspace/f; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    call = agent.open(sandbox, ["sh", "-c", script])
    await call.until(b"up\n")
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=20)
    await gateway.wait_for(sandbox, STOPPED, timeout_s=10)
    result = await call.result()
    assert result.code == 0
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_RUNNING, start_count=2)
    await gateway.wait_for(sandbox, READY)
    assert (await agent.run(sandbox, ["cat", "f"])).stdout == b"bye\n"


async def test_what_ignores_sigterm_is_killed(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    # One process: a shell may outlive its child by a moment, and end by itself for want of it.
    call = agent.open(sandbox, ["sh", "-c", "trap '' TERM; echo up; exec sleep 1000"])
    await call.until(b"up\n")
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=0.3)
    await gateway.wait_for(sandbox, STOPPED)
    [outcome] = await asyncio.gather(call.result(), return_exceptions=True)
    if isinstance(outcome, grpc.aio.AioRpcError):
        # Nobody saw how it ended, so nobody says how.
        assert outcome.code() == grpc.StatusCode.UNAVAILABLE
    else:
        # Its supervisor lived long enough to see it.
        assert isinstance(outcome, Result)
        assert outcome.exit is not None
        assert outcome.exit.signal == signal.SIGKILL


async def test_forced_delete_hurries_a_slow_stop(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
    await call.until(b"up\n")
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_STOPPED, grace_s=300)
    await gateway.wait_for(sandbox, agent_pb2.OBSERVED_STATE_STOPPING)
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(sandbox, DELETED, timeout_s=10)
    call.cancel()


async def test_forced_delete_hurries_a_stop_that_has_not_begun(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
    await call.until(b"up\n")
    both = [agent_pb2.DESIRED_STATE_STOPPED, agent_pb2.DESIRED_STATE_DELETED]
    stop, delete = (
        agent_pb2.Assignment(
            sandbox_id=sandbox,
            generation=1,
            start_count=1,
            desired=desired,
            grace_period=duration_pb2.Duration(seconds=seconds),
        )
        for desired, seconds in zip(both, (300, 0), strict=True)
    )
    gateway.assignments[sandbox] = delete
    # Both in one batch: the second is obeyed before the agent has done anything for the first.
    gateway.send(stop, delete)
    await gateway.wait_for(sandbox, DELETED)
    call.cancel()


async def test_ttl_is_the_nodes_own(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    gateway.assign("sb-ttl", ttl_s=4.0)
    await gateway.wait_for("sb-ttl", READY)
    report = await gateway.wait_for("sb-ttl", DELETED)
    assert report.reason == "TTL_EXPIRED"
    await until_no_traces(agent, "sb-ttl")


async def test_idle_timeout_waits_for_a_silent_exec(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(idle_timeout=duration_pb2.Duration(seconds=2))
    gateway.assign("sb-idle", spec=spec)
    await gateway.wait_for("sb-idle", READY)
    result = await agent.run("sb-idle", ["sleep", "4"])
    assert result.code == 0
    report = await gateway.wait_for("sb-idle", DELETED)
    assert report.reason == "IDLE_TIMEOUT"


async def test_memory_bomb_is_out_of_memory_and_ends_alone(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(memory_bytes=64 * MIB))
    gateway.assign("sb-oom", spec=spec)
    await gateway.wait_for("sb-oom", READY)
    result = await agent.python("sb-oom", "x = bytearray(500 << 20)")
    assert result.exit == sandbox_pb2.ExecExit(exit_code=137, signal=9, reason="OUT_OF_MEMORY")
    killed = agent.open("sb-oom", ["sh", "-c", "echo up; exec sleep 100"])
    await killed.until(b"up\n")
    await killed.send(signal=9)
    assert (await killed.result()).exit == sandbox_pb2.ExecExit(exit_code=137, signal=9)
    assert (await agent.run("sb-oom", ["echo", "alive"])).stdout == b"alive\n"


async def test_fork_bomb_meets_eagain(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(processes_max=20))
    gateway.assign("sb-fork", spec=spec)
    await gateway.wait_for("sb-fork", READY)
    program = (
        "import os, errno, time\n"
        "n = 0\n"
        "while n < 1000:\n"
        "  try:\n"
        "    if os.fork() == 0: time.sleep(1000)\n"
        "    n += 1\n"
        "  except OSError as e:\n"
        "    print(errno.errorcode[e.errno], n, flush=True); break\n"
        "os.killpg(0, 9)"
    )
    result = await agent.python("sb-fork", program)
    assert result.stdout.startswith(b"EAGAIN ")
    assert int(result.stdout.split()[1]) < 20


async def test_disk_filler_meets_enospc(agent: AgentProcess, sandbox: str) -> None:
    script = "head -c 1G /dev/zero > /workspace/f || head -c 1G /dev/zero > /tmp/f"
    result = await agent.run(sandbox, ["sh", "-c", script])
    assert result.stderr.count(b"No space left on device") == 2
    assert result.code == 1
    assert (await agent.run(sandbox, ["rm", "/workspace/f", "/tmp/f"])).code == 0


async def test_cpu_is_limited(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(cpu_millicores=200))
    gateway.assign("sb-cpu", spec=spec)
    await gateway.wait_for("sb-cpu", READY)
    program = (
        "import time\n"
        "a, c = time.monotonic(), time.process_time()\n"
        "while time.monotonic() - a < 1.5: pass\n"
        "print((time.process_time() - c) / (time.monotonic() - a))"
    )
    share = float((await agent.python("sb-cpu", program)).stdout)
    assert share < 0.35


async def test_death_of_the_supervisor_is_failed(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    call = agent.open(sandbox, ["sh", "-c", "echo up; exec sleep 1000"])
    await call.until(b"up\n")
    for pid in agent.supervised(sandbox):
        os.kill(pid, 9)
    report = await gateway.wait_for(sandbox, FAILED)
    assert report.reason == "SUPERVISOR_DIED"
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.result()
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    assert not [each for each in traces(agent, sandbox) if each.startswith("process")]
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_DELETED)
    await gateway.wait_for(sandbox, DELETED)


async def test_what_is_not_in_a_complete_batch_is_removed(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.end(signal.SIGKILL)
    gateway.assignments.clear()
    await agent.start()
    report = await gateway.wait_for(sandbox, DELETED)
    assert report.reason == "NOT_ASSIGNED"
    await until_no_traces(agent, sandbox)


async def test_lease_expiry_fences_only_what_may_run_elsewhere(
    agent: AgentProcess, gateway: Gateway
) -> None:
    gateway.lease_s = 3.0
    await gateway.wait_registrations(1)
    await agent.end()
    await agent.start()
    await gateway.wait_registrations(2)
    gateway.assign(
        "sb-move", spec=sandbox_pb2.SandboxSpec(on_node_loss=sandbox_pb2.ON_NODE_LOSS_RESCHEDULE)
    )
    gateway.assign("sb-stay")
    await gateway.wait_for("sb-move", READY)
    await gateway.wait_for("sb-stay", READY)
    gateway.acknowledges = False
    report = await gateway.wait_for("sb-move", FAILED)
    assert report.reason == "LEASE_EXPIRED"
    assert (await agent.run("sb-stay", ["echo", "on"])).stdout == b"on\n"
    gateway.acknowledges = True


async def test_health_and_resources_are_measured(agent: AgentProcess, sandbox: str) -> None:
    resources = await agent.node.GetResources(node_pb2.GetResourcesRequest())
    assert resources.node_name == "test-node"
    assert resources.allocated == node_pb2.ResourceAmounts(
        cpu_millicores=500, memory_bytes=256 * MIB, disk_bytes=256 * MIB, slots=1
    )
    assert resources.total.memory_bytes > resources.capacity.memory_bytes > 0
    assert 0 < resources.score <= 100
    assert [each.name for each in resources.runtimes if each.ready] == ["bubblewrap"]
    health = await agent.node.GetHealth(node_pb2.GetHealthRequest())
    names = [each.name for each in health.checks]
    assert names == [
        "runtime",
        "cgroup",
        "disk",
        "journal",
        "network",
        "memory_pressure",
        "clock",
        "control_session",
    ]
    by_name = {each.name: each for each in health.checks}
    assert by_name["control_session"].status == node_pb2.HEALTH_STATUS_OK


async def test_image_that_is_unknown_fails_the_start(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    gateway.assign("sb-image", spec=sandbox_pb2.SandboxSpec(image="nowhere/none"))
    report = await gateway.wait_for("sb-image", FAILED)
    assert report.reason == "START_FAILED"
    assert "nowhere/none" in report.message


async def test_a_new_generation_begins_empty(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    await agent.run(sandbox, ["sh", "-c", "echo old > f"])
    gateway.assign(sandbox, generation=2)
    await gateway.wait(
        lambda: gateway.reports[sandbox].generation == 2 and gateway.reports[sandbox].state == READY
    )
    assert (await agent.run(sandbox, ["ls"])).stdout == b""


async def test_compilers_and_tools_work(agent: AgentProcess, sandbox: str) -> None:
    script = (
        "printf '#include <stdio.h>\\nint main(){puts(\"c\");}' > a.c && gcc a.c -o a && ./a && "
        "git init -q r && cd r && git -c user.name=a -c user.email=b commit -q --allow-empty -m x "
        "&& git log --oneline | wc -l && python3 -c 'import ssl, sqlite3, subprocess, threading, "
        "multiprocessing as m; p = m.Pool(2); print(p.map(abs, [-1, -2]))'"
    )
    result = await agent.run(sandbox, ["bash", "-c", script])
    assert (result.stdout, result.code) == (b"c\n1\n[1, 2]\n", 0), result.stderr
