"""Callers of the control plane, and what they were told."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

from prism_common.errors import PrismError
from prism_control.state import commands
from prism_control.state.commands import Command
from prism_control.state.model import OnNodeLoss, Spec
from prism_control.state.results import Ok, Refused
from tests.sim.invariants import ViolationError
from tests.sim.plane.agent import ZONES

if TYPE_CHECKING:
    from tests.sim.plane.plane import Plane

MIB = 2**20
#: Most may run anywhere.
SELECTORS = ((), (), (), (), *((("zone", zone),) for zone in ZONES))
#: As the API's callers have a deadline.
_PATIENCE_S = 3.0
#: What a batcher says when nothing was proposed, or the outcome is open: the same is sent again.
_RETRIED = frozenset(
    {"NOT_LEADER", "NO_LEADER", "OUTCOME_UNKNOWN", "STOPPING", "QUEUE_FULL", "DISK_FULL"}
)


class Clients:
    """Some callers, each with one request at a time."""

    def __init__(self, plane: Plane, random: Random) -> None:
        self._plane = plane
        self._random = random
        self._made = 0
        #: Acknowledged creates: request id → sandbox id.
        self.created: dict[str, str] = {}
        #: What was perhaps deleted, and its tombstone with time.
        self.deleted: set[str] = set()
        #: Answers of every kind.
        self.answers = 0

    async def run(self) -> None:
        """Call until the plane is healed; the request under way is seen to its end."""
        while not self._plane.is_healed:
            count = self._random.choice((1, 1, 1, 1, 1, 3, 20, 60))
            async with asyncio.TaskGroup() as tasks:
                for _ in range(count):
                    tasks.create_task(self._one())
            await asyncio.sleep(self._random.uniform(0.0, 0.8))

    async def _one(self) -> None:
        kind = self._random.random()
        if kind < 0.5 or not self.created:
            await self._create()
            return
        sandbox = self._random.choice(sorted(self.created.values()))
        request = self.request()
        command: Command
        if kind < 0.72:
            self.deleted.add(sandbox)
            command = commands.DeleteSandbox(request, b"f", sandbox, force=True, grace_ms=100)
        elif kind < 0.8:
            command = commands.StopSandbox(request, b"f", sandbox, grace_ms=100)
        elif kind < 0.86:
            command = commands.StartSandbox(request, b"f", sandbox)
        elif kind < 0.91:
            command = commands.PauseSandbox(request, b"f", sandbox)
        elif kind < 0.95:
            command = commands.ResumeSandbox(request, b"f", sandbox)
        else:
            await self._steer()
            return
        answer = await self.send(command)
        if isinstance(answer, Ok) and answer.sandbox.id != sandbox:
            raise ViolationError(f"{command} was answered with {answer.sandbox.id}")

    async def _create(self) -> None:
        request, name = self.request(), f"box-{self._made}"
        spec = Spec(
            image="host",
            cpu_millicores=self._random.choice((100, 500, 1000)),
            memory_bytes=self._random.choice((64, 256)) * MIB,
            disk_bytes=64 * MIB,
            processes_max=64,
            open_files_max=64,
            on_node_loss=self._random.choice((OnNodeLoss.LOST, OnNodeLoss.RESCHEDULE)),
            priority=self._random.choice((0, 0, 5)),
            node_selector=self._random.choice(SELECTORS),
        )
        attempts = 0

        def command() -> Command:
            # As the API does: each attempt comes with a new id, of which one is used.
            nonlocal attempts
            attempts += 1
            sandbox_id = f"sb-{int(name[4:]):016x}{attempts:04x}"
            return commands.CreateSandbox(request, b"f", sandbox_id, name, spec)

        answer = await self._send_again(command)
        if not isinstance(answer, Ok):
            raise ViolationError(f"the create of {name} was answered with {answer}")
        if answer.sandbox.name != name:
            raise ViolationError(f"the create of {name} was answered with {answer.sandbox.name}")
        self.created[request] = answer.sandbox.id

    async def _steer(self) -> None:
        agent = self._random.choice(self._plane.agents)
        kind = self._random.random()
        if kind < 0.3:
            command: Command = commands.CordonNode(agent.node_id, cordoned=True)
        elif kind < 0.8:
            command = commands.CordonNode(agent.node_id, cordoned=False)
        else:
            command = commands.DrainNode(agent.node_id, deadline_ms=1)
        await self.send(command)

    def request(self) -> str:
        """Return an id for a new request."""
        self._made += 1
        return f"req-{self._made}"

    async def send(self, command: Command) -> Ok | Refused | object:
        """Send until there is an answer, and return it."""
        return await self._send_again(lambda: command)

    async def _send_again(self, make: object) -> object:
        """Send to one member after another until one answers."""
        member = self._random.choice(self._plane.members)
        # Some wait for ever: whatever becomes of the member, they must be told.
        patience_s = None if self._random.random() < 0.2 else _PATIENCE_S
        while True:
            command = make()  # type: ignore[operator]
            twice = self._random.random() < 0.1
            try:
                async with asyncio.timeout(patience_s):
                    if twice:
                        # A retry that overtakes its first attempt.
                        both = [member.submit(command, 256), member.submit(make(), 256)]  # type: ignore[operator]
                        answer, other = await asyncio.gather(*both)
                        self._same(answer, other)
                    else:
                        answer = await member.submit(command, 256)
            except TimeoutError:
                pass
            except PrismError as error:
                if error.code not in _RETRIED:
                    raise
            else:
                self.answers += 1
                return answer
            await asyncio.sleep(self._random.uniform(0.01, 0.2))
            leaders = [each for each in self._plane.members if each.leads]
            member = self._random.choice(leaders or self._plane.members)

    @staticmethod
    def _same(answer: object, other: object) -> None:
        if isinstance(answer, Ok) and isinstance(other, Ok):
            same = answer.sandbox.id == other.sandbox.id
        else:
            same = type(answer) is type(other)
        if not same:
            raise ViolationError(f"one request id, two answers: {answer} and {other}")
