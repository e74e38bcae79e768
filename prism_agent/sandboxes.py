"""The edge of the reconciler: performs its actions, and tells it what came of them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import assert_never

from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.execs import Execs
from prism_agent.file_call import FileCall
from prism_agent.hosted import Hosted, report_of
from prism_agent.journal import Journal, Record, boot_id, record_of
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import (
    UP,
    Action,
    Assignment,
    Delete,
    Forget,
    Hurry,
    Pause,
    Phase,
    Reconciler,
    Report,
    Resume,
    Sandbox,
    Start,
    Stop,
    Update,
)
from prism_agent.reports import ReportQueue
from prism_agent.runtime.base import Running, Runtime, StartError, Usage
from prism_common.errors import (
    NotFoundError,
    NotServedError,
    QueueFullError,
    SandboxGoneError,
    WrongStateError,
)

logger = logging.getLogger(__name__)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception of a group of groups."""
    inner = group.exceptions[0]
    return first_of(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _warn(what: str, record: Record, error: OSError) -> None:
    logger.warning(what, extra={"sandbox": record.sandbox_id, "error": str(error)})


class _ClosedError(Exception):
    """Ends the task group of `run`, with all that is under way."""


class Sandboxes:
    """All sandboxes of this node.

    Args:
        journal: Where records are kept.
        working: The runtimes that work here by name, best first.
        known: Every runtime, to end what an earlier process has started.
        reconciler: Decides.
        reports: Gets what the leader is to be told.
        metrics: Counts.
    """

    def __init__(
        self,
        journal: Journal,
        working: Mapping[str, Runtime],
        known: Mapping[str, Runtime],
        reconciler: Reconciler,
        reports: ReportQueue,
        metrics: AgentMetrics,
    ) -> None:
        self._journal = journal
        self._working = working
        self._runtimes = known
        self.reconciler = reconciler
        self._reports = reports
        self._metrics = metrics
        self._hosted: dict[str, Hosted] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        #: What the journal knew is in the reconciler: a session may begin.
        self.started = asyncio.Event()
        metrics_of = metrics.sandboxes.labels
        for phase in Phase:
            metrics_of(phase.value).set_function(self._counter(phase))

    def _counter(self, phase: Phase) -> Callable[[], float]:
        return lambda: sum(each.phase is phase for each in list(self.reconciler.sandboxes.values()))

    # ── life ──

    async def adopt(self) -> None:
        """Take over what the journal knows, and remove what nobody knows. Before `run`."""
        records, strays = self._journal.load()
        for runtime in self._runtimes.values():
            for found in await runtime.sweep(set(records)):
                logger.warning("removed a leftover", extra={"leftover": found})
        for name in strays:
            logger.warning("removed a leftover", extra={"leftover": f"directory {name}"})
            await asyncio.to_thread(self._journal.remove, name)
        for record in records.values():
            await self._adopt(record)

    async def _adopt(self, record: Record) -> None:
        self._check_boot(record)
        hosted = self._host(record)
        runtime = self._runtimes.get(record.runtime)
        if runtime is not None and record.phase in UP | {
            Phase.STOPPING,
            Phase.DELETING,
        }:
            hosted.running = await runtime.adopt(record)
        # What is frozen cannot answer: it is spoken to when it is thawed.
        if hosted.running is not None and not await self._frozen(record):
            try:
                await hosted.execs.connect(hosted.running, record.phase_time_s)
            except (OSError, SandboxGoneError):
                hosted.running.close()
                hosted.running = None
        if hosted.running is None and runtime is not None and record.phase is not Phase.DELETED:
            try:
                await runtime.kill(record)
            except OSError as error:
                # One that hangs in the kernel must not keep the others from being adopted. It runs
                # nothing more, and whatever is made of the sandbox next meets it again.
                _warn("cannot kill a sandbox yet", record, error)
            record.pid = 0
        if hosted.running is None:
            hosted.execs.lose()
        logger.info(
            "adopted",
            extra={
                "sandbox": record.sandbox_id,
                "phase": record.phase.value,
                "alive": hosted.running is not None,
            },
        )

    async def _frozen(self, record: Record) -> bool:
        """Return whether an adopted sandbox is to stay frozen; thaw one that is to end."""
        if record.phase in (Phase.PAUSING, Phase.PAUSED, Phase.RESUMING):
            return True
        if record.phase in (Phase.STOPPING, Phase.DELETING):
            with contextlib.suppress(OSError):
                await self._runtimes[record.runtime].resume(record)
        return False

    def _check_boot(self, record: Record) -> None:
        """After a reboot nothing runs, and what was mounted is gone: that is not made up for."""
        if record.boot_id in ("", boot_id()):
            return
        record.pid = 0
        if record.phase in UP | {Phase.STARTING, Phase.STOPPING, Phase.STOPPED}:
            record.phase, record.phase_time_s = Phase.FAILED, time.time()
            record.reason = "NODE_REBOOTED"
            record.message = "its node was rebooted; its processes and files are gone"

    async def run(self) -> None:
        """Perform actions until `close`; the sandboxes go on after it."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for hosted in list(self._hosted.values()):
                    self._resume(hosted)
                self.started.set()
                await self._stop.wait()
                # What is under way is in the journal, and the next process goes on with it.
                raise _ClosedError
        except* _ClosedError:
            pass
        finally:
            self._group = None
            for hosted in self._hosted.values():
                self._unwatch(hosted)
                hosted.execs.detach()
                if hosted.running is not None:
                    hosted.running.close()

    def _resume(self, hosted: Hosted) -> None:
        alive = hosted.running is not None
        sandbox = hosted.record.to_sandbox()
        if alive:
            self._watch(hosted)
        self.perform(self.reconciler.adopt(sandbox, alive))
        self._arm(hosted)
        self.tell(sandbox.sandbox_id)

    def close(self) -> None:
        """End `run`: timers and watches stop, sandboxes do not."""
        self._stop.set()

    async def delete_all(self, timeout_s: float) -> bool:
        """Remove every sandbox; False: something was left when the time was up."""
        self.perform(self.reconciler.assign(self.reconciler.term, (), complete=True))
        try:
            async with asyncio.timeout(timeout_s):
                while any(
                    each.phase is not Phase.DELETED for each in self.reconciler.sandboxes.values()
                ):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        for sandbox_id in list(self.reconciler.sandboxes):
            self._journal.remove(sandbox_id)
        return True

    # ── from the session ──

    def assign(self, term: int, assignments: Iterable[Assignment], complete: bool) -> None:
        """Obey the leader."""
        self.perform(self.reconciler.assign(term, assignments, complete))

    def acknowledge(self, sequence: int) -> None:
        """The leader has committed a batch of reports."""
        for report in self._reports.acknowledge(sequence):
            sandbox = self.reconciler.sandboxes.get(report.sandbox_id)
            if (
                sandbox is not None
                and report.state == agent_pb2.OBSERVED_STATE_DELETED
                and report.generation == sandbox.generation
            ):
                self.perform(self.reconciler.acknowledged(report.sandbox_id))

    def lease_expired(self) -> None:
        """Fence: stop what may run elsewhere by now."""
        self.perform(self.reconciler.lease_expired())

    def _report_of(self, sandbox: Sandbox) -> agent_pb2.SandboxReport:
        hosted = self._hosted.get(sandbox.sandbox_id)
        return report_of(sandbox, hosted.record.phase_time_s if hosted else time.time())

    def reports(self) -> list[agent_pb2.SandboxReport]:
        """Return a report of every sandbox, for a registration."""
        return [self._report_of(each) for each in self.reconciler.sandboxes.values()]

    # ── for the node's API ──

    def execs(self, sandbox_id: str, running: bool = True) -> Execs:
        """Return the execs of a sandbox.

        Raises:
            NotFoundError: It is not on this node.
            WrongStateError: It is not READY, and `running` was asked for; or it runs nothing.
        """
        return self._find(sandbox_id, frozenset({Phase.READY}) if running else None).execs

    def open_files(self, sandbox_id: str) -> FileCall:
        """Return a new call on the files of a sandbox; it must be closed.

        Raises:
            NotFoundError: It is not on this node.
            WrongStateError: It does not run.
            SandboxGoneError: It ends just now.
            QueueFullError: Too many file calls are under way.
        """
        hosted = self._find(sandbox_id, UP)
        here = len(hosted.file_calls)
        everywhere = sum(len(each.file_calls) for each in self._hosted.values())
        if here >= limits.FILE_CALLS_MAX or everywhere >= limits.FILE_CALLS_NODE_MAX:
            raise QueueFullError(
                f"{here} file calls are under way in this sandbox, {everywhere} on its node",
                retry_after_s=0.5,
            )
        process = hosted.running.process if hosted.running is not None else None
        if process is None:
            raise SandboxGoneError("the sandbox ended")
        try:
            root = process.open_root()
        except ProcessLookupError:
            raise SandboxGoneError("the sandbox ended") from None
        except OSError as error:
            raise NotServedError(f"files by this agent ({error.strerror}): it") from None
        call = FileCall(root, hosted.record.uid, hosted.file_calls.discard, hosted.execs.in_use())
        hosted.file_calls.add(call)
        return call

    def _find(self, sandbox_id: str, phases: frozenset[Phase] | None) -> Hosted:
        """Return a sandbox that is in one of the phases; None: in any that it exists in."""
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        hosted = self._hosted.get(sandbox_id)
        if sandbox is None or sandbox.phase is Phase.DELETED:
            raise NotFoundError(f"sandbox {sandbox_id} is not on this node", field="sandbox")
        if hosted is None or (phases is not None and sandbox.phase not in phases):
            raise WrongStateError(
                f"sandbox {sandbox_id} is {sandbox.phase.value}, not ready"
                + (f": {sandbox.message}" if sandbox.message else "")
            )
        if sandbox.runtime == "fake":
            raise WrongStateError(
                f"sandbox {sandbox_id} is of the runtime fake, which runs nothing",
                reason="RUNTIME_FAKE",
            )
        return hosted

    def live(self) -> list[tuple[Sandbox, sandbox_pb2.SandboxSpec]]:
        """Return the sandboxes that hold resources of this node."""
        return [
            (sandbox, self._hosted[sandbox_id].spec)
            for sandbox_id, sandbox in self.reconciler.sandboxes.items()
            if sandbox_id in self._hosted
            and sandbox.phase not in (Phase.DELETED, Phase.FAILED, Phase.QUEUED)
        ]

    # ── actions ──

    def perform(self, actions: Iterable[Action]) -> None:
        """Begin each action; its outcome comes back to the reconciler."""
        for action in actions:
            match action:
                case Start():
                    self._spawn(self._start(action.sandbox_id))
                case Pause():
                    self._spawn(self._pause(action.sandbox_id))
                case Resume():
                    self._spawn(self._resume_processes(action.sandbox_id))
                case Stop() | Delete():
                    self._begin_grace(action)
                    self._spawn(self._end(action.sandbox_id, isinstance(action, Delete)))
                case Hurry():
                    self._hurry(action)
                case Update():
                    self._save(action.sandbox_id)
                    self._arm(self._hosted[action.sandbox_id])
                case Report():
                    hosted = self._save(action.sandbox_id)
                    if hosted is not None:
                        self._arm(hosted)
                    self.tell(action.sandbox_id)
                case Forget():
                    self._forget(action.sandbox_id)
                case _:
                    assert_never(action)
        self._changed.set()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        if self._group is None:
            # The process is stopping: the journal has it, and the next one goes on.
            work.close()
            return
        self._group.create_task(work)

    def tell(self, sandbox_id: str) -> None:
        """Have the leader told how a sandbox is."""
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        if sandbox is not None:
            self._reports.put(self._report_of(sandbox))

    def _host(self, record: Record) -> Hosted:
        spec = sandbox_pb2.SandboxSpec.FromString(record.spec)
        directory = self._journal.directory(record.sandbox_id)
        execs = Execs(directory, spec, lambda: self._usage(record), self._metrics)
        hosted = Hosted(record, spec, execs)
        self._hosted[record.sandbox_id] = hosted
        return hosted

    def _usage(self, record: Record) -> Usage:
        runtime = self._runtimes.get(record.runtime)
        return runtime.usage(record) if runtime else Usage()

    def _save(self, sandbox_id: str) -> Hosted | None:
        """Bring the journal up to the reconciler; what is only queued is not written yet."""
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        if sandbox is None or (sandbox.phase is Phase.QUEUED and sandbox_id not in self._hosted):
            return None
        hosted = self._hosted.get(sandbox_id)
        if hosted is None:
            if sandbox.phase is Phase.DELETED:
                return None
            hosted = self._host(record_of(sandbox))
        record = hosted.record
        if record.phase is not sandbox.phase or not record.phase_time_s:
            record.phase_time_s = time.time()
        record.take(sandbox)
        try:
            self._journal.save(record)
        except OSError as error:
            # A full disk must not end the agent. A start fails where it writes the record itself;
            # of what runs already an older record says less, and the leader says it again.
            _warn("cannot write the journal", record, error)
        return hosted

    async def _start(self, sandbox_id: str) -> None:
        began_s = time.perf_counter()
        sandbox = self.reconciler.sandboxes[sandbox_id]
        old = self._hosted.get(sandbox_id)
        if old is not None and old.record.generation != sandbox.generation:
            del self._hosted[sandbox_id]
        hosted = self._save(sandbox_id)
        if hosted is None:
            return
        failure: BaseException | None = None
        try:
            runtime = self._choose(hosted)
            hosted.record.runtime = runtime.name
            running = await runtime.start(hosted.record, hosted.spec)
            hosted.running = running
            await hosted.execs.connect(running, time.time())
            # Before it is called READY: it would be made again, empty, if it were not known to run.
            hosted.record.phase, hosted.record.phase_time_s = Phase.READY, time.time()
            self._journal.save(hosted.record)
        except* (StartError, OSError, SandboxGoneError) as group:
            failure = first_of(group)
        if failure is not None:
            await self._start_failed(hosted, failure)
            return
        self._metrics.start.labels(runtime.name).observe(time.perf_counter() - began_s)
        actions = self.reconciler.started(sandbox_id, runtime.name)
        self._watch(hosted)
        self.perform(actions)

    def _choose(self, hosted: Hosted) -> Runtime:
        asked = hosted.record.runtime or hosted.spec.runtime
        if asked:
            if asked not in self._working:
                raise StartError(f"runtime {asked} does not work on this node")
            return self._working[asked]
        for best in self._working.values():
            return best
        raise StartError("no runtime works on this node")

    async def _start_failed(self, hosted: Hosted, error: BaseException) -> None:
        sandbox_id = hosted.record.sandbox_id
        logger.warning("start failed", extra={"sandbox": sandbox_id, "error": str(error)})
        runtime = self._runtimes.get(hosted.record.runtime)
        message = str(error)
        if runtime is not None:
            await self._kill(runtime, hosted.record)
            if isinstance(error, SandboxGoneError):
                message = f"{message}: {runtime.explain(hosted.record)}"
        if hosted.running is not None:
            hosted.running.close()
            hosted.running = None
        hosted.record.pid = 0
        self.perform(self.reconciler.start_failed(sandbox_id, "START_FAILED", message))

    def _watch(self, hosted: Hosted) -> None:
        if self._group is not None and hosted.running is not None:
            hosted.watch = self._group.create_task(self._watch_running(hosted, hosted.running))

    def _unwatch(self, hosted: Hosted) -> None:
        if hosted.watch is not None:
            hosted.watch.cancel()
            hosted.watch = None
        if hosted.alarm is not None:
            hosted.alarm.cancel()
            hosted.alarm = None

    async def _watch_running(self, hosted: Hosted, running: Running) -> None:
        """Notice that a sandbox ends without being asked to."""
        record = hosted.record
        await self._stay_connected(hosted, running)
        out_of_memory = hosted.execs.ran_out_of_memory()
        async with hosted.freezing:
            hosted.execs.lose()
            await hosted.end_file_calls()
            await self._kill(self._runtimes[record.runtime], record)
            running.close()
            hosted.running, hosted.watch, record.pid = None, None, 0
            reason, message = "SUPERVISOR_DIED", "the sandbox's first process ended"
            if out_of_memory:
                reason, message = "OUT_OF_MEMORY", "the sandbox used up its memory"
            self.perform(self.reconciler.died(record.sandbox_id, reason, message))

    async def _kill(self, runtime: Runtime, record: Record) -> None:
        """Return once nothing of it runs; what hangs in the kernel is tried again."""
        while True:
            try:
                await runtime.kill(record)
            except OSError as error:
                _warn("cannot kill a sandbox yet", record, error)
                await asyncio.sleep(limits.DELETE_RETRY_S)
            else:
                return

    async def _stay_connected(self, hosted: Hosted, running: Running) -> None:
        """Return once the sandbox has ended; until then keep speaking to its supervisor."""
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(running.wait())
            while not ended.done():
                broken = group.create_task(hosted.execs.disconnected.wait())
                await asyncio.wait({ended, broken}, return_when=asyncio.FIRST_COMPLETED)
                broken.cancel()
                if not ended.done():
                    await self._reconnect(hosted, running)

    async def _reconnect(self, hosted: Hosted, running: Running) -> None:
        try:
            await hosted.execs.connect(running, time.time())
        except (OSError, SandboxGoneError):
            # It ends just now, most likely; else it is asked again.
            await asyncio.sleep(limits.RECONNECT_S)

    # ── pauses ──

    async def _pause(self, sandbox_id: str) -> None:
        hosted = self._save(sandbox_id)
        if hosted is None:
            return
        async with hosted.freezing:
            if not self._is(hosted, Phase.PAUSING):
                return
            failure = await self._try(self._runtimes[hosted.record.runtime].pause(hosted.record))
            if failure:
                await self._reach(hosted)
                self.perform(self.reconciler.pause_failed(sandbox_id, failure))
            else:
                self.perform(self.reconciler.paused(sandbox_id))

    async def _resume_processes(self, sandbox_id: str) -> None:
        hosted = self._save(sandbox_id)
        if hosted is None:
            return
        async with hosted.freezing:
            if not self._is(hosted, Phase.RESUMING):
                return
            failure = await self._try(self._runtimes[hosted.record.runtime].resume(hosted.record))
            if failure:
                self.perform(self.reconciler.resume_failed(sandbox_id, failure))
                return
            await self._reach(hosted)
            hosted.execs.touch()
            self.perform(self.reconciler.resumed(sandbox_id))

    def _is(self, hosted: Hosted, phase: Phase) -> bool:
        """Return whether it is still in a phase: it may have ended while we waited."""
        sandbox = self.reconciler.sandboxes.get(hosted.record.sandbox_id)
        return sandbox is not None and sandbox.phase is phase

    async def _reach(self, hosted: Hosted) -> None:
        """Speak to the supervisor of a sandbox that was adopted while it was frozen."""
        if hosted.running is not None and not hosted.execs.connected:
            try:
                await hosted.execs.connect(hosted.running, time.time())
            except (OSError, SandboxGoneError):
                # Whoever watches it tries again, or sees that it has ended.
                hosted.execs.disconnected.set()

    async def _try(self, work: Awaitable[None]) -> str:
        """Return why it failed; empty: it did not."""
        try:
            await work
        except OSError as error:
            return error.strerror or str(error)
        return ""

    # ── ends ──

    def _begin_grace(self, action: Stop | Delete) -> None:
        """Set when the stop turns into a kill, at once: a hurry may follow in the same moment."""
        hosted = self._hosted.get(action.sandbox_id)
        if hosted is not None:
            hosted.kill_at_s = asyncio.get_running_loop().time() + action.grace_s
            hosted.hurried.clear()

    def _hurry(self, action: Hurry) -> None:
        hosted = self._hosted.get(action.sandbox_id)
        if hosted is not None:
            deadline = asyncio.get_running_loop().time() + action.grace_s
            hosted.kill_at_s = min(hosted.kill_at_s, deadline)
            hosted.hurried.set()

    async def _end(self, sandbox_id: str, delete: bool) -> None:
        """Stop or delete. What cannot be removed now is tried again, and never called removed."""
        hosted = self._save(sandbox_id)
        if hosted is None:
            return
        watch = hosted.watch
        self._unwatch(hosted)
        if not delete:
            self.tell(sandbox_id)
        if watch is not None:
            # It may be about to wait for the process that is let go of below.
            await asyncio.wait({watch})
        runtime = self._runtimes.get(hosted.record.runtime)
        while True:
            try:
                await self._terminate(hosted)
                if runtime is not None:
                    await runtime.kill(hosted.record)
                    hosted.record.pid = 0
                    if delete:
                        await runtime.delete(hosted.record)
                break
            except OSError as error:
                _warn("cannot end a sandbox yet", hosted.record, error)
                await asyncio.sleep(limits.DELETE_RETRY_S)
        if delete:
            self._finish_delete(hosted)
        else:
            self.perform(self.reconciler.stopped(sandbox_id))

    def _finish_delete(self, hosted: Hosted) -> None:
        sandbox_id = hosted.record.sandbox_id
        actions = self.reconciler.deleted(sandbox_id)
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase is not Phase.DELETED:
            # A successor takes its place, with a record of its own.
            del self._hosted[sandbox_id]
            self._journal.remove(sandbox_id)
        hosted.execs.detach()
        self.perform(actions)

    async def _terminate(self, hosted: Hosted) -> None:
        """SIGTERM to all; return when all have ended or the grace period is over."""
        running = hosted.running
        if running is None:
            return
        loop = asyncio.get_running_loop()
        graceful = running.process is not None and loop.time() < hosted.kill_at_s
        if graceful:
            await self._wake(hosted, running)
        if graceful and hosted.execs.terminate():
            async with asyncio.TaskGroup() as group:
                ended = group.create_task(running.wait())
                while not ended.done() and loop.time() < hosted.kill_at_s:
                    hurried = group.create_task(hosted.hurried.wait())
                    await asyncio.wait(
                        {ended, hurried},
                        timeout=hosted.kill_at_s - loop.time(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    hosted.hurried.clear()
                    hurried.cancel()
                ended.cancel()
        hosted.execs.lose()
        running.close()
        hosted.running = None
        await hosted.end_file_calls()

    async def _wake(self, hosted: Hosted, running: Running) -> None:
        """Thaw what may be frozen, so that it can end by itself; else it is killed later."""
        with contextlib.suppress(OSError, SandboxGoneError):
            await self._runtimes[hosted.record.runtime].resume(hosted.record)
            if not hosted.execs.connected and running.control_socket is not None:
                await hosted.execs.connect(running, time.time())

    def _forget(self, sandbox_id: str) -> None:
        self._hosted.pop(sandbox_id, None)
        self._journal.remove(sandbox_id)

    # ── deadlines ──

    def _arm(self, hosted: Hosted) -> None:
        """Set the timer for the nearer of TTL and idle timeout."""
        if hosted.alarm is not None:
            hosted.alarm.cancel()
            hosted.alarm = None
        delay_s = hosted.deadline_in_s(time.time())
        if delay_s is not None and self._group is not None:
            # At least a moment, so that a clock that is behind its timer does not make a loop; at
            # most a minute, so that a clock that is set is noticed.
            delay_s = min(max(delay_s, 0.001), 60.0)
            hosted.alarm = asyncio.get_running_loop().call_later(
                delay_s, self._check_deadlines, hosted
            )

    def _check_deadlines(self, hosted: Hosted) -> None:
        expiry = hosted.expiry(time.time())
        if expiry is None:
            self._arm(hosted)
        else:
            self.perform(self.reconciler.expired(hosted.record.sandbox_id, *expiry))
