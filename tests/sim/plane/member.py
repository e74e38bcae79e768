"""A control node: the real driver, batcher, leadership and dispatcher on a simulated disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prometheus_client import CollectorRegistry

from prism_common.errors import NotLeaderError
from prism_control.batcher import Batcher
from prism_control.dispatch import Dispatcher
from prism_control.metrics import BatcherMetrics, LeaderMetrics, RaftMetrics
from prism_control.node.compaction import SnapshotPolicy
from prism_control.node.driver import Driver
from prism_control.node.leader import Leadership
from prism_control.node.replica import Replica
from prism_control.node.upgrade import VersionGate
from prism_control.raft.config import CoreConfig
from prism_control.raft.core import Core
from prism_control.raft.types import Entry, HardState, Member, Message, SnapshotRequest
from prism_control.request_queue import BatchingSettings
from prism_control.state.commands import (
    VERSION,
    VERSION_UNTOLD,
    Command,
    UnknownCommandError,
    decode,
)
from prism_control.state.events import NodeChanged, SandboxChanged
from prism_control.state.machine import Machine
from prism_control.state.model import NodeRow, SandboxRow, SandboxState
from prism_control.state.results import Result
from tests.sim.plane.loop import wall_offset_s
from tests.sim.plane.storage import MemoryLog, MemorySnapshots

if TYPE_CHECKING:
    from tests.sim.plane.plane import Plane

T = TypeVar("T")

CLUSTER_ID = "cl-sim"
#: As `node.server` has them.
ELECTION_TICKS = 20
HEARTBEAT_TICKS = 2


class SimMember:
    """One control node, over all its lives."""

    def __init__(
        self, plane: Plane, me: Member, hard_state: HardState, first: Entry, random: Random
    ) -> None:
        self._plane = plane
        self.me = me
        self.name = me.name
        self._random = random
        self.store = MemoryLog(hard_state, [first])
        self.snapshots = MemorySnapshots()
        self.policy = SnapshotPolicy(
            entries=random.choice((20, 200, 10_000)), trailing_entries=random.choice((0, 10))
        )
        self.batching = BatchingSettings(
            enabled=random.random() < 0.9,
            create_queue_size=random.choice((10, 12_000)),
            threshold=random.choice((0, 50)),
            interval_ms=random.choice((0, 250)),
        )
        self.wall_offset_s = 0.0
        #: Of commands: what its release can apply. It is upgraded between two lives.
        self.version = random.choice((VERSION, VERSION, VERSION_UNTOLD))
        self.has_room = True
        self.life = 0
        self._task: asyncio.Task[None] | None = None
        self.replica: Replica = _Watched(plane.check_placement, self.version)
        self.batcher: Batcher | None = None
        self.dispatcher: Dispatcher | None = None
        self.driver: Driver | None = None

    @property
    def runs(self) -> bool:
        """Whether the process lives."""
        return self._task is not None

    @property
    def is_new(self) -> bool:
        """Whether its release is the newest."""
        return self.version == VERSION

    def upgrade(self) -> None:
        """Have the newest release from the next life on, which is to begin."""
        self.crash()
        self.version = VERSION

    @property
    def leads(self) -> bool:
        """Whether it leads and serves."""
        return self.runs and self.driver is not None and self.driver.leads

    # ── Life ─────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the process from what the disk holds."""
        self.life += 1
        self._plane.trace("start", self.name)
        wall_offset_s.set(self.wall_offset_s)
        self._task = self._plane.loop.create_task(self._run(self.life))
        wall_offset_s.set(0.0)

    def come_back(self) -> None:
        """Start the process, unless it lives."""
        if not self.runs:
            self.start()

    def crash(self) -> None:
        """End the process at once."""
        if self._task is None:
            return
        self._plane.trace("crash", self.name)
        self.life += 1
        self._task.cancel()
        self._task = None
        self.driver = self.batcher = self.dispatcher = None

    async def _run(self, life: int) -> None:
        registry = CollectorRegistry()
        replica = self.replica = _Watched(self._plane.check_placement, self.version)
        gate = VersionGate(lambda: replica.machine, self.version)
        if self.store.snapshot.index:
            replica.restore(self.snapshots.read(self.store.snapshot.index))()
        self.snapshots.prune(self.store.snapshot.index, newer=True)
        core = Core(
            CoreConfig(
                self.me.id,
                ELECTION_TICKS,
                HEARTBEAT_TICKS,
                command_version=0 if self.version == VERSION_UNTOLD else self.version,
            ),
            Random(self._random.getrandbits(64)),
            self.store.hard_state,
            self.store.snapshot,
            self.store.in_order(),
        )
        dispatcher = Dispatcher(LeaderMetrics(registry))
        batcher = Batcher(
            self.batching,
            BatcherMetrics(registry),
            lambda: driver.wake(),
            lambda: self.has_room,
            gate.check,
        )
        driver = Driver(
            core,
            cast("Any", self.store),
            cast("Any", self.snapshots),
            replica,
            batcher,
            RaftMetrics(registry),
            self.policy,
            _Disk(),
        )
        gate.attach(driver)
        leadership = Leadership(
            CLUSTER_ID,
            self.me,
            driver,
            replica,
            batcher,
            dispatcher,
            LeaderMetrics(CollectorRegistry()),
            lambda: self.has_room,
            gate,
        )
        self.driver, self.batcher, self.dispatcher = driver, batcher, dispatcher
        self._plane.watch(self)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(driver.run(_Wire(self, life)))
            tasks.create_task(leadership.run())

    # ── What others do to it ─────────────────────────────────────────────────────────────────

    async def submit(self, command: Command, size: int) -> Result:
        """Propose, as the API does on a leader.

        Raises:
            PrismError: As the batcher does; NotLeaderError: this member does not lead.
        """
        if not self.leads or self.batcher is None:
            raise NotLeaderError(f"{self.name} does not lead", retry_after_s=0.05)
        return await self.batcher.submit(command, size)

    def send(self, messages: Iterable[Message], life: int) -> None:
        """Give messages to the network."""
        if life != self.life:
            return
        for message in messages:
            receiver = self._plane.member_of(message.receiver)
            delay_s = self._plane.links.delay_s(self.name, receiver.name)
            if isinstance(message, SnapshotRequest):
                self._stream(message, receiver, delay_s, life)
            elif delay_s is not None:
                self._plane.loop.call_later(delay_s, receiver.receive, message)

    def receive(self, message: Message) -> None:
        """Take a message in."""
        if self.driver is not None:
            self.driver.receive([message])

    def notice_end_of(self, other: SimMember) -> None:
        """A connection to a member has ended."""
        if self.driver is not None:
            self.driver.report_disconnected(other.me.id)

    def _stream(
        self, message: SnapshotRequest, receiver: SimMember, delay_s: float | None, life: int
    ) -> None:
        """Send the newest snapshot, and report how that went."""
        driver = self.driver
        if driver is None:
            return
        meta = driver.core.snapshot
        chunks = self.snapshots.files.get(meta.index)
        arrives = delay_s is not None and chunks is not None
        request = SnapshotRequest(message.sender, message.receiver, message.term, meta)

        def arrive() -> None:
            if chunks is not None and receiver.runs:
                receiver.snapshots.files[meta.index] = list(chunks)
                receiver.receive(request)

        def report() -> None:
            if life == self.life and self.driver is not None:
                self.driver.report_snapshot(message.receiver, arrives)

        if arrives:
            self._plane.loop.call_later(delay_s or 0.0, arrive)
        self._plane.loop.call_later(2 * (delay_s or 0.05), report)


class _Watched(Replica):
    """Shows each placement that is committed, with its node as of then.

    Stops, as an older release would, at what that does not know.
    """

    def __init__(self, placed: Callable[[SandboxRow, NodeRow], None], version: int) -> None:
        super().__init__()
        self._placed = placed
        self._version = version

    def restore(self, chunks: Iterable[bytes]) -> Callable[[], None]:
        """Read a snapshot."""
        machine = Machine.from_snapshot(chunks := list(chunks))
        self._check_version(machine.command_version)
        return super().restore(chunks)

    def _check_version(self, version: int) -> None:
        if version > self._version:
            raise UnknownCommandError(f"this member knows up to {self._version}", version)

    def apply(self, index: int, data: bytes) -> object:
        """Apply one entry."""
        self._check_version(decode(data).version)
        nodes = {node.id: node for node in self.machine.nodes()}
        revision = self.machine.revision
        results = super().apply(index, data)
        changes = self.machine.changes_since(revision, self.machine.revision - revision)
        for event in changes:
            if isinstance(event, NodeChanged):
                nodes[event.row.id] = event.row
            elif isinstance(event, SandboxChanged):
                row = event.row
                is_placed = row.state is SandboxState.SCHEDULED
                if is_placed and event.previous_state is SandboxState.PENDING:
                    self._placed(row, nodes[row.node_id])
        return results


class _Disk:
    """Stands in for the thread that writes: the loop decides how long that takes."""

    def run(self, act: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do it after a while."""
        return asyncio.get_running_loop().run_in_executor(None, act, *args)

    def close(self) -> None:
        """There is no thread."""


class _Wire:
    """What a driver sends by, in one life of its member."""

    def __init__(self, member: SimMember, life: int) -> None:
        self.send = partial(member.send, life=life)
