"""Prepared sandboxes: one that is taken is as one that was made for its start, and none is left."""

import asyncio
import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import cgroups
from prism_agent.journal import Journal
from prism_agent.record import Record
from prism_agent.runtime import host
from prism_common.limits import MIB
from tests.integration.agent import process as process_module
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess
from tests.integration.agent.test_life import DELETED, READY, STOPPED, until
from tests.integration.agent.test_restart import kill_and_restart

SIZE = 2
#: Says all that a sandbox is told at its start, one thing a line.
TELL = """
hostname; cat /etc/hostname; grep -c sb- /etc/hosts
for d in /workspace /tmp /dev/shm; do df --output=size -B1M $d | tail -1; done
ulimit -n; id -u; pwd; ls -A /workspace /tmp /dev/shm | wc -l; cat /proc/sys/net/ipv4/ip_forward
"""


def why_not() -> str:
    """Return why sandboxes cannot be prepared here; empty: they can."""
    if os.geteuid() != 0:
        return "needs root"
    groups, problem = cgroups.find_on_this_machine("test-warm")
    if groups is not None:
        groups.close()
    return "" if groups is not None else problem


@pytest.fixture
async def agent(
    needs_sandboxes: None, gateway: Gateway, tmp_path: Path
) -> AsyncIterator[AgentProcess]:
    if reason := why_not():
        pytest.skip(reason)
    process = AgentProcess(
        tmp_path / "data", gateway.address, f"--warm-pool={SIZE}", "--on-exit=delete"
    )
    await process.start()
    await gateway.wait_registrations(1)
    yield process
    await process.end()
    assert "Traceback" not in process.log.read_text()
    assert leftovers(process) == []


def leftovers(agent: AgentProcess) -> list[str]:
    """Return what the machine has of sandboxes of an agent, prepared or not."""
    found = [f"process {pid} {tag}" for pid, tag in host.supervised(f"{agent.node_id}/")]
    found += [f"mount {path}" for path in host.mounts_below(agent.data_dir / "sandboxes")]
    found += [f"directory {name}" for name in os.listdir(agent.data_dir / "sandboxes")]
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        if directory.endswith(f"/prism/{agent.node_id}"):
            found += [f"cgroup {directory}/{name}" for name in names]
    return found


def metric(agent: AgentProcess, text: str) -> float:
    addresses = re.findall(r"serving .*metrics=(\S+)", agent.log.read_text())
    with urllib.request.urlopen(f"http://{addresses[-1]}/metrics", timeout=10) as page:
        found = re.search(rf"^{re.escape(text)} (\S+)$", page.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


async def until_ready(agent: AgentProcess, count: int = SIZE) -> None:
    """Wait until so many are prepared, and no other is being made."""
    async with asyncio.timeout(60):
        while True:
            states = [
                await asyncio.to_thread(metric, agent, f'prism_agent_warm{{state="{state}"}}')
                for state in ("ready", "making")
            ]
            if states == [count, 0]:
                return
            await asyncio.sleep(0.05)


def record_of(agent: AgentProcess, sandbox_id: str) -> Record:
    journal = Journal(agent.data_dir / "sandboxes")
    try:
        return journal.load()[0][sandbox_id]
    finally:
        journal.close()


def supervisors(agent: AgentProcess) -> dict[str, int]:
    """Return the pid of PID 1 of each sandbox, prepared or not, by what it is called."""
    found = {}
    for pid, tag in host.supervised(f"{agent.node_id}/"):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/exe").readlink().name != "bwrap":
                found[tag.partition("/")[2]] = pid
    return found


async def tell(agent: AgentProcess, sandbox_id: str) -> str:
    """Return what a sandbox says of itself."""
    result = await agent.run(sandbox_id, ["bash", "-c", f"{TELL}\necho $MARK | cut -c1-3"])
    assert result.code == 0, result
    return result.stdout.decode()


def assign(gateway: Gateway, sandbox_id: str, **limits: int) -> None:
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(**limits), env={"MARK": sandbox_id})
    gateway.assign(sandbox_id, spec=spec, name=f"{sandbox_id}-name")


async def start(agent: AgentProcess, gateway: Gateway, sandbox_id: str, **limits: int) -> str:
    """Start one, and return what it says of itself."""
    assign(gateway, sandbox_id, **limits)
    await gateway.wait_for(sandbox_id, READY)
    return await tell(agent, sandbox_id)


async def start_cold(agent: AgentProcess, gateway: Gateway, **limits: int) -> str:
    """Start more than are prepared, and return the name of one that was made for its start."""
    for attempt in range(5):
        names = [f"sb-made{attempt}{number}" for number in range(SIZE + 2)]
        for name in names:
            assign(gateway, name, **limits)
        for name in names:
            await gateway.wait_for(name, READY)
        for name in names:
            if not record_of(agent, name).prepared_as:
                return name
    raise AssertionError("no start found the pool empty")


async def test_one_that_is_taken_is_as_one_that_was_made(
    agent: AgentProcess, gateway: Gateway
) -> None:
    limits = {"memory_bytes": 96 * MIB, "disk_bytes": 20 * MIB, "open_files_max": 321,
              "processes_max": 20, "cpu_millicores": 250}  # fmt: skip
    await until_ready(agent)
    prepared = supervisors(agent)
    taken = await start(agent, gateway, "sb-taken", **limits)
    record = record_of(agent, "sb-taken")
    assert record.prepared_as in prepared
    assert record.pid == prepared[record.prepared_as]
    await until_ready(agent)
    name = await start_cold(agent, gateway, **limits)
    made = await tell(agent, name)
    assert record_of(agent, name).uid != record.uid
    assert taken.replace("sb-taken", "X") == made.replace(name, "X")
    lines = taken.splitlines()
    assert lines[:3] == ["sb-taken-name", "sb-taken-name", "1"]
    assert [line.strip() for line in lines[3:6]] == ["20", "20", "20"]
    groups, _ = cgroups.find_on_this_machine(agent.node_id)
    assert groups is not None
    assert groups.usage(record.cgroup).memory_limit_bytes == 96 * MIB


async def test_limits_of_one_that_was_taken_hold(agent: AgentProcess, gateway: Gateway) -> None:
    await until_ready(agent)
    await start(agent, gateway, "sb-1", memory_bytes=48 * MIB, processes_max=16)
    assert record_of(agent, "sb-1").prepared_as
    full = await agent.run("sb-1", ["dd", "if=/dev/zero", "of=/tmp/f", "bs=1M"])
    assert (full.code, b"No space left" in full.stderr) == (1, True)
    await agent.run("sb-1", ["rm", "/tmp/f"])
    hog = await agent.python("sb-1", "x = bytearray(200 << 20)")
    assert hog.exit is not None
    assert (hog.code, hog.exit.reason) == (137, "OUT_OF_MEMORY")
    forks = "import os\nfor i in range(40): os.fork() or __import__('time').sleep(5)"
    assert b"BlockingIOError" in (await agent.python("sb-1", forks)).stderr


async def test_it_lives_and_ends_as_others_do(agent: AgentProcess, gateway: Gateway) -> None:
    await until_ready(agent)
    await start(agent, gateway, "sb-1")
    await agent.run("sb-1", ["sh", "-c", "echo kept > f"])
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_PAUSED)
    await gateway.wait_for("sb-1", agent_pb2.OBSERVED_STATE_PAUSED)
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_RUNNING)
    await gateway.wait_for("sb-1", READY)
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_STOPPED)
    await gateway.wait_for("sb-1", STOPPED)
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_RUNNING, start_count=2)
    await gateway.wait_for("sb-1", READY)
    assert (await agent.run("sb-1", ["cat", "f"])).stdout == b"kept\n"
    name = record_of(agent, "sb-1").prepared_as
    assert name
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for("sb-1", DELETED)
    await until(lambda: not [each for each in leftovers(agent) if "sb-1" in each or name in each])


async def test_a_killed_agent_leaves_no_prepared_ones_and_loses_none_that_was_taken(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await until_ready(agent)
    await start(agent, gateway, "sb-1")
    call = agent.open("sb-1", ["sh", "-c", "echo up; read x; echo $x"], stdin=True)
    so_far = await call.until(b"up\n")
    await until_ready(agent)
    before = supervisors(agent)
    name = record_of(agent, "sb-1").prepared_as
    await kill_and_restart(agent, gateway)
    states = {each.sandbox_id: each.state for each in gateway.registrations[-1].sandboxes}
    assert states == {"sb-1": READY}
    again = agent.attach("sb-1", so_far.exec_id)
    await again.send_attach(stdin=b"on\n")
    assert (await again.result()).stdout == b"up\non\n"
    await until_ready(agent)
    after = supervisors(agent)
    assert after.keys() & before.keys() == {name}
    assert len(after) == 1 + SIZE
    assert after[name] == before[name]


async def test_a_prepared_one_that_has_died_is_not_given_away(
    agent: AgentProcess, gateway: Gateway
) -> None:
    await until_ready(agent)
    died = supervisors(agent)
    for pid in died.values():
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in died.values()))
    await start(agent, gateway, "sb-1")
    assert record_of(agent, "sb-1").prepared_as not in died
    await until_ready(agent)
    assert not [each for each in leftovers(agent) for name in died if name in each]


async def test_a_pool_takes_only_slots_that_are_free(gateway: Gateway, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    process = AgentProcess(
        tmp_path / "data", gateway.address, "--warm-pool=3", "--slots=3", "--on-exit=delete"
    )
    await process.start()
    try:
        await gateway.wait_registrations(1)
        offered = gateway.registrations[0].capacity
        assert offered.slots == 3
        await until_ready(process, 3)
        await start(process, gateway, "sb-1")
        await start(process, gateway, "sb-2")
        await until_ready(process, 1)
        assert len(supervisors(process)) == 3
        gateway.want("sb-1", agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
        await gateway.wait_for("sb-1", DELETED)
        await until_ready(process, 2)
    finally:
        await process.end()
    assert leftovers(process) == []


async def test_sandboxes_stay_when_the_agent_ends_and_prepared_ones_go(
    gateway: Gateway, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    process = AgentProcess(tmp_path / "data", gateway.address, "--warm-pool=1")
    await process.start()
    try:
        await gateway.wait_registrations(1)
        await until_ready(process, 1)
        await start(process, gateway, "sb-1")
        name = record_of(process, "sb-1").prepared_as
        await until_ready(process, 1)
        assert await process.end() == 0
        assert set(supervisors(process)) == {name}
        assert os.listdir(process.data_dir / "sandboxes") == ["sb-1"]
    finally:
        await process.clear()
    assert leftovers(process) == []


async def test_too_many_are_refused(gateway: Gateway, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    process = AgentProcess(tmp_path / "data", gateway.address, "--warm-pool=5", "--slots=4")
    await process.spawn()
    assert await process.wait() == 1
    assert "--warm-pool: 5 sandboxes cannot be prepared" in process.log.read_text()


@pytest.mark.parametrize("place", ["_rename", "Running"])
async def test_an_agent_that_dies_while_it_takes_one_leaves_nothing_of_it(
    agent: AgentProcess, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    await agent.end(signal.SIGKILL)
    dying = (
        "import os\n"
        "from prism_agent.runtime import warm\n"
        f"warm.{place} = lambda *_, **__: os._exit(86)\n"
        "from prism_agent.main import main\n"
        "main()"
    )
    with monkeypatch.context() as patch:
        patch.setattr(process_module, "_MAIN", dying)
        await agent.start()
        await gateway.wait_registrations(2)
        await until_ready(agent)
        gateway.assign("sb-1")
        assert await agent.wait() == 86
    name = record_of(agent, "sb-1").prepared_as
    assert name in supervisors(agent)
    await agent.start()
    await gateway.wait_for("sb-1", READY)
    assert (await agent.run("sb-1", ["hostname"])).stdout == b"sb-1\n"
    await until_ready(agent)
    mounts = host.mounts_below(agent.data_dir / "sandboxes")
    assert len(mounts) == 1 + SIZE
    assert not (agent.data_dir / "sandboxes" / name).exists()
    gateway.want("sb-1", agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for("sb-1", DELETED)


async def test_one_that_cannot_be_used_is_removed_and_another_is_made(
    agent: AgentProcess, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agent.end(signal.SIGKILL)
    # When its directory is the sandbox's already.
    failing = (
        "from prism_agent.runtime import warm\n"
        "def fail(*_, **__): raise OSError(5, 'no such luck')\n"
        "warm.Running = fail\n"
        "from prism_agent.main import main\n"
        "main()"
    )
    monkeypatch.setattr(process_module, "_MAIN", failing)
    await agent.start()
    await gateway.wait_registrations(2)
    await until_ready(agent)
    before = supervisors(agent)
    assert "sb-1" in await start(agent, gateway, "sb-1")
    assert record_of(agent, "sb-1").prepared_as == ""
    await until_ready(agent)
    after = supervisors(agent)
    assert len(after) == 1 + SIZE
    assert len(after.keys() & before.keys()) == SIZE - 1
    assert "could not be used" in agent.log.read_text()
