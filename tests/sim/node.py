"""One member of the simulated cluster: a core, and a driver that keeps the core's contract."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from prism_control.raft.config import CoreConfig
from prism_control.raft.core import Core
from prism_control.raft.errors import CorruptEntryError, NotLeaderError, ProposalDroppedError
from prism_control.raft.types import (
    EntryKind,
    Message,
    ReadState,
    Ready,
    Role,
    SnapshotRequest,
)
from tests.sim.disk import Disk, Snapshot, Transaction
from tests.sim.invariants import ViolationError
from tests.sim.state_machine import State

TICK_US = 10_000
_DISK_FULL_RETRY_US = 20_000
_ANNOUNCE_COMMIT_US = (1_000, 10_000)

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class _Proposed(NamedTuple):
    term: int
    data: bytes
    done: Callable[[object], None] | None


class Node:
    """A process that may crash, and the disk that stays."""

    def __init__(self, cluster: Cluster, config: CoreConfig, disk: Disk, random: Random) -> None:
        self._cluster = cluster
        self._config = config
        self._random = random
        self.disk = disk
        self.disk_latency_us = (100, 3_000)
        self.paused_until_us = 0
        #: What was sent until then and has not arrived never will.
        self.lost_before_us = -1
        #: Counts starts; events of an earlier life are void.
        self.life = 0
        self.core: Core | None = None
        self.state: State = disk.synced.snapshot.state.thaw()
        self.tick_us = TICK_US
        self.draw_clock(random)
        self._inbox: deque[Callable[[Core], None]] = deque()
        self._tick_waits = False
        self._turn_is_scheduled = False
        self._is_persisting = False
        self._announces = False
        self._received: dict[tuple[int, int], Snapshot] = {}
        self._proposed: dict[int, _Proposed] = {}
        self._reads: dict[int, tuple[int, Callable[[], None]]] = {}
        self._reads_ready: list[ReadState] = []
        self._snapshot_index = 0
        self._snapshot_is_saving = False

    @property
    def id(self) -> int:
        return self._config.id

    # ---------------------------------------------------------------- life

    def draw_clock(self, random: Random) -> None:
        """Let the clock run at another rate."""
        spread = self._cluster.options.clock_spread
        self.tick_us = round(TICK_US * random.uniform(1 - spread, 1 + spread))

    def start(self) -> None:
        """Start from the disk, unless it is lost or damaged: then this member never starts."""
        image = self.disk.synced
        self.life += 1
        random = Random(self._random.getrandbits(64))
        try:
            entries = self.disk.read_entries()
        except CorruptEntryError as error:
            if self.id not in self._cluster.lost:
                raise
            self._cluster.trace("refuse to start", self.id, error)
            return
        self.core = Core(self._config, random, image.hard_state, image.snapshot.meta, entries)
        self.state = image.snapshot.state.thaw()
        self._inbox = deque()
        self._tick_waits = self._turn_is_scheduled = self._is_persisting = False
        self._snapshot_is_saving = self._announces = False
        self._received = {}
        self._proposed = {}
        self._reads = {}
        self._reads_ready = []
        self._snapshot_index = image.snapshot.meta.index
        self.paused_until_us = 0
        self._cluster.invariants.started(self.core)
        self._wake()

    def crash(self) -> int:
        """Lose everything but the disk, and of that what was not synced."""
        self.life += 1
        self.core = None
        return self.disk.crash(self._random)

    def tick(self) -> None:
        """Let a tick arrive; ticks that were missed are not made up for."""
        if not self._tick_waits:
            self._tick_waits = True
            self.receive(self._tick)

    def _tick(self, core: Core) -> None:
        self._tick_waits = False
        core.tick()

    # ---------------------------------------------------------------- inbox

    def receive(self, action: Callable[[Core], None]) -> None:
        """Put something that touches the core into the inbox."""
        if self.core is not None:
            self._inbox.append(action)
            self._wake()

    def deliver(self, message: Message) -> None:
        """Take a message from the network."""
        self.receive(lambda core: core.step(message))

    def deliver_snapshot(self, message: SnapshotRequest, snapshot: Snapshot) -> None:
        """Take a snapshot that has arrived completely."""
        self._received[(snapshot.meta.index, snapshot.meta.term)] = snapshot
        self.deliver(message)

    def propose(self, datas: list[bytes], done: Callable[[object], None] | None = None) -> None:
        """Take writes from a client; `done` gets the answer to each."""

        def action(core: Core) -> None:
            try:
                indexes = core.propose(datas)
            except (NotLeaderError, ProposalDroppedError) as error:
                self._cluster.trace("refuse", self.id, type(error).__name__)
                return
            for index, data in zip(indexes, datas, strict=True):
                self._proposed[index] = _Proposed(core.term, data, done)

        self.receive(action)

    def read(self, context: int, served: Callable[[], None] = lambda: None) -> None:
        """Take a read from a client; `served` is called when this member's state may be read."""
        if self.core is not None:
            self._reads[context] = (self._cluster.invariants.read_asked(), served)
            self.receive(lambda core: core.read_index(context))

    # ---------------------------------------------------------------- the loop

    def _wake(self) -> None:
        if not self._turn_is_scheduled and not self._is_persisting:
            self._turn_is_scheduled = True
            delay_us = max(
                self._random.randrange(1, 300), self.paused_until_us - self._cluster.now_us
            )
            self._cluster.after(delay_us, self._in_this_life(self._turn))

    def _in_this_life(self, action: Callable[[], None]) -> Callable[[], None]:
        life = self.life

        def guarded() -> None:
            if self.life == life:
                action()

        return guarded

    def _turn(self) -> None:
        core = self.core
        if core is None:
            raise ViolationError(f"node {self.id} runs without a core")
        self._turn_is_scheduled = False
        if self.paused_until_us > self._cluster.now_us:
            self._wake()
            return
        while self._inbox:
            self._inbox.popleft()(core)
            self._cluster.turned(self)
        self._perform(core)

    def _perform(self, core: Core) -> None:
        ready = core.take_ready()
        if ready is None:
            return
        if ready.soft_state is not None:
            soft = ready.soft_state
            self._cluster.trace("role", self.id, soft.role.name, soft.leader, soft.term)
            if soft.role is Role.LEADER:
                self._cluster.faults.elected(self)
        self._send(core, ready.messages_now)
        if not ready.needs_persist:
            self._persisted(core, ready, None)
            return
        received = None
        if ready.snapshot is not None:
            received = self._received[(ready.snapshot.index, ready.snapshot.term)]
        self._is_persisting = True
        self._persist(core, ready, Transaction(ready.hard_state, received, ready.entries))

    def _persist(self, core: Core, ready: Ready, transaction: Transaction) -> None:
        """Write; without room, wait and try again, as the driver does."""
        cluster, disk = self._cluster, self.disk
        if disk.full_until_us > cluster.now_us:
            again = self._in_this_life(lambda: self._persist(core, ready, transaction))
            cluster.after(_DISK_FULL_RETRY_US, again)
            return
        disk.write(transaction)
        delay_us = self._random.randrange(*self.disk_latency_us)
        delay_us += max(0, disk.stalled_until_us - cluster.now_us)
        cluster.after(delay_us, self._in_this_life(lambda: self._written(core, ready, transaction)))

    def _written(self, core: Core, ready: Ready, transaction: Transaction) -> None:
        paused_us = self.paused_until_us - self._cluster.now_us
        if paused_us > 0:
            again = self._in_this_life(lambda: self._written(core, ready, transaction))
            self._cluster.after(paused_us, again)
        elif self.disk.fails_next:
            # What the disk holds is unknown now: the member must stop.
            self.disk.fails_next = False
            self.write_failed(core, ready, transaction)
        else:
            self.disk.sync(transaction)
            self._persisted(core, ready, transaction)
            if core.replication and any(e.kind is EntryKind.CONFIGURATION for e in ready.entries):
                self._cluster.faults.configured(self)

    def write_failed(self, core: Core, ready: Ready, transaction: Transaction) -> None:
        """Stop, and be started again by somebody."""
        self._cluster.trace("write failed", self.id)
        self._cluster.crash(self, 600_000)

    def _persisted(self, core: Core, ready: Ready, transaction: Transaction | None) -> None:
        if transaction is not None:
            self._is_persisting = False
            self._cluster.invariants.disk_changed()
            self._cluster.invariants.written(core, ready.entries)
            if transaction.received is not None:
                self._install(core, transaction.received)
        core.persisted(ready)
        self._cluster.turned(self)
        self._send(core, ready.messages_after_persist)
        if ready.transfer is not None:
            self._cluster.transferred(self, ready.transfer)
        self._apply(core, ready)
        self._serve_reads(core, ready)
        self._maybe_take_snapshot(core)
        self._wake()

    def _send(self, core: Core, messages: tuple[Message, ...]) -> None:
        for message in messages:
            self._cluster.invariants.sent(core, message)
            if isinstance(message, SnapshotRequest):
                self._cluster.send_snapshot(self, message)
            else:
                self._cluster.send(message)

    # ---------------------------------------------------------------- applying and reading

    def _install(self, core: Core, snapshot: Snapshot) -> None:
        self.state = snapshot.state.thaw()
        self._snapshot_index = snapshot.meta.index
        self._cluster.trace("install", self.id, snapshot.meta.index)
        core.applied(snapshot.meta.index)
        self._cluster.invariants.applied(self.id, self.state)

    def _apply(self, core: Core, ready: Ready) -> None:
        for entry in ready.committed:
            self.state, answer = self.state.apply(entry)
            self._cluster.invariants.applied(self.id, self.state)
            proposed = self._proposed.pop(entry.index, None)
            if proposed and proposed.term == entry.term and entry.kind is EntryKind.NORMAL:
                self._cluster.write_acknowledged(entry.index, proposed.data, answer)
                if proposed.done is not None:
                    proposed.done(answer)
        if ready.committed:
            core.applied(self.state.index)
            self._cluster.trace("apply", self.id, self.state.index, self.state.digest())
            self._announce_commit_soon(core)

    def _announce_commit_soon(self, core: Core) -> None:
        """Tell followers, as the driver does, unless entries carry the commit index before."""
        if core.replication is None or self._announces:
            return
        self._announces = True

        def announce(core: Core) -> None:
            self._announces = False
            core.announce_commit()

        delay_us = self._random.randrange(*_ANNOUNCE_COMMIT_US)
        self._cluster.after(delay_us, self._in_this_life(lambda: self.receive(announce)))

    def _serve_reads(self, core: Core, ready: Ready) -> None:
        for context in ready.reads_dropped:
            self._reads.pop(context, None)
        waiting = [*self._reads_ready, *ready.reads]
        self._reads_ready = []
        for read in waiting:
            if read.index > core.applied_index:
                self._reads_ready.append(read)
            elif read.context in self._reads:
                asked, served = self._reads.pop(read.context)
                self._cluster.read_served(self, asked)
                served()

    # ---------------------------------------------------------------- snapshots

    def newest_snapshot(self) -> Snapshot:
        """Return what a stream to a follower would send."""
        return self.disk.synced.snapshot

    def _maybe_take_snapshot(self, core: Core) -> None:
        policy = self._cluster.options
        if self._snapshot_is_saving or (
            self.state.index - self._snapshot_index < policy.snapshot_entries
        ):
            return
        snapshot = Snapshot(core.snapshot_meta(self.state.index), self.state.freeze())
        self._cluster.invariants.snapshot_taken(snapshot.meta)
        transaction = Transaction(taken=snapshot)
        self.disk.write(transaction)
        self._snapshot_is_saving = True
        self._cluster.after(
            self._random.randrange(*self.disk_latency_us) * 3,
            self._in_this_life(lambda: self._snapshot_written(snapshot, transaction)),
        )

    def _snapshot_written(self, snapshot: Snapshot, transaction: Transaction) -> None:
        self._snapshot_is_saving = False
        self._snapshot_index = max(self._snapshot_index, snapshot.meta.index)
        self.disk.sync(transaction)
        compact_index = snapshot.meta.index - self._cluster.options.trailing_entries
        self._cluster.trace("snapshot", self.id, snapshot.meta.index)

        def action(core: Core) -> None:
            core.snapshot_saved(snapshot.meta)
            core.compact(compact_index)
            self.disk.write(Transaction(compact_index=compact_index))

        self.receive(action)
