"""An agent: the real session, report queue and reconciler over simulated processes."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, cast

from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.data_directory import NodeState
from prism_agent.edge import Edge
from prism_agent.hosted import Hosted, report_of
from prism_agent.reconcile import (
    UP,
    Action,
    Assignment,
    Delete,
    Forget,
    Pause,
    Phase,
    Reconciler,
    Report,
    Resume,
    Sandbox,
    Start,
    Stop,
)
from prism_agent.record import record_of
from prism_agent.reports import ReportQueue
from prism_agent.session import NodeIdentity, Session
from tests.sim.plane.loop import EPOCH_S
from tests.sim.plane.supervisor import SimSupervisor

if TYPE_CHECKING:
    from tests.sim.plane.plane import Plane

MIB = 2**20
#: Whose program runs at present; what it opens is its own.
current_agent: ContextVar[SimAgent] = ContextVar("current_agent")
#: Of one node: a few sandboxes fill it.
CAPACITY = node_pb2.ResourceAmounts(
    cpu_millicores=2000, memory_bytes=1024 * MIB, disk_bytes=2048 * MIB, slots=6
)
_STARTS_MAX = 4
ZONES = ("east", "west")


class _Data:
    """Stands in for `data_directory.DataDirectory`."""

    def __init__(self, node_id: str) -> None:
        self.state = NodeState(node_id=node_id)

    def save(self, durable: bool) -> None:
        """All of it is on disk at once."""


class _Gauge:
    def set(self, value: float) -> None:
        """Nobody looks."""


class _Metrics:
    control_session = _Gauge()


class SimAgent:
    """One agent and its machine, over all its lives."""

    def __init__(self, plane: Plane, number: int, random: Random) -> None:
        self._plane = plane
        self.name = f"a{number}"
        self.zone = ZONES[number % len(ZONES)]
        self._random = random
        self.data = _Data(f"nd-{number:020x}")
        #: (sandbox, generation) that run on the machine, whatever becomes of the agent.
        self.processes: dict[tuple[str, int], SimSupervisor] = {}
        #: What the journal holds.
        self._journal: dict[str, Sandbox] = {}
        #: Nobody starts it before this time of the loop; infinite: nobody does so ever.
        self.away_until_s = 0.0
        #: What leaders have said of late: term, assignments, whether they were all.
        self.heard: deque[tuple[int, list[Assignment], bool]] = deque(maxlen=50)
        self._sandboxes: _Sandboxes | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def node_id(self) -> str:
        """Its node."""
        return self.data.state.node_id

    @property
    def runs(self) -> bool:
        """Whether the agent's process lives."""
        return self._task is not None

    def start(self) -> None:
        """Start the agent's process."""
        self._plane.trace("start", self.name)
        token = current_agent.set(self)
        self._task = self._plane.loop.create_task(self._run())
        current_agent.reset(token)

    def crash(self, machine_too: bool) -> None:
        """End the agent's process; with the machine, all that ran on it."""
        if self._task is None:
            return
        self._plane.trace("crash", self.name, machine_too)
        self._task.cancel()
        self._task = self._sandboxes = None
        if machine_too:
            for supervisor in self.processes.values():
                supervisor.end()
            self.processes.clear()

    def come_back(self) -> None:
        """Start the agent's process, unless it lives or is to stay away."""
        if not self.runs and not self.is_away:
            self.start()

    @property
    def is_gone(self) -> bool:
        """Whether nobody ever starts its process again; its machine goes on."""
        return math.isinf(self.away_until_s)

    @property
    def is_away(self) -> bool:
        """Whether nobody starts its process yet."""
        return self._plane.loop.time() < self.away_until_s

    def begin(self, sandbox_id: str, generation: int) -> SimSupervisor:
        """Let a sandbox's processes begin on the machine."""
        self._plane.begins(self, sandbox_id, generation)
        key = (sandbox_id, generation)
        supervisor = SimSupervisor(self._plane.loop, lambda: self._lease_is_over(key))
        self.processes[key] = supervisor
        return supervisor

    def end(self, key: tuple[str, int]) -> None:
        """End a sandbox's processes, if it has any."""
        supervisor = self.processes.pop(key, None)
        if supervisor is not None:
            supervisor.end()

    def _lease_is_over(self, key: tuple[str, int]) -> None:
        """A supervisor has ended all, and an agent that lives sees that."""
        self._plane.trace("lease over", self.name, *key)
        self.end(key)
        if self._sandboxes is not None:
            self._plane.check_end(key[0], self._sandboxes.lease_left_s)
            self._sandboxes.died(*key)

    def unended(self) -> list[tuple[str, int]]:
        """Return what runs here and may run elsewhere once its node is lost."""
        return [
            (sandbox_id, generation)
            for (sandbox_id, generation), supervisor in self.processes.items()
            if not supervisor.is_frozen and self._journal[sandbox_id].wanted.reschedules
        ]

    def hear_again(self, random: Random) -> None:
        """Let the word of a leader that has been replaced arrive once more."""
        if self._sandboxes is None:
            return
        term = self._sandboxes.reconciler.term
        stale = [said for said in self.heard if said[0] < term]
        if stale:
            self._sandboxes.obey(*random.choice(stale))

    async def _run(self) -> None:
        reports = ReportQueue()
        sandboxes = self._sandboxes = _Sandboxes(self, reports)
        session = Session(
            [f"{member.name}:8008" for member in self._plane.members],
            cast("Any", self.data),
            cast("Any", sandboxes),
            reports,
            lambda: (node_pb2.ResourceAmounts(), self._random.random()),
            cast("Any", _Metrics()),
        )
        identity = NodeIdentity(
            name=self.name,
            address=f"{self.name}:7117",
            capacity=CAPACITY,
            runtimes=[node_pb2.RuntimeStatus(name="fake", ready=True)],
            labels={"zone": self.zone},
        )
        async with asyncio.TaskGroup() as tasks:
            sandboxes.begin(tasks, self._journal)
            tasks.create_task(session.run(identity))

    def write_journal(self, sandboxes: dict[str, Sandbox]) -> None:
        """Write everything down."""
        self._journal = {key: replace(sandbox) for key, sandbox in sandboxes.items()}


class _Sandboxes:
    """Stands in for `sandboxes.Sandboxes`: performs actions on made-up processes."""

    def __init__(self, agent: SimAgent, reports: ReportQueue) -> None:
        self._agent = agent
        self._plane = agent._plane
        self._random = agent._random
        self._reports = reports
        state = agent.data.state
        self.reconciler = Reconciler(
            _STARTS_MAX, state.term, fenced=state.lease_is_over(EPOCH_S + agent._plane.loop.now_s)
        )
        #: The real one, for the leases of what it hosts alone.
        self._edge = Edge(
            cast("Any", None), {}, {}, self.reconciler, reports, cast("Any", None), self.perform
        )
        self.started = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    def begin(self, tasks: asyncio.TaskGroup, journal: dict[str, Sandbox]) -> None:
        """Adopt what the journal knows."""
        self._tasks = tasks
        adopted = [replace(sandbox) for sandbox in journal.values()]
        # What belongs to nobody is swept.
        known = {(sandbox.sandbox_id, sandbox.generation) for sandbox in adopted}
        for key in self._agent.processes.keys() - known:
            self._agent.end(key)
        for sandbox in adopted:
            self._adopt(sandbox)
        self.started.set()

    def _adopt(self, sandbox: Sandbox) -> None:
        """Take over what an earlier process has started, as `Adoption` does."""
        key = (sandbox.sandbox_id, sandbox.generation)
        supervisor = self._agent.processes.get(key)
        fenced = self.reconciler.fenced and sandbox.wanted.reschedules
        if supervisor is not None and (
            # Half a start is undone, and begun anew.
            sandbox.phase in (Phase.QUEUED, Phase.STARTING)
            # It could not be thawed, to be told that it has no lease.
            or (fenced and sandbox.phase is Phase.PAUSING)
        ):
            self._agent.end(key)
            supervisor = None
        if supervisor is not None and sandbox.phase is Phase.PAUSING:
            self._plane.begins(self._agent, *key)
            supervisor.thaw()
        if supervisor is not None:
            self._host(sandbox, connected=sandbox.phase not in (Phase.PAUSED, Phase.RESUMING))
        self.perform(self.reconciler.adopt(sandbox, supervisor is not None))

    def _host(self, sandbox: Sandbox, *, connected: bool) -> None:
        """Hold a sandbox, and speak to its supervisor, unless that is frozen, as `Execs` does."""
        supervisor = self._agent.processes[sandbox.sandbox_id, sandbox.generation]
        hosted = Hosted(
            record_of(sandbox),
            sandbox_pb2.SandboxSpec(),
            cast("Any", None),
            known_execs=cast("Any", supervisor if connected else None),
        )
        self._edge.hosted[sandbox.sandbox_id] = hosted
        self._edge.extend_lease(hosted)

    @property
    def lease_left_s(self) -> float:
        """For how long this process may let run what may run elsewhere then; 0: no more."""
        until_s = self._edge._lease_until_s
        return 0.0 if until_s is None else max(0.0, until_s - self._plane.loop.time())

    def died(self, sandbox_id: str, generation: int) -> None:
        """The processes of a sandbox have ended by themselves."""
        self._edge.hosted.pop(sandbox_id, None)
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.generation == generation and sandbox.phase in UP:
            self.perform(self.reconciler.died(sandbox_id, "LEASE_EXPIRED", "its lease is over"))

    # ── what the session asks ────────────────────────────────────────────────────────────────

    def assign(self, term: int, assignments: Iterable[Assignment], complete: bool) -> None:
        said = list(assignments)
        self._agent.heard.append((term, said, complete))
        self.obey(term, said, complete)

    def obey(self, term: int, assignments: list[Assignment], complete: bool) -> None:
        """Do what a leader of that term says, if it may still say so."""
        self.perform(self.reconciler.assign(term, assignments, complete))

    def acknowledge(self, sequence: int) -> None:
        for report in self._reports.acknowledge(sequence):
            sandbox = self.reconciler.sandboxes.get(report.sandbox_id)
            if (
                report.state == agent_pb2.OBSERVED_STATE_DELETED
                and sandbox is not None
                and report.generation == sandbox.generation
            ):
                self.perform(self.reconciler.acknowledged(report.sandbox_id))

    def lease_expired(self) -> None:
        self._plane.trace("fence", self._agent.name)
        self.perform(self.reconciler.lease_expired())

    def restore_lease(self, until_s: float) -> None:
        self._edge.restore_lease(until_s)

    def renew_lease(self, until_s: float) -> None:
        for sandbox_id, hosted in self._edge.hosted.items():
            hosted.record.phase = self.reconciler.sandboxes[sandbox_id].phase
        self._edge.renew_lease(until_s)

    def reports(self) -> list[agent_pb2.SandboxReport]:
        return [report_of(each, 1.0) for each in self.reconciler.sandboxes.values()]

    # ── actions ──────────────────────────────────────────────────────────────────────────────

    def perform(self, actions: Iterable[Action]) -> None:
        """Begin each action, once it is in the journal."""
        self.reconciler.check()
        self._agent.write_journal(self.reconciler.sandboxes)
        for action in actions:
            self._plane.trace("action", self._agent.name, action)
            match action:
                case Start():
                    self._spawn(self._start(action.sandbox_id))
                case Stop():
                    self._spawn(self._end(action.sandbox_id, action.grace_s, delete=False))
                case Delete():
                    self._spawn(self._end(action.sandbox_id, action.grace_s, delete=True))
                case Pause():
                    self._spawn(self._pause(action.sandbox_id, pause=True))
                case Resume():
                    self._spawn(self._pause(action.sandbox_id, pause=False))
                case Report():
                    sandbox = self.reconciler.sandboxes.get(action.sandbox_id)
                    if sandbox is not None:
                        self._reports.put(report_of(sandbox, 1.0))
                case Forget():
                    self._agent.write_journal(self.reconciler.sandboxes)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._tasks is None:
            raise RuntimeError("not begun")
        self._tasks.create_task(work)

    async def _start(self, sandbox_id: str) -> None:
        sandbox = self.reconciler.sandboxes[sandbox_id]
        sandbox.start_count = sandbox.wanted.start_count
        self._agent.write_journal(self.reconciler.sandboxes)
        key = (sandbox_id, sandbox.generation)
        await asyncio.sleep(self._random.uniform(0.001, 0.05))
        if self._random.random() < 0.03:
            self.perform(self.reconciler.start_failed(sandbox_id, "START_FAILED", "made up"))
            return
        self._agent.begin(*key)
        self._host(sandbox, connected=True)
        await asyncio.sleep(self._random.uniform(0.001, 0.2))
        if key in self._agent.processes:
            self.perform(self.reconciler.started(sandbox_id, "fake"))
        else:
            self.perform(self.reconciler.start_failed(sandbox_id, "START_FAILED", "it has ended"))

    async def _end(self, sandbox_id: str, grace_s: float, *, delete: bool) -> None:
        await asyncio.sleep(self._random.uniform(0.001, min(grace_s, 0.5) + 0.05))
        sandbox = self.reconciler.sandboxes[sandbox_id]
        self._agent.end((sandbox_id, sandbox.generation))
        self._edge.hosted.pop(sandbox_id, None)
        await asyncio.sleep(self._random.uniform(0.001, 0.02))
        outcome = self.reconciler.deleted if delete else self.reconciler.stopped
        self.perform(outcome(sandbox_id))

    async def _pause(self, sandbox_id: str, *, pause: bool) -> None:
        await asyncio.sleep(self._random.uniform(0.001, 0.02))
        sandbox = self.reconciler.sandboxes.get(sandbox_id)
        key = (sandbox_id, sandbox.generation if sandbox else 0)
        supervisor, hosted = self._agent.processes.get(key), self._edge.hosted.get(sandbox_id)
        if sandbox is None or supervisor is None or hosted is None:
            return
        # As `Pauses`, step by step: the agent may be killed between any two.
        if pause and sandbox.phase is Phase.PAUSING:
            supervisor.freeze()
            await asyncio.sleep(self._random.uniform(0.0001, 0.01))
            if hosted.known_execs is not None:
                hosted.known_execs.set_lease(0)
            self.perform(self.reconciler.paused(sandbox_id))
        elif not pause and sandbox.phase is Phase.RESUMING:
            hosted.record.phase = sandbox.phase
            self._edge.extend_lease(hosted)
            self._plane.begins(self._agent, *key)
            supervisor.thaw()
            await asyncio.sleep(self._random.uniform(0.0001, 0.01))
            if hosted.known_execs is None:
                hosted.known_execs = cast("Any", supervisor)
                self._edge.extend_lease(hosted)
            self.perform(self.reconciler.resumed(sandbox_id))
