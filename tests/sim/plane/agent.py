"""An agent: the real session, report queue and reconciler over simulated processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, cast

from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2

from prism_agent import limits
from prism_agent.data_directory import NodeState
from prism_agent.hosted import report_of
from prism_agent.reconcile import (
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
from prism_agent.reports import ReportQueue
from prism_agent.session import NodeIdentity, Session
from tests.sim.plane.loop import EPOCH_S

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
        self.processes: set[tuple[str, int]] = set()
        #: What the journal holds.
        self._journal: dict[str, Sandbox] = {}
        #: When the sandboxes that may run elsewhere by then end by themselves, by the loop's time.
        self.lease_ends_s = 0.0
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
            self.processes.clear()
            return
        loop = self._plane.loop
        loop.call_at(max(self.lease_ends_s, loop.time()), self._end_unextended)

    def _end_unextended(self) -> None:
        """What each supervisor does that no agent has extended the lease of."""
        if self.runs or self._plane.loop.time() < self.lease_ends_s:
            return
        for key, sandbox in self._journal.items():
            if sandbox.wanted.reschedules:
                self.processes.discard((key, sandbox.generation))

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
        self.started = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    def begin(self, tasks: asyncio.TaskGroup, journal: dict[str, Sandbox]) -> None:
        """Adopt what the journal knows."""
        self._tasks = tasks
        adopted = [replace(sandbox) for sandbox in journal.values()]
        # What belongs to nobody is swept.
        known = {(sandbox.sandbox_id, sandbox.generation) for sandbox in adopted}
        self._agent.processes &= known
        for sandbox in adopted:
            alive = (sandbox.sandbox_id, sandbox.generation) in self._agent.processes
            if alive and sandbox.phase in (Phase.QUEUED, Phase.STARTING):
                # Half a start is undone, and begun anew.
                self._agent.processes.discard((sandbox.sandbox_id, sandbox.generation))
            self.perform(self.reconciler.adopt(sandbox, alive))
        self.started.set()

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

    def renew_lease(self, until_s: float) -> None:
        self._agent.lease_ends_s = until_s + limits.LEASE_GRACE_S

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
        self._plane.begins(self._agent, *key)
        await asyncio.sleep(self._random.uniform(0.001, 0.2))
        self.perform(self.reconciler.started(sandbox_id, "fake"))

    async def _end(self, sandbox_id: str, grace_s: float, *, delete: bool) -> None:
        await asyncio.sleep(self._random.uniform(0.001, min(grace_s, 0.5) + 0.05))
        sandbox = self.reconciler.sandboxes[sandbox_id]
        self._agent.processes.discard((sandbox_id, sandbox.generation))
        await asyncio.sleep(self._random.uniform(0.001, 0.02))
        outcome = self.reconciler.deleted if delete else self.reconciler.stopped
        self.perform(outcome(sandbox_id))

    async def _pause(self, sandbox_id: str, *, pause: bool) -> None:
        await asyncio.sleep(self._random.uniform(0.001, 0.02))
        outcome = self.reconciler.paused if pause else self.reconciler.resumed
        with contextlib.suppress(KeyError):
            self.perform(outcome(sandbox_id))
