"""One run: members, agents, callers and faults, then healing, and what must hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from random import Random
from unittest import mock

from prism_control.raft.configuration import bootstrap
from prism_control.raft.types import Configuration, Member, MemberId
from prism_control.scheduler.liveness import Liveness, LivenessConfig
from prism_control.state.commands import VERSION
from prism_control.state.machine import Machine
from prism_control.state.model import NodeRow, NodeState, SandboxRow, SandboxState, is_placed
from prism_control.state.snapshot import encode_snapshot
from tests.sim.invariants import ViolationError
from tests.sim.plane.absences import Absences
from tests.sim.plane.agent import CAPACITY, SimAgent, current_agent
from tests.sim.plane.clients import Clients
from tests.sim.plane.faults import Faults
from tests.sim.plane.gateway import Call, Channel, first_of
from tests.sim.plane.haste import Haste
from tests.sim.plane.loop import StuckError, VirtualLoop, virtual
from tests.sim.plane.member import SimMember
from tests.sim.plane.network import Links

#: What of these modules is made up.
MODULES = {
    "prism_control.batcher": ("time",),
    "prism_control.request_queue": ("random",),
    "prism_control.dispatch": ("time",),
    "prism_control.node.driver": ("time",),
    "prism_control.node.compaction": ("time",),
    "prism_control.node.leader": ("time", "random"),
    "prism_agent.session": ("time", "secrets", "random"),
    "prism_agent.edge": ("time",),
}
FAULTS_S = (8.0, 25.0)
HEALED_MAX_S = 60.0
CHECK_INTERVAL_S = 0.1
#: Short, so that nodes are lost and found again within a run.
LIVENESS = LivenessConfig(
    heartbeat_ms_min=300, suspect_beats=3, lease_beats=5, lease_ms_min=2000, margin_ms=500
)
#: In the same measure: what no agent extends ends before its node is lost.
SUPERVISORS_GRACE_S = 0.25
#: States in which nothing is to come by itself.
_AT_REST = frozenset(
    {
        SandboxState.READY,
        SandboxState.PAUSED,
        SandboxState.STOPPED,
        SandboxState.FAILED,
        SandboxState.LOST,
        SandboxState.DELETED,
    }
)
_RUNNING = frozenset({SandboxState.READY, SandboxState.PAUSED})


class Plane:
    """Everything, from one seed.

    Args:
        seed: Decides all.
        trace: Told each step.
    """

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.random = random = Random(f"plane {seed}")
        self._trace = trace
        self.loop = VirtualLoop(Random(random.getrandbits(64)))
        self.links = Links(Random(random.getrandbits(64)))
        ids = tuple(range(1, random.choice((1, 3, 3, 3, 5)) + 1))
        members = tuple(Member(id_, f"n{id_}", f"n{id_}:4200", f"n{id_}:8008") for id_ in ids)
        hard_state, first = bootstrap(Configuration(ids, members=members))
        self.members = [
            SimMember(self, each, hard_state, first, Random(random.getrandbits(64)))
            for each in members
        ]
        self.absences = Absences(self, Random(f"absences {seed}"))
        agents = random.choice((1, 2, 4))
        if self.absences.happen:
            agents = 4
        self.agents = [
            SimAgent(self, number, Random(random.getrandbits(64)))
            for number in range(1, agents + 1)
        ]
        self.clients = Clients(self, Random(random.getrandbits(64)))
        self.haste = Haste(self, Random(f"haste {seed}"))
        self.faults = Faults(self, Random(random.getrandbits(64)))
        self.calls: list[Call] = []
        self.is_healed = False
        #: Nodes that were seen LOST; shows that a run has reached something.
        self.lost: set[tuple[str, str]] = set()
        self._violation: ViolationError | None = None

    @property
    def losses(self) -> int:
        """How often a node was given up."""
        return len(self.lost)

    def trace(self, what: str, *details: object) -> None:
        """Write down what happens, if somebody wants to know."""
        if self._trace is not None:
            self._trace(f"{self.loop.now_s:>12.6f} {what} {' '.join(map(str, details))}")

    def member_of(self, member_id: MemberId) -> SimMember:
        """Return a member by id."""
        return self.members[member_id - 1]

    def member_named(self, name: str) -> SimMember:
        """Return a member by name."""
        return next(member for member in self.members if member.name == name)

    # ── A run ────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Run through faults and healing.

        Raises:
            ViolationError: Something that must hold did not.
        """
        logging.disable(logging.CRITICAL)
        patches = [
            mock.patch("prism_control.node.leader.Liveness", partial(Liveness, config=LIVENESS)),
            mock.patch(
                "prism_agent.session.open_channel",
                lambda address: Channel(self, current_agent.get(), address),
            ),
            mock.patch("prism_agent.limits.LEASE_GRACE_S", SUPERVISORS_GRACE_S),
        ]
        try:
            with virtual(MODULES, self.loop, self.random):
                for patch in patches:
                    patch.start()
                asyncio.set_event_loop(self.loop)
                self.loop.run_until_complete(self._main())
        except StuckError as error:
            raise ViolationError(f"liveness: {error}") from None
        finally:
            for patch in patches:
                patch.stop()
            asyncio.set_event_loop(None)
            self.loop.close()
            logging.disable(logging.NOTSET)

    async def _main(self) -> None:
        for member in self.members:
            member.start()
        for agent in self.agents:
            agent.start()
        callers = [self.loop.create_task(self.clients.run()) for _ in range(3)]
        callers.append(self.loop.create_task(self.haste.run()))
        faults = self.loop.create_task(self.faults.run())
        absences = self.loop.create_task(self.absences.run())
        checks = self.loop.create_task(self._check_always())
        try:
            await asyncio.sleep(self.random.uniform(*FAULTS_S))
            faults.cancel()
            absences.cancel()
            self._heal()
            await self._until("callers are answered", lambda: all(c.done() for c in callers))
            await self._until("all come to rest", self._is_at_rest)
            self._check_end()
        finally:
            tasks = [*callers, faults, absences, checks]
            for task in tasks:
                task.cancel()
            for member in self.members:
                member.crash()
            for agent in self.agents:
                agent.crash(machine_too=True)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self._drain()
        for result in results:
            if isinstance(result, Exception):
                raise first_of(result)
        if self._violation is not None:
            raise self._violation

    async def _drain(self) -> None:
        """Let everything end that was cancelled."""
        me = asyncio.current_task()
        while others := [task for task in asyncio.all_tasks(self.loop) if task is not me]:
            for task in others:
                task.cancel()
            done, _ = await asyncio.wait(others, timeout=1.0)
            for task in done:
                if not task.cancelled():
                    task.exception()

    def _heal(self) -> None:
        self.trace("heal")
        self.is_healed = True
        self.links.heal()
        for member in self.members:
            member.has_room = True
            if not member.is_new:
                member.upgrade()
            member.come_back()
        for agent in self.agents:
            agent.come_back()

    async def _until(self, what: str, done: Callable[[], bool]) -> None:
        ends = self.loop.time() + HEALED_MAX_S
        while not done():
            if self._violation is not None:
                raise self._violation
            if self.loop.time() > ends:
                raise ViolationError(
                    f"liveness: not within {HEALED_MAX_S:g} s: {what}: {self._state()}"
                )
            await asyncio.sleep(CHECK_INTERVAL_S)

    # ── What must hold all the time ──────────────────────────────────────────────────────────

    def begins(self, agent: SimAgent, sandbox_id: str, generation: int) -> None:
        """A sandbox's processes begin, or are thawed, on an agent's machine.

        What counts is what runs on other machines, whether an agent lives there or not.
        """
        self.trace("begins", agent.name, sandbox_id, generation)
        for other in self.agents:
            for (running_id, running_generation), supervisor in other.processes.items():
                is_same = running_id == sandbox_id and not supervisor.is_frozen
                if is_same and other is not agent:
                    self._violated(
                        f"{sandbox_id} of generation {generation} begins on {agent.name} while "
                        f"generation {running_generation} runs on {other.name}"
                    )

    def check_end(self, sandbox_id: str, lease_left_s: float) -> None:
        """A supervisor has ended by itself: not while an agent lives that has its node's lease."""
        if lease_left_s > 0:
            self._violated(f"{sandbox_id} has ended, {lease_left_s:g} s before its node's lease")

    def check_placement(self, row: SandboxRow, node: NodeRow) -> None:
        """A placement is committed: its node must have been fit for it."""
        wanted, has = set(row.spec.node_selector), set(node.labels)
        if node.state is not NodeState.READY or node.cordoned or not wanted <= has:
            self._violated(f"{row.id}, which wants {wanted}, is placed on {node}")

    def watch(self, member: SimMember) -> None:
        """A member has begun a life."""
        for other in self.members:
            if other is not member:
                self.check_calls()

    def check_calls(self) -> None:
        """Let streams end whose link or member has gone."""
        for call in self.calls:
            call.check()
        self.calls = [call for call in self.calls if not call.is_over]

    async def _check_always(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self.check_calls()
            for member in self.members:
                self._check_task(member)
                self._check_room(member)

    def _check_task(self, member: SimMember | SimAgent) -> None:
        task = member._task
        if task is not None and task.done():
            error = None if task.cancelled() else task.exception()
            self._violated(f"{member.name} has ended: {error!r}")

    def _check_room(self, member: SimMember) -> None:
        machine = member.replica.machine
        for node in machine.nodes():
            held, room = machine.allocated(node.id), node.capacity
            if (
                held.cpu_millicores > room.cpu_millicores
                or held.memory_bytes > room.memory_bytes
                or held.disk_bytes > room.disk_bytes
                or held.slots > CAPACITY.slots
            ):
                self._violated(f"{node.name} is over-committed: {held} of {room}")
            if node.state is NodeState.LOST:
                self.lost.add((node.id, node.incarnation))

    def _violated(self, what: str) -> None:
        if self._violation is None:
            self._violation = ViolationError(what)

    # ── What must hold in the end ────────────────────────────────────────────────────────────

    def _leader(self) -> SimMember | None:
        leaders = [member for member in self.members if member.leads]
        return leaders[0] if len(leaders) == 1 else None

    def _is_at_rest(self) -> bool:
        """Whether nothing is under way, and what runs is what should run."""
        for member in self.members:
            self._check_task(member)
        for agent in self.agents:
            self._check_task(agent)
        leader = self._leader()
        if leader is None:
            return False
        machine = leader.replica.machine
        rows = _rows(machine)
        gone = {agent.node_id for agent in self.agents if agent.is_gone}
        if not all(_is_settled(node, node.id in gone) for node in machine.nodes()):
            return False
        if not all(row.state in _AT_REST or _waits(row) for row in rows):
            return False
        waiting = [row for row in rows if _waits(row)]
        if any(_fits(row, node, machine) for row in waiting for node in machine.nodes()):
            return False
        wanted = {(row.id, row.generation, row.node_id) for row in rows if row.state in _RUNNING}
        found = {
            (sandbox_id, generation, agent.node_id)
            for agent in self.agents
            for sandbox_id, generation in (agent.unended() if agent.is_gone else agent.processes)
        }
        return wanted == found and all(
            member.replica.machine.command_version == VERSION
            and member.replica.machine.applied_index == machine.applied_index
            for member in self.members
        )

    def _check_end(self) -> None:
        leader = self._leader()
        if leader is None:
            raise ViolationError("no leader in the end")
        machine = leader.replica.machine
        rows = _rows(machine)
        ids = {row.id for row in rows}
        for request, sandbox_id in self.clients.created.items():
            if sandbox_id not in ids and sandbox_id not in self.clients.deleted:
                raise ViolationError(f"{sandbox_id} of {request} was acknowledged and is gone")
        names = [row.name for row in rows]
        if len(names) != len(set(names)):
            raise ViolationError("one create has made two sandboxes")
        states = {
            b"".join(encode_snapshot(member.replica.machine.snapshot_view()))
            for member in self.members
        }
        if len(states) != 1:
            raise ViolationError("members that have applied the same differ")
        self.trace("end", len(rows), self.clients.answers, self.faults.count)

    def _state(self) -> str:
        leader = self._leader()
        if leader is None:
            return "no leader"
        machine = leader.replica.machine
        rows = _rows(machine)
        odd = [
            f"{row.id} gen {row.generation} {row.state.name} on {row.node_name}"
            for row in rows
            if not (row.state in _AT_REST or _waits(row))
        ]
        nodes = [f"{node.name} {node.state.name}" for node in machine.nodes()]
        running = {agent.name: sorted(agent.processes) for agent in self.agents}
        wanted = sorted((r.id, r.generation, r.node_name) for r in rows if r.state in _RUNNING)
        return f"{nodes}; not at rest: {odd}; wanted {wanted}; running {running}"


def _is_settled(node: NodeRow, is_gone: bool) -> bool:
    """Whether a node is as it should be once all is healed."""
    return node.state is (NodeState.LOST if is_gone else NodeState.READY)


def _waits(row: SandboxRow) -> bool:
    """Whether a sandbox waits for room, which may never come."""
    return row.state is SandboxState.PENDING and not is_placed(row) and bool(row.message)


def _fits(row: SandboxRow, node: NodeRow, machine: Machine) -> bool:
    """Whether a node could take a sandbox that waits for one."""
    need, held, room = row.spec, machine.allocated(node.id), node.capacity
    return (
        node.state is NodeState.READY
        and not node.cordoned
        and set(need.node_selector) <= set(node.labels)
        and held.cpu_millicores + need.cpu_millicores <= room.cpu_millicores
        and held.memory_bytes + need.memory_bytes <= room.memory_bytes
        and held.disk_bytes + need.disk_bytes <= room.disk_bytes
        and held.slots < room.slots
    )


def _rows(machine: Machine) -> list[SandboxRow]:
    """Return all sandboxes, those that are DELETED too."""
    rows: list[SandboxRow] = []
    after = 0
    while True:
        page, after = machine.list_page(after, 1000, tombstones=True)
        rows += page
        if not after:
            return rows
