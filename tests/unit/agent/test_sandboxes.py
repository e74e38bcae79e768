"""The edge of the reconciler, with a runtime whose sandbox is one real process."""

import asyncio
import contextlib
import errno
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_agent import limits, resizes
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.purge import purge
from prism_agent.reconcile import Assignment, Desired, Phase, Reconciler
from prism_agent.record import Record
from prism_agent.reports import ReportQueue
from prism_agent.runtime.base import Probe, Process, Running, Usage
from prism_agent.sandboxes import Sandboxes

SANDBOX = "sb-1"


class OneProcess:
    """A runtime that adopts what its record names, and now and then cannot kill it."""

    name = "one-process"

    def __init__(self) -> None:
        self.failures = 0
        #: Memory limits that were to be set, and the errors of those attempts that fail.
        self.resizes: list[int] = []
        self.resize_failures: list[int] = []

    async def probe(self) -> Probe:
        return Probe(ready=True)

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        raise AssertionError("nothing is started here")

    def explain(self, record: Record) -> str:
        return ""

    async def adopt(self, record: Record) -> Running | None:
        try:
            return Running(Process(record.pid, record.pid_start_ticks))
        except ProcessLookupError:
            return None

    async def pause(self, record: Record) -> None:
        raise OSError(errno.EOPNOTSUPP, "nothing is paused here")

    async def resume(self, record: Record) -> None:
        return

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        self.resizes.append(spec.limits.memory_bytes)
        if self.resize_failures:
            raise OSError(self.resize_failures.pop(0), "not now")

    async def kill(self, record: Record) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EBUSY, "processes do not end")

    async def delete(self, record: Record) -> None:
        await self.kill(record)

    def oom_kills(self, record: Record) -> int:
        return 0

    def usage(self, record: Record) -> Usage:
        return Usage()

    async def sweep(self, keep: set[str]) -> list[str]:
        return []

    async def close(self) -> None:
        return


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def record_in(phase: Phase, runtime: str, pid: int) -> Record:
    return Record(
        sandbox_id=SANDBOX,
        name=SANDBOX,
        generation=1,
        start_count=1,
        phase=phase,
        desired=Desired.STOPPED if phase is Phase.STOPPING else Desired.RUNNING,
        wanted_start_count=1,
        spec=b"",
        expire_time_s=0.0,
        grace_s=0.0,
        reschedules=False,
        runtime=runtime,
        pid=pid,
    )


class Node:
    """The sandboxes of a node whose journal knows one."""

    def __init__(self, path: Path, child: subprocess.Popen[bytes], phase: Phase) -> None:
        path.mkdir()
        journal = Journal(path)
        record = record_in(phase, OneProcess.name, child.pid)
        journal.save(record)
        self.runtime = OneProcess()
        self.reconciler = Reconciler(1)
        runtimes = {self.runtime.name: self.runtime}
        self.sandboxes = Sandboxes(
            journal,
            runtimes,
            runtimes,
            self.reconciler,
            ReportQueue(),
            AgentMetrics(CollectorRegistry()),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.sandboxes.adopt()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sandboxes.run())
            yield
            self.sandboxes.close()

    async def until(self, phase: Phase) -> None:
        async with asyncio.timeout(10):
            while self.reconciler.sandboxes[SANDBOX].phase is not phase:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_a_stop_that_is_adopted_ends_the_watch_before_it_lets_the_process_go(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    node = Node(tmp_path / "sandboxes", child, Phase.STOPPING)
    async with node.running():
        await node.sandboxes.started.wait()
        await node.until(Phase.STOPPED)


async def test_a_dead_sandbox_that_cannot_be_killed_yet_takes_no_other_with_it(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DELETE_RETRY_S", 0.01)
    node = Node(tmp_path / "sandboxes", child, Phase.READY)
    async with node.running():
        await node.sandboxes.started.wait()
        node.runtime.failures = 3
        child.kill()
        await node.until(Phase.FAILED)
    assert node.runtime.failures == 0
    assert node.reconciler.sandboxes[SANDBOX].reason == "SUPERVISOR_DIED"


async def test_what_cannot_be_killed_does_not_keep_the_agent_from_starting(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    node = Node(tmp_path / "sandboxes", child, Phase.READY)
    child.kill()
    child.wait()
    node.runtime.failures = 1
    async with node.running():
        await node.sandboxes.started.wait()
        await node.until(Phase.FAILED)
    assert node.reconciler.sandboxes[SANDBOX].reason == "PROCESS_LOST"


@pytest.mark.parametrize(
    ("failures", "tries", "reason"),
    [
        ([], 1, ""),
        ([errno.EBUSY, errno.EBUSY], 3, ""),
        ([errno.EOPNOTSUPP], 1, "LIMITS_NOT_HELD"),
    ],
    ids=["at once", "later", "never"],
)
async def test_limits_are_set_as_soon_as_they_can_be(
    tmp_path: Path,
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    failures: list[int],
    tries: int,
    reason: str,
) -> None:
    monkeypatch.setattr(resizes, "_RETRY_S", 0.01)
    node = Node(tmp_path / "sandboxes", child, Phase.READY)
    node.runtime.resize_failures = failures
    spec = sandbox_pb2.SandboxSpec(limits=sandbox_pb2.Limits(memory_bytes=77)).SerializeToString()
    async with node.running():
        await node.sandboxes.started.wait()
        wanted = Assignment(SANDBOX, 1, Desired.RUNNING, 1, SANDBOX, spec)
        node.sandboxes.assign(1, [wanted], complete=False)
        sandbox = node.reconciler.sandboxes[SANDBOX]
        async with asyncio.timeout(10):
            while len(node.runtime.resizes) < tries:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            while sandbox.message != ("not now" if reason else ""):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert sandbox.reason == reason
    assert node.runtime.resizes == [77] * tries
    assert Journal(tmp_path / "sandboxes").load()[0][SANDBOX].spec == spec


async def test_what_died_before_it_had_a_runtime_is_purged(tmp_path: Path) -> None:
    data = DataDirectory(tmp_path / "data")
    Journal(data.sandboxes).save(record_in(Phase.STARTING, "", 0))
    data.close()
    await purge(data.path)
    assert not list(data.sandboxes.iterdir())
