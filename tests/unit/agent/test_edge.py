"""What is begun was written, what is called READY was synced; and how little that takes."""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_agent import journal as journal_module
from prism_agent import limits
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.model import Assignment, Desired, Phase, Sandbox
from prism_agent.reconcile import Reconciler
from prism_agent.record import Record, record_of
from prism_agent.reports import ReportQueue
from prism_agent.runtime.base import Running
from prism_agent.runtime.fake import FakeRuntime
from prism_agent.sandboxes import Sandboxes
from prism_control.scheduler.liveness import LivenessConfig

READY = agent_pb2.OBSERVED_STATE_READY
STARTING = agent_pb2.OBSERVED_STATE_STARTING
FAILED = agent_pb2.OBSERVED_STATE_FAILED
STOPPED = agent_pb2.OBSERVED_STATE_STOPPED
DELETED = agent_pb2.OBSERVED_STATE_DELETED


class Looking(FakeRuntime):
    """Reads the journal as the next process would whenever it is asked for something."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen: list[tuple[str, Phase]] = []

    def _look(self, what: str, record: Record) -> None:
        journal = Journal(self._path)
        self.seen.append((what, journal.load()[0][record.sandbox_id].phase))
        journal.close()

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        self._look("start", record)
        return await super().start(record, spec)

    async def kill(self, record: Record) -> None:
        self._look("kill", record)

    async def delete(self, record: Record) -> None:
        self._look("delete", record)


class Node:
    """An agent's sandboxes of a runtime that runs nothing, without a session."""

    def __init__(self, directory: Path, runtime: FakeRuntime | None = None) -> None:
        self.path = directory / "sandboxes"
        self.path.mkdir(exist_ok=True)
        self.journal = Journal(self.path)
        self.reports = ReportQueue()
        runtimes = {"fake": runtime or FakeRuntime()}
        self.sandboxes = Sandboxes(
            self.journal,
            runtimes,
            runtimes,
            Reconciler(1000),
            self.reports,
            AgentMetrics(CollectorRegistry()),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Node"]:
        await self.sandboxes.adopt()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sandboxes.run())
            await self.sandboxes.started.wait()
            yield self
            self.sandboxes.close()
        self.journal.close()

    def assign(self, names: list[str], desired: Desired = Desired.RUNNING) -> None:
        assignments = [Assignment(name, 1, desired, grace_s=0.0) for name in names]
        self.sandboxes.assign(1, assignments, complete=False)

    async def hear(
        self, count: int, state: int | None = None
    ) -> dict[str, agent_pb2.SandboxReport]:
        """Return what the leader is told of so many sandboxes, in a state if one is given."""
        heard: dict[str, agent_pb2.SandboxReport] = {}
        async with asyncio.timeout(10):
            while sum(state in (None, each.state) for each in heard.values()) < count:
                batch = await self.reports.take()
                heard.update({each.sandbox_id: each for each in batch.reports})
                self.sandboxes.acknowledge(batch.sequence)
        return heard

    def registers(self) -> dict[str, int]:
        return {each.sandbox_id: each.state for each in self.sandboxes.reports()}


async def test_all_is_written_before_it_is_begun(tmp_path: Path) -> None:
    runtime = Looking(tmp_path / "sandboxes")
    async with Node(tmp_path, runtime).running() as node:
        node.assign(["sb-1"])
        await node.hear(1, READY)
        assert runtime.seen == [("start", Phase.STARTING)]
        node.assign(["sb-1"], Desired.STOPPED)
        await node.hear(1, STOPPED)
        node.assign(["sb-1"], Desired.DELETED)
        await node.hear(1, DELETED)
    assert runtime.seen[1:] == [
        ("kill", Phase.STOPPING),
        ("kill", Phase.DELETING),
        ("delete", Phase.DELETING),
    ]


async def test_ready_is_not_said_before_the_journal_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Node(tmp_path).running() as node:
        asked, allowed = threading.Event(), threading.Event()
        fdatasync = os.fdatasync

        def hang(descriptor: int) -> None:
            asked.set()
            assert allowed.wait(10)
            fdatasync(descriptor)

        monkeypatch.setattr(os, "fdatasync", hang)
        node.assign(["sb-1"])
        assert await asyncio.to_thread(asked.wait, 10)
        # It runs, and a new session is not told so either.
        assert node.sandboxes.reconciler.sandboxes["sb-1"].phase is Phase.READY
        assert node.registers() == {"sb-1": STARTING}
        assert (await node.hear(1))["sb-1"].state == STARTING
        allowed.set()
        await node.hear(1, READY)
        assert node.registers() == {"sb-1": READY}


async def test_ready_is_not_said_while_the_disk_does_not_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_agent.limits.SYNC_RETRY_S", 0.01)
    async with Node(tmp_path).running() as node:
        failures = 3

        def fail(descriptor: int) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.EIO, "the disk is broken")

        monkeypatch.setattr(os, "fdatasync", fail)
        monkeypatch.setattr(os, "fsync", fail)
        node.assign(["sb-1"])
        await node.hear(1, READY)
        assert failures < 0


async def test_a_batch_is_two_writes_one_sync_and_a_few_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"sb-{number}" for number in range(500)]
    writes, syncs, tasks = 0, 0, 0
    append, fdatasync = journal_module.append, os.fdatasync

    def count_write(descriptor: int, data: bytes) -> None:
        nonlocal writes, tasks
        writes += 1
        tasks = max(tasks, len(asyncio.all_tasks()))
        append(descriptor, data)

    def count_sync(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        fdatasync(descriptor)

    async with Node(tmp_path).running() as node:
        monkeypatch.setattr(journal_module, "append", count_write)
        monkeypatch.setattr(os, "fdatasync", count_sync)
        node.assign(names)
        await node.hear(len(names), READY)
        # That they start, and that they run.
        assert (writes, syncs) == (2, 1)
        assert tasks < 10
        assert not list(node.path.iterdir())
        node.assign(names, Desired.DELETED)
        await node.hear(len(names), DELETED)
        assert syncs == 1
    # That they go, that they are gone, and that the leader knows.
    assert writes == 5
    assert Journal(node.path).load() == ({}, [])


@pytest.mark.parametrize("good_writes", [0, 1])
async def test_a_full_disk_fails_what_starts_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_writes: int
) -> None:
    async with Node(tmp_path).running() as node:
        node.assign(["sb-1"])
        await node.hear(1, READY)
        append = journal_module.append
        left = good_writes

        def fill(descriptor: int, data: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(descriptor, data)

        monkeypatch.setattr(journal_module, "append", fill)
        node.assign(["sb-2", "sb-3"])
        heard = await node.hear(2, FAILED)
        assert heard["sb-2"].reason == "START_FAILED"
        assert "No space left" in heard["sb-2"].message
        assert node.registers()["sb-1"] == READY
        monkeypatch.setattr(journal_module, "append", append)
        node.assign(["sb-4"])
        await node.hear(1, READY)
    # What could not be written then is written now.
    phases = {key: each.phase for key, each in Journal(node.path).load()[0].items()}
    assert phases == {
        "sb-1": Phase.READY,
        "sb-2": Phase.FAILED,
        "sb-3": Phase.FAILED,
        "sb-4": Phase.READY,
    }


async def test_each_deadline_is_kept_whichever_was_set_first(tmp_path: Path) -> None:
    async with Node(tmp_path).running() as node:
        node.assign(["sb-forever"])
        began_s = time.monotonic()
        ends = {"sb-late": 1.6, "sb-soon": 1.0, "sb-next": 1.3}
        node.sandboxes.assign(
            1,
            [
                Assignment(name, 1, Desired.RUNNING, expire_time_s=time.time() + after_s)
                for name, after_s in ends.items()
            ],
            complete=False,
        )
        await node.hear(4, READY)
        gone: list[str] = []
        async with asyncio.timeout(10):
            while len(gone) < 3:
                gone += [
                    name for name, each in (await node.hear(1)).items() if each.state == DELETED
                ]
        assert gone == ["sb-soon", "sb-next", "sb-late"]
        assert time.monotonic() - began_s >= 1.5
        assert node.registers() == {"sb-forever": READY}


# ── leases ──


class Told:
    """Stands in for a sandbox's execs: hears what its supervisor is told."""

    def __init__(self) -> None:
        self.leases: list[float] = []

    def set_lease(self, left_s: float) -> None:
        self.leases.append(left_s)


async def test_what_starts_before_a_leader_is_heard_has_the_lease_of_before(
    tmp_path: Path,
) -> None:
    sandboxes = Node(tmp_path).sandboxes
    edge = sandboxes._edge
    wanted = Assignment("sb-1", 1, Desired.RUNNING, reschedules=True)
    hosted = edge.host(record_of(Sandbox(wanted, Phase.READY)))
    adopted = Told()
    hosted.known_execs = cast("Any", adopted)
    sandboxes.restore_lease(time.monotonic() + 100)
    # What was adopted knows better.
    assert adopted.leases == []
    # What a new supervisor is told when it is connected to.
    edge.extend_lease(hosted)
    assert 60 < adopted.leases[0] <= 100 + limits.LEASE_GRACE_S
    sandboxes.renew_lease(time.monotonic() + 1000)
    assert 900 < adopted.leases[1] <= 1000 + limits.LEASE_GRACE_S


@pytest.mark.parametrize("agents", [1, 100, 1000, 100_000])
def test_supervisors_end_before_the_leader_gives_their_node_up(agents: int) -> None:
    config = LivenessConfig()
    lease_ms = config.lease_ms(config.heartbeat_ms(agents))
    patience_ms = lease_ms + lease_ms // 10 + config.margin_ms
    assert patience_ms - (lease_ms + 1000 * limits.LEASE_GRACE_S) >= 2500
