"""The only loop that performs a Ready: drain, persist, send, apply."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, cast

from prism_common.errors import (
    NotLeaderError,
    OutcomeUnknownError,
    QueueFullError,
    StoppingError,
)
from prism_common.signal import Signal
from prism_control.metrics import RaftMetrics
from prism_control.node.announcer import CommitAnnouncer
from prism_control.node.barriers import ReadBarriers
from prism_control.node.compaction import Compaction, SnapshotPolicy
from prism_control.node.disk import Disk, DiskThread
from prism_control.node.ports import Batch, MessageSink, ProposalSource, StateMachine
from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.core import Core
from prism_control.raft.errors import (
    InvalidRequestError,
    NotReadyError,
    ProposalDroppedError,
)
from prism_control.raft.errors import NotLeaderError as RaftNotLeaderError
from prism_control.raft.types import (
    NOBODY,
    Configuration,
    Entry,
    EntryKind,
    Member,
    MemberId,
    Message,
    Ready,
    Role,
    SoftState,
)
from prism_control.storage.errors import DiskFullError
from prism_control.storage.log import LogStore
from prism_control.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Twenty ticks are an election timeout of 1 s, drawn from [1 s, 2 s).
TICK_S: Final = 0.05
#: What peers may have under way together is far below; beyond it messages are lost, as Raft allows.
_INBOX_LENGTH_MAX: Final = 20_000
#: The loop is handed back after applying for so long: heartbeats and other calls go on.
_APPLY_SLICE_S: Final = 0.01
_DISK_FULL_RETRY_S: Final = 0.5


@dataclass(slots=True)
class _Pending:
    term: int
    batch: Batch
    proposed_at: float


class Driver:
    """Runs one member's core against its disk, its peers and its state machine.

    Args:
        core: The pure core; nobody else touches it.
        store: Its log on disk.
        snapshots: Its snapshots on disk.
        machine: What entries are applied to.
        source: Where proposals come from.
        metrics: What is measured.
        policy: When snapshots are taken.
        disk: What writes the log beside the loop; closed at the end of the run.
    """

    def __init__(
        self,
        core: Core,
        store: LogStore,
        snapshots: SnapshotStore,
        machine: StateMachine,
        source: ProposalSource,
        metrics: RaftMetrics,
        policy: SnapshotPolicy | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._core = core
        self._store = store
        self._machine = machine
        self._source = source
        self._metrics = metrics
        self._disk: Disk = disk or DiskThread()
        self._wake = asyncio.Event()
        self._inbox: list[Message] = []
        self._unreachable: set[MemberId] = set()
        self._disconnected: set[MemberId] = set()
        self._snapshot_reports: list[tuple[MemberId, bool]] = []
        #: Index → who waits for it; filled only while this member leads.
        self._pending: dict[int, _Pending] = {}
        self._reads = ReadBarriers()
        self._compaction = Compaction(
            core, store, snapshots, machine, self._disk, self.wake, policy or SnapshotPolicy()
        )
        #: What others want done to the core, between two turns.
        self._asks: list[tuple[Callable[[Core], object], asyncio.Future[object]]] = []
        self._transfers: list[asyncio.Future[bool]] = []
        self._shown_configuration = (core.configuration, core.is_settled)
        #: Told of each configuration that comes into force.
        self.on_configuration: Callable[[Configuration], None] = lambda _: None
        self._soft_state = SoftState(Role.FOLLOWER, NOBODY, core.term)
        #: Index of the first entry of the own term, while this member leads; else 0.
        self._own_term_index = 0
        #: True while a write waits for room on the disk.
        self.disk_full = False
        #: Notified when role, leader, term, readiness to lead or the configuration change.
        self.changed = Signal()
        self.leader_changes = 0
        self._announcer = CommitAnnouncer(core, self.wake)
        #: Sets `_wake` at the next tick.
        self._timer: asyncio.TimerHandle | None = None

    # ── What others ask ──────────────────────────────────────────────────────────────────────

    @property
    def core(self) -> Core:
        """The core, to read from."""
        return self._core

    @property
    def configuration(self) -> Configuration:
        """The configuration in force."""
        return self._core.configuration

    @property
    def soft_state(self) -> SoftState:
        """Role, leader and term as last shown."""
        return self._soft_state

    @property
    def leader(self) -> Member | None:
        """The leader, if one is known."""
        leader_id = self._soft_state.leader
        members = self._core.configuration.members
        return next((m for m in members if m.id == leader_id), None)

    @property
    def snapshot_bytes(self) -> int:
        """Size of the last snapshot that this member wrote."""
        return self._compaction.snapshot_bytes

    @property
    def leads(self) -> bool:
        """Whether this member leads and has applied all that earlier leaders committed."""
        return 0 < self._own_term_index <= self._core.applied_index

    def wake(self) -> None:
        """Take a turn soon: there is something to propose."""
        self._wake.set()

    def receive(self, messages: Sequence[Message]) -> None:
        """Take in messages from a peer."""
        room = _INBOX_LENGTH_MAX - len(self._inbox)
        self._inbox.extend(messages[:room])
        self._wake.set()

    def report_unreachable(self, member: MemberId) -> None:
        """Messages to `member` were lost."""
        self._unreachable.add(member)

    def report_disconnected(self, member: MemberId) -> None:
        """A connection to `member` that stood has ended."""
        self._disconnected.add(member)
        self._wake.set()

    def report_snapshot(self, member: MemberId, ok: bool) -> None:
        """A snapshot that the core wanted sent has been sent or not."""
        self._snapshot_reports.append((member, ok))
        self._wake.set()

    async def read_barrier(self) -> None:
        """Return once the state machine holds everything acknowledged before this call.

        One round of heartbeats serves all reads that wait (thesis §6.4). The caller bounds the
        wait; without a quorum it never ends.

        Raises:
            StoppingError: The member is stopping.
        """
        read = self._reads.add()
        self._wake.set()
        await read

    async def ask(self, act: Callable[[Core], T]) -> T:
        """Do something to the core, which nobody else may touch, in the loop's next turn.

        Raises:
            Whatever `act` raises.
        """
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._asks.append((act, future))
        self._wake.set()
        return cast("T", await future)

    async def change_members(self, change: ConfigurationChange) -> None:
        """Change the configuration; return once the new one is committed and no longer joint.

        Raises:
            NotLeaderError, InvalidRequestError, NotReadyError: Nothing was proposed.
            OutcomeUnknownError: Leadership was lost meanwhile.
        """
        term = self._core.term
        index = await self.ask(lambda core: core.propose_configuration(change))
        while not (self._core.commit >= index and self._core.is_settled):
            if self._core.term != term or self._core.replication is None:
                # A leader that removes itself lets go once that is committed.
                if self._core.commit >= index:
                    return
                raise OutcomeUnknownError("leadership was lost while members changed")
            await self.changed.wait()

    async def transfer_leadership(self, to: MemberId) -> bool:
        """Hand leadership over; return whether `to` leads now.

        Raises:
            NotLeaderError, InvalidRequestError, NotReadyError: Nothing was begun.
        """
        transfer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def begin(core: Core) -> None:
            core.transfer(to)
            self._transfers.append(transfer)

        await self.ask(begin)
        return await transfer

    # ── The loop ─────────────────────────────────────────────────────────────────────────────

    async def run(self, transport: MessageSink) -> None:
        """Drive until cancelled.

        Raises:
            StorageError, InvariantError, CorruptEntryError: The member must stop.
        """
        next_tick = time.monotonic() + TICK_S
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    next_tick = await self._sleep(next_tick)
                    self._drain()
                    while (ready := self._core.take_ready()) is not None:
                        await self._perform(ready, transport)
                        await self._compaction.turn(tasks)
                        self._drain()
                    # What was written meanwhile needs no Ready to be made known.
                    await self._compaction.turn(tasks)
        finally:
            self._reads.close()
            self._close_asks()
            self._fail_all(OutcomeUnknownError("this member is stopping; the outcome is unknown"))
            self._disk.close()
            self._announcer.close()

    async def _sleep(self, next_tick: float) -> float:
        """Wait for work or for the next tick, and deliver it; return when the next one is due."""
        delay_s = next_tick - time.monotonic()
        if delay_s > 0 and not self._wake.is_set():
            if self._timer is None:
                # In whole milliseconds, as some loops count: a turn before the tick is for nothing.
                delay_s = math.ceil(delay_s * 1000) / 1000
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)
            await self._wake.wait()
        else:
            await asyncio.sleep(0)
        now = time.monotonic()
        if now < next_tick:
            return next_tick
        # What arrived while this process was paused comes before the time that has passed.
        self._step_inbox()
        self._core.tick()
        return max(next_tick + TICK_S, now)

    def _ring(self) -> None:
        self._timer = None
        self._wake.set()

    def _step_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._core.step(message)

    def _drain(self) -> None:
        # Whatever came until now is looked at in this turn.
        self._wake.clear()
        self._step_inbox()
        if self._unreachable or self._disconnected or self._snapshot_reports:
            self._pass_reports_on()
        if self._asks:
            self._do_asks()
        self._reads.ask(self._core)
        if not self._source.waits:
            return
        if self._core.replication is not None:
            self._propose(self._source.take())
        else:
            self._source.fail_all(
                NotLeaderError("this member does not lead; nothing was proposed", retry_after_s=0.1)
            )

    def _pass_reports_on(self) -> None:
        unreachable, self._unreachable = self._unreachable, set()
        for member in sorted(unreachable):
            self._core.report_unreachable(member)
        disconnected, self._disconnected = self._disconnected, set()
        for member in sorted(disconnected):
            self._core.report_disconnected(member)
        reports, self._snapshot_reports = self._snapshot_reports, []
        for member, ok in reports:
            self._core.report_snapshot(member, ok)

    def _close_asks(self) -> None:
        waiting = [future for _, future in self._asks] + list(self._transfers)
        self._asks, self._transfers = [], []
        for future in waiting:
            if not future.done():
                future.set_exception(StoppingError("this member is stopping", retry_after_s=0.5))

    def _do_asks(self) -> None:
        asks, self._asks = self._asks, []
        for act, future in asks:
            if future.done():
                continue
            try:
                future.set_result(act(self._core))
            except (RaftNotLeaderError, InvalidRequestError, NotReadyError) as error:
                future.set_exception(error)

    def _propose(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            try:
                index = self._core.propose([batch.data]).start
            except ProposalDroppedError as error:
                self._metrics.proposals.labels("dropped").inc()
                batch.fail(QueueFullError(f"{error}; nothing was proposed", retry_after_s=0.5))
            else:
                self._pending[index] = _Pending(self._core.term, batch, time.perf_counter())

    async def _perform(self, ready: Ready, transport: MessageSink) -> None:
        if ready.soft_state is not None:
            self._note_soft_state(ready.soft_state)
        transport.send(ready.messages_now)
        if ready.needs_persist:
            if ready.messages_now:
                # They leave now: the disk's thread, once woken, holds the interpreter's lock first.
                await asyncio.sleep(0)
            await self._persist(ready)
        self._core.persisted(ready)
        transport.send(ready.messages_after_persist)
        if ready.snapshot is not None:
            await self._compaction.install(ready.snapshot)
        if ready.committed:
            if ready.messages_after_persist:
                # The leader counts on this answer; what it has answered already is less urgent.
                await asyncio.sleep(0)
            await self._apply(ready.committed)
        self._reads.answer(ready, self._core.applied_index)
        if ready.transfer is not None:
            transfers, self._transfers = self._transfers, []
            for transfer in transfers:
                if not transfer.done():
                    transfer.set_result(ready.transfer.succeeded)
        self._show_configuration()

    async def _persist(self, ready: Ready) -> None:
        while True:
            try:
                await self._disk.run(
                    self._store.persist, ready.hard_state, ready.snapshot, ready.entries
                )
            except DiskFullError as error:
                # Nothing is acknowledged and no heartbeat is sent meanwhile, so a leader in this
                # state loses its office to a member that has room.
                if not self.disk_full:
                    logger.error("%s: writes wait until there is room", error)
                    self._fail_all(
                        OutcomeUnknownError(
                            "the leader's disk is full; it may yet be committed", retry_after_s=5.0
                        )
                    )
                self.disk_full = True
                await asyncio.sleep(_DISK_FULL_RETRY_S)
            else:
                if self.disk_full:
                    logger.info("there is room on the disk again")
                self.disk_full = False
                return

    async def _apply(self, committed: Sequence[Entry]) -> None:
        slice_end = time.perf_counter() + _APPLY_SLICE_S
        are_awaited = bool(self._pending)
        for entry in committed:
            result: object = None
            if entry.kind is EntryKind.NORMAL:
                result = self._machine.apply(entry.index, entry.data)
                self._compaction.applied(len(entry.data))
            self._settle(entry, result)
            if time.perf_counter() > slice_end:
                await asyncio.sleep(0)
                slice_end = time.perf_counter() + _APPLY_SLICE_S
        self._announcer.applied()
        led = self.leads
        self._core.applied(committed[-1].index)
        if self.leads != led:
            self.changed.notify()
        if are_awaited:
            # Who waits for these is answered before anything else is done.
            await asyncio.sleep(0)

    def _settle(self, entry: Entry, result: object) -> None:
        leads = self._core.replication is not None
        if leads and not self._own_term_index and entry.term == self._core.term:
            self._own_term_index = entry.index
        pending = self._pending.pop(entry.index, None)
        if pending is None:
            return
        if pending.term != entry.term:
            self._metrics.proposals.labels("lost").inc()
            pending.batch.fail(
                OutcomeUnknownError("leadership was lost while it was under way", retry_after_s=0.5)
            )
            return
        self._metrics.proposals.labels("committed").inc()
        self._metrics.commit_seconds.observe(time.perf_counter() - pending.proposed_at)
        pending.batch.resolve(result)

    def _note_soft_state(self, state: SoftState) -> None:
        before, self._soft_state = self._soft_state, state
        if state.leader != before.leader and state.leader != NOBODY:
            self.leader_changes += 1
            leader = self.leader
            logger.info(
                "term %d: %s leads", state.term, leader.name if leader else f"{state.leader:016x}"
            )
        elif state.leader == NOBODY and before.leader != NOBODY:
            logger.warning("term %d: no leader is known", state.term)
        if before.role is Role.LEADER and (
            state.role is not Role.LEADER or state.term != before.term
        ):
            self._own_term_index = 0
            self._fail_all(
                OutcomeUnknownError("leadership was lost while it was under way", retry_after_s=0.5)
            )
        self.changed.notify()

    def _show_configuration(self) -> None:
        now = (self._core.configuration, self._core.is_settled)
        before, self._shown_configuration = self._shown_configuration, now
        if now[0] is not before[0]:
            self.on_configuration(now[0])
        if now != before:
            self.changed.notify()

    def _fail_all(self, error: Exception) -> None:
        pending, self._pending = self._pending, {}
        for waiting in pending.values():
            self._metrics.proposals.labels("unknown").inc()
            waiting.batch.fail(error)
