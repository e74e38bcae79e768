"""All sandboxes of this node: what the session and the node's API see of the reconciler's edge."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import assert_never

from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits, measures
from prism_agent.adoption import Adoption
from prism_agent.edge import Edge
from prism_agent.endings import Endings
from prism_agent.execs import Execs
from prism_agent.file_call import FileCall
from prism_agent.hosted import Hosted
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.network.forward import Forward
from prism_agent.pauses import Pauses
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
    Resize,
    Resume,
    Sandbox,
    Start,
    Stop,
    Update,
)
from prism_agent.reports import ReportQueue
from prism_agent.resizes import Resizes
from prism_agent.runtime.base import Runtime
from prism_agent.starts import Starts
from prism_agent.watches import Watches
from prism_common.errors import (
    NotFoundError,
    NotServedError,
    QueueFullError,
    SandboxGoneError,
    WrongStateError,
)


class _ClosedError(Exception):
    """Ends the task group of `run`, with all that is under way."""


class Sandboxes:
    """Has the reconciler's actions performed, and tells it what came of them.

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
        self.reconciler = reconciler
        self._reports = reports
        self._edge = Edge(journal, working, known, reconciler, reports, metrics, self.perform)
        self._watches = Watches(self._edge)
        self._starts = Starts(self._edge, self._watches)
        self._pauses = Pauses(self._edge)
        self._resizes = Resizes(self._edge)
        self._endings = Endings(self._edge, self._pauses)
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
        await Adoption(self._edge).adopt()

    async def run(self) -> None:
        """Perform actions until `close`; the sandboxes go on after it."""
        try:
            async with asyncio.TaskGroup() as group:
                self._edge.open(group)
                for hosted in list(self._edge.hosted.values()):
                    self._resume(hosted)
                self.started.set()
                await self._stop.wait()
                # What is under way is in the journal, and the next process goes on with it.
                raise _ClosedError
        except* _ClosedError:
            pass
        finally:
            self._edge.close()

    def _resume(self, hosted: Hosted) -> None:
        alive = hosted.running is not None
        sandbox = hosted.record.to_sandbox()
        self._watches.watch(hosted)
        self.perform(self.reconciler.adopt(sandbox, alive))
        self._edge.arm(hosted)
        self._edge.tell(sandbox.sandbox_id)

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
            self._edge.drop(sandbox_id)
        return True

    # ── from the session ──

    def assign(self, term: int, assignments: Iterable[Assignment], complete: bool) -> None:
        """Obey the leader."""
        self.perform(self.reconciler.assign(term, assignments, complete))

    def acknowledge(self, sequence: int) -> None:
        """The leader has committed a batch of reports."""
        for report in self._reports.acknowledge(sequence):
            if report.state != agent_pb2.OBSERVED_STATE_DELETED:
                continue
            sandbox = self.reconciler.sandboxes.get(report.sandbox_id)
            if sandbox is not None and report.generation == sandbox.generation:
                self.perform(self.reconciler.acknowledged(report.sandbox_id))

    def lease_expired(self) -> None:
        """Fence: stop what may run elsewhere by now."""
        self.perform(self.reconciler.lease_expired())

    def renew_lease(self, until_s: float) -> None:
        """The leader counts this node as alive until then, monotonic time."""
        self._edge.renew_lease(until_s)

    def restore_lease(self, until_s: float) -> None:
        """A process before us was told so; we have heard no leader yet."""
        self._edge.restore_lease(until_s)

    def reports(self) -> list[agent_pb2.SandboxReport]:
        """Return a report of every sandbox, for a registration."""
        return [self._edge.report_of(each) for each in self.reconciler.sandboxes.values()]

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
        everywhere = sum(len(each.file_calls) for each in self._edge.hosted.values())
        if here >= limits.FILE_CALLS_MAX or everywhere >= limits.FILE_CALLS_NODE_MAX:
            raise QueueFullError(
                f"{here} file calls are under way in this sandbox, {everywhere} on its node",
                retry_after_s=0.5,
            )
        if hosted.running is None:
            raise SandboxGoneError("the sandbox ended")
        try:
            root = hosted.running.open_root()
        except ProcessLookupError:
            raise SandboxGoneError("the sandbox ended") from None
        except OSError as error:
            raise NotServedError(f"files by this agent ({error.strerror}): it") from None
        call = FileCall(
            root, hosted.record.uid, hosted.file_calls.discard, hosted.execs.activity.in_use()
        )
        hosted.file_calls.add(call)
        return call

    def open_forward(self, sandbox_id: str) -> Forward:
        """Return a new connection to a port of a sandbox, not made yet; it must be closed.

        Raises:
            NotFoundError: It is not on this node.
            WrongStateError: It is not READY.
            NotServedError: Its runtime has no port that can be reached.
            SandboxGoneError: It ends just now.
            QueueFullError: Too many connections are open.
        """
        hosted = self._find(sandbox_id, frozenset({Phase.READY}))
        here = len(hosted.forwards)
        everywhere = sum(len(each.forwards) for each in self._edge.hosted.values())
        if here >= limits.FORWARDS_MAX or everywhere >= limits.FORWARDS_NODE_MAX:
            raise QueueFullError(
                f"{here} connections to ports of this sandbox are open, {everywhere} on its node",
                retry_after_s=0.5,
            )
        forward = hosted.new_forward()
        hosted.forwards.add(forward)
        return forward

    def _find(self, sandbox_id: str, phases: frozenset[Phase] | None) -> Hosted:
        """Return a sandbox that is in one of the phases; None: in any that it exists in."""
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        hosted = self._edge.hosted.get(sandbox_id)
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

    def measure(self, sandbox_ids: Collection[str]) -> list[sandbox_pb2.SandboxUsage]:
        """Measure those that have processes, of these or of all; blocks, for a thread."""
        return measures.measure(self._edge, sandbox_ids)

    def live(self) -> list[tuple[Sandbox, sandbox_pb2.SandboxSpec]]:
        """Return the sandboxes that hold resources of this node."""
        return [
            (sandbox, self._edge.hosted[sandbox_id].spec)
            for sandbox_id, sandbox in self.reconciler.sandboxes.items()
            if sandbox_id in self._edge.hosted
            and sandbox.phase not in (Phase.DELETED, Phase.FAILED, Phase.QUEUED)
        ]

    # ── actions ──

    def perform(self, actions: Iterable[Action]) -> None:
        """Begin each action; its outcome comes back to the reconciler."""
        for action in actions:
            # The most frequent first.
            match action:
                case Report():
                    self._update(action.sandbox_id)
                    self._edge.tell(action.sandbox_id)
                case Start():
                    self._starts.begin(action.sandbox_id)
                case Stop() | Delete():
                    self._endings.begin(action)
                case Forget():
                    self._edge.drop(action.sandbox_id)
                case Pause():
                    self._pauses.begin_pause(action.sandbox_id)
                case Resume():
                    self._pauses.begin_resume(action.sandbox_id)
                case Hurry():
                    self._endings.hurry(action)
                case Update():
                    self._update(action.sandbox_id)
                case Resize():
                    self._resizes.begin(action.sandbox_id)
                case _:
                    assert_never(action)
        self._changed.set()

    def _update(self, sandbox_id: str) -> None:
        """Bring its record and its timer up to what is wanted and seen."""
        hosted = self._edge.save(sandbox_id)
        if hosted is not None:
            self._edge.arm(hosted)
