"""The agent dies at each write of its journal; the next one goes on, and leaves nothing behind."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prism.agent.v1 import agent_pb2

from prism_agent import cgroups
from prism_agent.journal_log import MARKER_BYTES, JournalLog
from tests.integration.agent import process
from tests.integration.agent.gateway import Gateway
from tests.integration.agent.process import AgentProcess, Result
from tests.integration.agent.test_life import DELETED, READY, STOPPED, until, until_no_traces

PAUSED = agent_pb2.OBSERVED_STATE_PAUSED
DEATH = "JOURNAL_DEATH"
STATUS = 86
#: More than a whole life writes: a loop that does not end is a bug of the test.
WRITES_MAX = 60
#: The agent, but its n-th write of one sandbox's record, or of its execs', is its last act.
MAIN = f"""
import itertools, os
from prism_agent import data_directory, exec_record, journal, journal_log
sandbox, number, when = os.environ["{DEATH}"].split(":")
counter = itertools.count(1)
append, replace = journal.append, journal.replace
if when == "within":
    # The file is replaced again and again.
    journal_log._REWRITE_BYTES_MIN = 2000
def is_last(named):
    return named and next(counter) == int(number)
def write(descriptor, content):
    last = is_last(f"/sandboxes/{{sandbox}}/" in os.readlink(f"/proc/self/fd/{{descriptor}}"))
    if last and when == "within":
        data_directory.write_all(descriptor, content[: len(content) // 2])
    if last and when != "after":
        os._exit({STATUS})
    data_directory.write_all(descriptor, content)
    if last:
        os._exit({STATUS})
def add(descriptor, data):
    last = is_last(sandbox.encode() in data)
    if last and when == "within":
        append(descriptor, data[: len(data) // 2])
    if last and when != "after":
        os._exit({STATUS})
    append(descriptor, data)
    if last:
        os._exit({STATUS})
def swap(new, old):
    last = is_last(sandbox.encode() in new.read_bytes())
    if last and when != "after":
        os._exit({STATUS})
    replace(new, old)
    if last:
        os._exit({STATUS})
exec_record.write_all, journal.append, journal.replace = write, add, swap
from prism_agent.main import main
main()
"""


class Mortal:
    """An agent that dies at the n-th write of its n-th sandbox, and is started again."""

    def __init__(
        self, agent: AgentProcess, gateway: Gateway, environment: pytest.MonkeyPatch, when: str
    ) -> None:
        self.agent = agent
        self.gateway = gateway
        self.deaths = 0
        self._when = when
        self._reviving = False
        self._environment = environment

    async def start(self) -> None:
        """Start it for its next life, which it dies in."""
        count = len(self.gateway.registrations)
        life = self.deaths + 1
        self._environment.setenv(DEATH, f"sb-{life}:{life}:{self._when}")
        await self.agent.start()
        await self.gateway.wait_registrations(count + 1)

    async def _revive(self) -> None:
        assert await self.agent.wait() == STATUS
        self._reviving = True
        self.deaths += 1
        await self.start()
        self._reviving = False

    async def reach(self, goal: Callable[[], Awaitable[object]]) -> None:
        """Reach a goal, through a death of the agent."""
        async with asyncio.TaskGroup() as group:
            death = group.create_task(self._revive())
            await goal()
            if self.agent.alive and not self._reviving:
                death.cancel()

    async def run(self, sandbox: str, request_id: str, script: str) -> Result | None:
        """Run a script, and ask again if the agent dies; None: what was asked first was lost."""
        for attempt in range(2):
            try:
                argv = ["sh", "-c", script]
                return await self.agent.run(sandbox, argv, request_id=request_id)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                if attempt == 0:
                    await self._revive()
        return None


async def until_forgotten(mortal: Mortal, sandbox: str) -> None:
    """Wait for the last write of a life, and for an agent that has outlived it."""
    journal, heartbeats = mortal.agent.data_dir / "journal", mortal.gateway.heartbeats

    def is_forgotten() -> bool:
        log = JournalLog(bytes(MARKER_BYTES))
        log.replay(journal.read_bytes())
        return sandbox not in log

    await until(is_forgotten)
    count = len(heartbeats)
    await until(lambda: len(heartbeats) > count + 1)


async def live(mortal: Mortal, sandbox: str) -> None:
    """Lead one sandbox through its life."""
    gateway = mortal.gateway
    gateway.assign(sandbox)
    await mortal.reach(lambda: gateway.wait_for(sandbox, READY))
    result = await mortal.run(sandbox, "first", "echo x >> runs; wc -l < runs")
    if result is not None:
        assert (result.stdout, result.code) == (b"1\n", 0)
    runs = await mortal.run(sandbox, "second", "touch runs; wc -l < runs")
    assert runs is None or int(runs.stdout) == (result is not None)
    for desired, state in (
        (agent_pb2.DESIRED_STATE_PAUSED, PAUSED),
        (agent_pb2.DESIRED_STATE_RUNNING, READY),
        (agent_pb2.DESIRED_STATE_STOPPED, STOPPED),
        (agent_pb2.DESIRED_STATE_DELETED, DELETED),
    ):
        gateway.want(sandbox, desired, grace_s=0)
        await mortal.reach(lambda state=state: gateway.wait_for(sandbox, state))
    await mortal.reach(lambda: until_no_traces(mortal.agent, sandbox))
    await mortal.reach(lambda: until_forgotten(mortal, sandbox))
    gateway.assignments.clear()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("when", ["before", "within", "after"])
async def test_agent_dies_at_each_write_of_the_journal(
    needs_sandboxes: None,
    gateway: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    groups, _ = cgroups.find_on_this_machine("test-deaths")
    if groups is None:
        pytest.skip("no cgroups here: nothing can be paused")
    groups.close()
    monkeypatch.setattr(process, "_MAIN", MAIN)
    agent = AgentProcess(tmp_path / "data", gateway.address)
    gateway.heartbeat_s = 0.05
    mortal = Mortal(agent, gateway, monkeypatch, when)
    try:
        await mortal.start()
        for life in range(1, WRITES_MAX):
            await live(mortal, f"sb-{life}")
            if mortal.deaths < life:
                break
        assert await agent.end() == 0
    finally:
        await agent.clear()
    # Each of the eight steps of a life has at least one write.
    assert 8 <= mortal.deaths < WRITES_MAX - 1
    assert "Traceback" not in agent.log.read_text()
