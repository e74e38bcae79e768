"""A real core on a real disk, alone: proposals, reads, snapshots, full disks, restarts."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from prism_common.errors import (
    NotLeaderError,
    OutcomeUnknownError,
    PrismError,
    StoppingError,
)
from prism_control.batcher import Batcher
from prism_control.metrics import BatcherMetrics, RaftMetrics
from prism_control.node.compaction import SnapshotPolicy
from prism_control.node.driver import Driver
from prism_control.node.replica import Replica
from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.types import (
    AppendRequest,
    Configuration,
    Entry,
    EntryKind,
    Member,
    Message,
    Role,
    SnapshotMeta,
    SnapshotRequest,
    VoteReply,
    VoteRequest,
)
from prism_control.request_queue import BatchingSettings
from prism_control.state import commands
from prism_control.state.results import Ok, Result
from prism_control.storage.errors import DiskFullError, StorageError
from prism_control.storage.log import Identity, LogStore
from prism_control.storage.snapshots import SnapshotStore
from tests.unit.state.builders import create

SMALL = SnapshotPolicy(entries=20, trailing_entries=5)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class Sink:
    """Peers that never answer."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, messages: Iterable[Message]) -> None:
        self.sent.extend(messages)


class Node:
    """One member: its parts, made anew at each start from what is on its disk."""

    def __init__(self, path: Path, voters: int = 1, policy: SnapshotPolicy | None = None) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.policy = policy
        members = tuple(Member(n, f"n{n}", f"h:{n}", f"a:{n}") for n in range(1, voters + 1))
        self.configuration = Configuration(tuple(range(1, voters + 1)), members=members)
        self.sink = Sink()
        self.open()

    def open(self) -> None:
        self.store = LogStore(self.path / "log", lambda seconds: None)
        self.snapshots = SnapshotStore(self.path / "snapshots")
        if self.store.identity is None:
            self.store.set_identity(Identity(1, "n1"))
            self.store.bootstrap("cl", *bootstrap(self.configuration))
        stored = self.store.load()
        self.replica = Replica()
        if stored.snapshot.index:
            self.replica.restore(self.snapshots.read(stored.snapshot.index))()
        registry = CollectorRegistry()
        self.core = Core(
            CoreConfig(1, 4, 1), random.Random(1), stored.hard_state, stored.snapshot,
            stored.entries,
        )  # fmt: skip
        self.batcher = Batcher(
            BatchingSettings(enabled=False), BatcherMetrics(registry),
            lambda: self.driver.wake(), lambda: True, lambda _: None,
        )  # fmt: skip
        self.driver = Driver(
            self.core, self.store, self.snapshots, self.replica, self.batcher,
            RaftMetrics(registry), self.policy,
        )  # fmt: skip

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Driver]:
        task = asyncio.get_running_loop().create_task(self.driver.run(self.sink))
        try:
            async with asyncio.timeout(60):
                yield self.driver
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.store.close()

    async def leading(self) -> None:
        while not self.driver.leads:
            await self.driver.changed.wait()

    async def create(self, name: str) -> Result:
        return await self.batcher.submit(create(f"sb-{name}", name=name))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "n1", policy=SMALL)


async def test_a_proposal_resolves_after_it_is_applied(node: Node) -> None:
    async with node.running():
        await node.leading()
        result = await node.create("a")
        assert isinstance(result, Ok)
        assert node.replica.machine.sandbox("a") == result.sandbox
        assert node.core.applied_index == node.core.commit


async def test_reads_wait_for_the_leader_and_for_what_was_acknowledged(node: Node) -> None:
    read = asyncio.get_running_loop().create_task(node.driver.read_barrier())
    await asyncio.sleep(0)
    async with node.running():
        await read
        assert node.driver.leads
        await node.create("a")
        await asyncio.gather(*(node.driver.read_barrier() for _ in range(100)))
        assert node.replica.machine.sandbox("a") is not None


async def test_after_a_restart_everything_is_there_with_the_same_digest(node: Node) -> None:
    digests: list[str] = []
    for start in range(3):
        async with node.running():
            await node.leading()
            await node.driver.read_barrier()
            if digests:
                assert node.replica.machine.digest() == digests[-1]
            for number in range(7):
                await node.create(f"s{start}-{number}")
            digests.append(node.replica.machine.digest())
        node.open()
    node.store.close()


async def test_snapshots_compact_the_log_and_a_restart_begins_from_one(node: Node) -> None:
    async with node.running():
        await node.leading()
        for number in range(100):
            await node.create(f"s{number}")
        # No further snapshot is due, so that what is seen now is what a restart finds.
        await until(
            lambda: (
                node.core.log.base_index == node.core.snapshot.index - SMALL.trailing_entries
                and node.core.applied_index - node.core.snapshot.index < SMALL.entries
            )
        )
        digest = node.replica.machine.digest()
        snapshot = node.core.snapshot
        assert node.core.log.base_index == snapshot.index - SMALL.trailing_entries
        assert node.driver.snapshot_bytes > 0
    node.open()
    assert node.core.snapshot == snapshot
    assert node.core.log.base_index >= snapshot.index - SMALL.trailing_entries
    assert [path.name for path in (node.path / "snapshots").iterdir()] == [
        node.snapshots.file(snapshot.index).name
    ]
    async with node.running():
        await node.driver.read_barrier()
        assert node.replica.machine.digest() == digest
        assert node.replica.machine.sandbox_count == 100


async def test_the_margin_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    policy = SnapshotPolicy(10_000, size_bytes=5000, trailing_entries=2000, trailing_bytes=3000)
    node = Node(tmp_path / "n1", policy=policy)
    async with node.running():
        await node.leading()
        for number in range(150):
            await node.create(f"s{number}")
        await until(lambda: node.core.log.base_index > 0)
        kept = node.core.log.slice(node.core.log.base_index + 1, node.core.snapshot.index)
        assert 0 < sum(len(entry.data) for entry in kept) <= 3000


async def test_a_snapshot_that_cannot_be_written_is_tried_again_later_and_not_at_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(index: int, chunks: Iterable[bytes]) -> int:
        tries.append(index)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(node.snapshots, "write", full)
        async with node.running():
            await node.leading()
            for number in range(60):
                await node.create(f"s{number}")
    assert len(tries) == 1


# ── Failing disks ────────────────────────────────────────────────────────────────────────────────


class FullDisk:
    """Stands before a real store and says that there is no room, for as long as it is told to."""

    def __init__(self, store: LogStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.refused = 0
        persist = store.persist

        def gate(*arguments: object) -> None:
            if self.full:
                self.refused += 1
                raise DiskFullError
            persist(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "persist", gate)
        monkeypatch.setattr("prism_control.node.driver._DISK_FULL_RETRY_S", 0.01)


async def test_a_full_disk_fails_who_waits_loses_nothing_and_goes_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(node.store, monkeypatch)
    async with node.running():
        await node.leading()
        await node.create("before")
        disk.full = True
        with pytest.raises(OutcomeUnknownError) as caught:
            await node.create("meanwhile")
        assert caught.value.retry_after_s
        assert node.driver.disk_full
        await until(lambda: disk.refused >= 3)
        disk.full = False
        await node.create("after")
        assert not node.driver.disk_full
        # What was unknown has been committed after all: it was said that it may be.
        assert node.replica.machine.sandbox("meanwhile") is not None
    node.open()
    async with node.running():
        await node.driver.read_barrier()
        assert node.replica.machine.sandbox_count == 3


async def test_a_stop_does_not_wait_for_room(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(node.store, monkeypatch)
    async with node.running():
        await node.leading()
        disk.full = True
        with pytest.raises(OutcomeUnknownError):
            await node.create("meanwhile")


async def test_a_broken_disk_stops_the_member_and_fails_all(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise StorageError("input/output error")

    run = asyncio.get_running_loop().create_task(node.driver.run(node.sink))
    async with asyncio.timeout(10):
        await node.leading()
        monkeypatch.setattr(node.store, "persist", broken)
        waiting = asyncio.get_running_loop().create_task(node.create("a"))
        read = asyncio.get_running_loop().create_task(node.driver.read_barrier())
        with pytest.raises(BaseExceptionGroup) as caught:
            await run
        assert caught.group_contains(StorageError)
        with pytest.raises(OutcomeUnknownError):
            await waiting
        await asyncio.gather(read, return_exceptions=True)
        with pytest.raises(StoppingError):
            await node.driver.read_barrier()
    node.store.close()


# ── Without a majority, and under a leader ───────────────────────────────────────────────────────


async def test_who_waits_on_a_member_that_does_not_lead_is_told_at_once(tmp_path: Path) -> None:
    node = Node(tmp_path / "n1", voters=3)
    async with node.running():
        with pytest.raises(NotLeaderError):
            await node.create("a")


async def test_reads_that_give_up_are_forgotten_and_stopping_fails_the_rest(
    tmp_path: Path,
) -> None:
    node = Node(tmp_path / "n1", voters=3)
    async with node.running() as driver:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await driver.read_barrier()
        left = asyncio.get_running_loop().create_task(driver.read_barrier())
        await until(lambda: len(driver._reads._new) == 1)
    with pytest.raises(StoppingError):
        await left


def _leader_entries(first: int, last: int, term: int) -> tuple[Entry, ...]:
    return tuple(
        Entry(index, term, EntryKind.NORMAL, commands.encode(
            commands.propose(1000 + index, (create(f"sb-{index}", name=f"s{index}"),))
        ))
        for index in range(first, last + 1)
    )  # fmt: skip


async def test_a_follower_installs_a_snapshot_and_follows_on_from_it(tmp_path: Path) -> None:
    other = Node(tmp_path / "other", policy=SMALL)
    async with other.running():
        await other.leading()
        for number in range(50):
            await other.create(f"s{number}")
        await until(lambda: other.core.snapshot.index >= 40)
        index = other.core.snapshot.index
        whole = list(other.snapshots.read(index))
        term = other.core.snapshot.term

    node = Node(tmp_path / "n1", voters=3)
    meta = SnapshotMeta(index, term, node.configuration)
    async with node.running() as driver:
        incoming_size = node.snapshots.write(index, whole)
        assert incoming_size
        driver.receive([SnapshotRequest(2, 1, 9, meta)])
        driver.receive(
            [AppendRequest(2, 1, 9, index, term, _leader_entries(index + 1, index + 3, 9), index)]
        )
        await until(
            lambda: node.core.log.last_index == index + 3 and node.core.applied_index == index
        )
        assert driver.soft_state.role is Role.FOLLOWER
        assert driver.leader is not None
        assert node.replica.machine.sandbox("s10") is not None
        await until(lambda: node.core.log.persisted == index + 3)
    node.open()
    assert node.core.snapshot == meta
    assert node.core.log.last_index == index + 3
    assert node.replica.machine.sandbox("s10") is not None
    node.store.close()


async def test_losing_leadership_fails_what_is_under_way_as_unknown(tmp_path: Path) -> None:
    """A leader that hears no majority steps down, and its callers are told in time."""
    node = Node(tmp_path / "n1", voters=3)
    async with node.running() as driver:
        _elect(node)
        while node.core.role is not Role.LEADER:
            _elect(node)
            await asyncio.sleep(0.01)
        waiting = asyncio.get_running_loop().create_task(node.create("a"))
        with pytest.raises(OutcomeUnknownError) as caught:
            await waiting
        assert caught.value.retry_after_s
        assert not driver.leads
        with pytest.raises(PrismError):
            await node.create("b")


def _elect(node: Node) -> None:
    """Grant member 1 every vote that it has asked for."""
    asked = [message for message in node.sink.sent if isinstance(message, VoteRequest)]
    node.sink.sent.clear()
    node.driver.receive([VoteReply(m.receiver, 1, m.term, m.pre_vote, granted=True) for m in asked])
