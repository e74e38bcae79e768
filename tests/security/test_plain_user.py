"""What an agent without root promises less of, and says so; and what it promises all the same."""

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroup_mounts
from prism_common.limits import MIB
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.plain import UID, home, plain_agent, why_no_plain_user
from tests.integration.agent.process import AgentProcess
from tests.security.conftest import plain_user

READY = agent_pb2.OBSERVED_STATE_READY


@plain_user
async def test_health_says_which_limits_nothing_enforces(agent: AgentProcess) -> None:
    health = await agent.node.GetHealth(node_pb2.GetHealthRequest())
    (check,) = [each for each in health.checks if each.name == "cgroup"]
    assert check.status == node_pb2.HEALTH_STATUS_WARNING
    assert "memory and CPU of sandboxes are not limited" in check.message
    assert "run as root, or with a delegated cgroup" in check.message
    assert health.status != node_pb2.HEALTH_STATUS_OK


_FORKS = """
import os, time
children = 0
try:
    for _ in range(5000):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
except OSError as error:
    print(children, error.strerror)
os.kill(-1, 9)
"""


@plain_user
async def test_processes_are_bounded_without_a_cgroup(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await gateway.wait_registrations(1)
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(processes_max=40))
    gateway.assign("sb-1", spec=spec)
    await gateway.wait_for("sb-1", READY)
    result = await agent.python("sb-1", _FORKS)
    count, _, why = result.stdout.decode().strip().partition(" ")
    assert why == "Resource temporarily unavailable"
    assert 1 <= int(count) <= 40
    assert (await agent.run("sb-1", ["echo", "lives"])).stdout == b"lives\n"


_FILL = """
import os
written, block = 0, bytes(1 << 20)
fd = os.open('/workspace/full', os.O_CREAT | os.O_WRONLY)
try:
    while written < 1 << 30:
        written += os.write(fd, block)
except OSError as error:
    print(written >> 20, error.strerror)
os.unlink('/workspace/full')
"""


@plain_user
async def test_the_workspace_is_bounded_without_root(agent: AgentProcess, gateway: Gateway) -> None:
    await gateway.wait_registrations(1)
    limits = sandbox_pb2.Limits(memory_bytes=64 * MIB, disk_bytes=32 * MIB)
    gateway.assign("sb-1", spec=sandbox_pb2.SandboxSpec(limits=limits))
    await gateway.wait_for("sb-1", READY)
    megabytes, _, why = (await agent.python("sb-1", _FILL)).stdout.decode().strip().partition(" ")
    assert why == "No space left on device"
    assert int(megabytes) <= 32


@plain_user
async def test_a_pause_is_refused_in_words_and_nothing_is_frozen(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    gateway.want(sandbox, agent_pb2.DESIRED_STATE_PAUSED)

    def refused() -> bool:
        return gateway.reports[sandbox].reason == "PAUSE_FAILED"

    async with gateway.changed:
        await gateway.changed.wait_for(refused)
    assert gateway.reports[sandbox].state == READY
    assert "cgroup" in gateway.reports[sandbox].message
    assert (await agent.run(sandbox, ["echo", "lives"])).stdout == b"lives\n"


@plain_user
async def test_sandboxes_of_one_user_do_not_reach_each_other(
    agent: AgentProcess, gateway: Gateway, sandbox: str
) -> None:
    """They share the agent's user on the host; what keeps them apart is their namespaces."""
    gateway.assign("sb-other")
    await gateway.wait_for("sb-other", READY)
    call = agent.open("sb-other", ["sh", "-c", "echo up; exec sleep 60"])
    await call.until(b"up\n")
    owners = {
        uid
        for name in (sandbox, "sb-other")
        for pid in agent.supervised(name)
        for uid in psutil.Process(pid).uids()
    }
    assert owners == {psutil.Process(agent.pid).uids().real}
    assert 0 not in owners
    await agent.run(sandbox, ["sh", "-c", "kill -9 -1"])
    look = "until pidof sleep; do sleep 0.05; done"
    assert (await agent.run("sb-other", ["sh", "-c", look], timeout_s=20)).code == 0
    assert agent.alive
    call.cancel()


@plain_user
async def test_others_do_not_reach_the_agents_data(agent: AgentProcess, sandbox: str) -> None:
    mode = stat.S_IMODE(os.stat(agent.data_dir).st_mode)
    assert mode & 0o077 == 0


@contextmanager
def delegated(node_id: str) -> Iterator[None]:
    """Give an agent's cgroups to the plain user, as root does who delegates."""
    mountinfo = Path("/proc/self/mountinfo").read_text()
    mounts = cgroup_mounts.read_mounts(mountinfo, "").v1
    if not {*cgroup_mounts.CONTROLLERS, cgroup_mounts.FREEZER} <= set(mounts):
        pytest.skip("needs the controllers of cgroup v1")
    made = [mount / "prism" / node_id for mount in dict.fromkeys(mounts.values())]
    try:
        for path in made:
            path.mkdir(parents=True)
            os.chown(path, UID, UID)
        yield
    finally:
        for path in made:
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


_ALLOCATE = "x = bytearray(1 << 20) * 400; print('GOT IT')"


async def test_delegated_cgroups_limit_and_pause_without_root(
    needs_sandboxes: None, gateway: Gateway
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to delegate")
    if reason := await asyncio.to_thread(why_no_plain_user):
        pytest.skip(reason)
    with home() as directory:
        agent = plain_agent(directory, gateway.address, "--on-exit=delete")
        await agent.start()  # it makes its node id
        await agent.end()
        with delegated(agent.node_id):
            await agent.start()
            health = await agent.node.GetHealth(node_pb2.GetHealthRequest())
            (check,) = [each for each in health.checks if each.name == "cgroup"]
            assert check.status == node_pb2.HEALTH_STATUS_OK, check.message
            gateway.assign("sb-1")  # of 256 MiB
            await gateway.wait_for("sb-1", READY)
            result = await agent.python("sb-1", _ALLOCATE)
            assert result.exit is not None
            assert (result.stdout, result.exit.reason) == (b"", "OUT_OF_MEMORY")
            gateway.want("sb-1", agent_pb2.DESIRED_STATE_PAUSED)
            await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_PAUSED)
            await agent.end()
