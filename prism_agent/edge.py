"""What the parts of the reconciler's edge share: what is hosted, and the turn of the journal.

All that changes in one turn of the loop is written to the journal with one write. What was to wait
for that begins then, and then the leader is told: what the agent does and says is on disk before.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping

from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.deadlines import Deadlines
from prism_agent.execs import Execs
from prism_agent.hosted import Hosted, report_of
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import UP, Action, Phase, Reconciler, Sandbox
from prism_agent.record import Record, record_of
from prism_agent.reports import ReportQueue
from prism_agent.runtime.base import Runtime
from prism_agent.works import Works

logger = logging.getLogger(__name__)


def warn(what: str, record: Record, error: OSError) -> None:
    """Log that something is tried again, or goes on with less."""
    logger.warning(what, extra={"sandbox": record.sandbox_id, "error": str(error)})


class Edge:
    """See the module.

    Args:
        journal: Where records are kept.
        working: The runtimes that work here by name, best first.
        runtimes: Every runtime, to end what an earlier process has started.
        reconciler: Decides.
        reports: Gets what the leader is to be told.
        metrics: Counts.
        perform: Begins what the reconciler has decided.
    """

    def __init__(
        self,
        journal: Journal,
        working: Mapping[str, Runtime],
        runtimes: Mapping[str, Runtime],
        reconciler: Reconciler,
        reports: ReportQueue,
        metrics: AgentMetrics,
        perform: Callable[[Iterable[Action]], None],
    ) -> None:
        self.journal = journal
        self.working = working
        self.runtimes = runtimes
        self.reconciler = reconciler
        self.metrics = metrics
        self.perform = perform
        self.hosted: dict[str, Hosted] = {}
        self.works = Works(self._end_turn_now)
        self.group: asyncio.TaskGroup | None = None
        self._reports = reports
        self._deadlines = Deadlines()
        #: Monotonic; None: no leader has been heard by this process.
        self._lease_until_s: float | None = None
        self._alarm: asyncio.TimerHandle | None = None
        # ── of this turn ──
        self._turn: asyncio.Handle | None = None
        self._works_waiting: list[Coroutine[None, None, None]] = []
        self._told: dict[str, None] = {}
        #: What may be said of these once the journal is synced.
        self._unsynced: dict[str, None] = {}
        self._syncing = False

    def open(self, group: asyncio.TaskGroup) -> None:
        """Begin to run what is to be done."""
        self.group = group
        self.works.open(group)

    def close(self) -> None:
        """Write what this turn has said, and do nothing more of it: the next process goes on."""
        self.group = None
        self.works.close()
        for handle in (self._turn, self._alarm):
            if handle is not None:
                handle.cancel()
        self._turn = self._alarm = None
        self._write()
        for work in self._works_waiting:
            work.close()
        self._works_waiting.clear()
        for hosted in self.hosted.values():
            hosted.unwatch()
            hosted.detach()
            if hosted.running is not None:
                hosted.running.close()

    # ── what is hosted ──

    def host(self, record: Record) -> Hosted:
        """Hold a sandbox from now on."""
        spec = sandbox_pb2.SandboxSpec.FromString(record.spec)

        def make_execs() -> Execs:
            directory = self.journal.directory(record.sandbox_id)
            return Execs(
                directory,
                spec,
                lambda: self._oom_kills(record),
                lambda: self._lease_left_s(record),
                self.metrics,
            )

        hosted = self.hosted[record.sandbox_id] = Hosted(record, spec, make_execs)
        return hosted

    def _oom_kills(self, record: Record) -> int:
        runtime = self.runtimes.get(record.runtime)
        return runtime.oom_kills(record) if runtime else 0

    # ── the lease ──

    def renew_lease(self, until_s: float) -> None:
        """Let what is placed again when its node is lost go on until this time.

        Args:
            until_s: Monotonic; when the agent ends it, if it is there to do so.
        """
        self._lease_until_s = until_s
        for hosted in self.hosted.values():
            if hosted.record.reschedules:
                self.extend_lease(hosted)

    def restore_lease(self, until_s: float) -> None:
        """Let what is started before a leader is heard have the lease of the process before us.

        Without one it would outlive this process for ever, should that be killed before it hears
        a leader. What was adopted is not told: its supervisor knows by a clock that nobody sets.
        """
        if self._lease_until_s is None:
            self._lease_until_s = until_s

    def extend_lease(self, hosted: Hosted) -> None:
        """Tell a sandbox's supervisor for how long it may go on without its agent.

        What is frozen is not told: nothing of it runs, and it could not read what it is told.
        """
        left_s, execs = self._lease_left_s(hosted.record), hosted.known_execs
        if left_s is None or execs is None:
            return
        if hosted.record.phase not in (Phase.PAUSING, Phase.PAUSED):
            execs.set_lease(left_s)

    def _lease_left_s(self, record: Record) -> float | None:
        if not record.reschedules or self._lease_until_s is None:
            return None
        # It is the agent that ends it, with a reason, if there is one.
        left_s = self._lease_until_s - time.monotonic() + limits.LEASE_GRACE_S
        return max(left_s, limits.LEASE_GRACE_S)

    def drop(self, sandbox_id: str) -> None:
        """Hold it no more, and forget it: nothing of it is left."""
        self.hosted.pop(sandbox_id, None)
        self._deadlines.set(sandbox_id, None)
        self.journal.forget(sandbox_id)
        self._begin_turn()

    # ── the turn ──

    def save(self, sandbox_id: str) -> Hosted | None:
        """Bring the journal up to the reconciler; what is only queued is not written yet."""
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        hosted = self.hosted.get(sandbox_id)
        if sandbox is None:
            return None
        if hosted is None:
            if sandbox.phase in (Phase.QUEUED, Phase.DELETED):
                return None
            hosted = self.host(record_of(sandbox))
        record = hosted.record
        if not hosted.is_as(sandbox):
            if record.phase is not sandbox.phase or not record.phase_time_s:
                record.phase_time_s = time.time()
            record.take(sandbox)
            hosted.taken = sandbox.wanted
            self.put(record)
        return hosted

    def put(self, record: Record) -> None:
        """Have a record written at the end of the turn."""
        self.journal.put(record)
        self._begin_turn()

    def tell(self, sandbox_id: str) -> None:
        """Have the leader told how a sandbox is."""
        self._told[sandbox_id] = None
        self._begin_turn()

    def begin_when_written(self, work: Coroutine[None, None, None]) -> None:
        """Have work begun once what was put is written, or could not be."""
        if self.group is None:
            # The process is stopping: the journal has it, and the next one goes on.
            work.close()
            return
        self._works_waiting.append(work)
        self._begin_turn()

    def _begin_turn(self) -> None:
        if self._turn is None and self.group is not None:
            self._turn = asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn_now(self) -> None:
        """What is to be done has been done: nothing is gained by a wait for the next turn."""
        if self._turn is not None:
            self._turn.cancel()
            self._end_turn()

    def _end_turn(self) -> None:
        self._turn = None
        self._write()
        works, self._works_waiting = self._works_waiting, []
        for work in works:
            self.works.add(work)
        told, self._told = self._told, {}
        for sandbox_id in told:
            self._report(sandbox_id)

    def _write(self) -> None:
        try:
            self.journal.flush()
        except OSError as error:
            # A full disk must not end the agent. What starts fails, since it looks; of what runs
            # an older record says less, and it is written again with the next that can be.
            logger.warning("cannot write the journal", extra={"error": str(error)})
        if self.journal.wants_sync:
            self._sync_soon()

    # ── what is told ──

    def _is_sayable(self, sandbox: Sandbox, hosted: Hosted | None) -> bool:
        """Whether its record survives the machine, which that it runs must not be said before."""
        if hosted is None or sandbox.phase not in UP:
            return True
        return self.journal.synced >= hosted.start_position

    def _report(self, sandbox_id: str) -> None:
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        if self._is_sayable(sandbox, self.hosted.get(sandbox_id)):
            self._reports.put(self.report_of(sandbox))
        else:
            self._unsynced[sandbox_id] = None
            self._sync_soon()

    def report_of(self, sandbox: Sandbox) -> agent_pb2.SandboxReport:
        """Return what may be said of a sandbox now."""
        hosted = self.hosted.get(sandbox.sandbox_id)
        phase_time_s = hosted.record.phase_time_s if hosted else time.time()
        said = sandbox.phase if self._is_sayable(sandbox, hosted) else Phase.STARTING
        return report_of(sandbox, phase_time_s, said)

    def _sync_soon(self) -> None:
        if not self._syncing and self.group is not None:
            self._syncing = True
            self.group.create_task(self._sync())

    async def _sync(self) -> None:
        """Sync for all that wait at a time, until nobody does."""
        try:
            while self._unsynced or self.journal.wants_sync:
                waiting, self._unsynced = self._unsynced, {}
                try:
                    await asyncio.to_thread(self.journal.sync)
                except OSError as error:
                    self._unsynced = {**waiting, **self._unsynced}
                    logger.warning("cannot sync the journal", extra={"error": str(error)})
                    await asyncio.sleep(limits.SYNC_RETRY_S)
                    continue
                for sandbox_id in waiting:
                    self._report(sandbox_id)
        finally:
            self._syncing = False

    # ── deadlines ──

    def arm(self, hosted: Hosted) -> None:
        """Set the timer for the nearer of TTL and idle timeout."""
        delay_s = hosted.deadline_in_s(time.time())
        sandbox_id = hosted.record.sandbox_id
        if delay_s is None:
            self._deadlines.set(sandbox_id, None)
            return
        # At least a moment, so that a clock that is behind its timer does not make a loop; at
        # most a minute, so that a clock that is set is noticed.
        delay_s = min(max(delay_s, 0.001), 60.0)
        self._deadlines.set(sandbox_id, asyncio.get_running_loop().time() + delay_s)
        self._set_alarm()

    def disarm(self, hosted: Hosted) -> None:
        """It ends: its deadlines do not count any more."""
        self._deadlines.set(hosted.record.sandbox_id, None)

    def _set_alarm(self) -> None:
        next_s = self._deadlines.next()
        if self._alarm is not None:
            if next_s is not None and self._alarm.when() <= next_s:
                return
            self._alarm.cancel()
            self._alarm = None
        if next_s is not None and self.group is not None:
            self._alarm = asyncio.get_running_loop().call_at(next_s, self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._alarm = None
        for sandbox_id in self._deadlines.take(asyncio.get_running_loop().time()):
            hosted = self.hosted.get(sandbox_id)
            if hosted is None:
                continue
            expiry = hosted.expiry(time.time())
            if expiry is None:
                self.arm(hosted)
            else:
                self.perform(self.reconciler.expired(sandbox_id, *expiry))
        self._set_alarm()
