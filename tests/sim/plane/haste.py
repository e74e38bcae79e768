"""People and scripts that do not wait for what they asked for before they ask for the contrary."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from prism_control.state import commands
from prism_control.state.commands import Command
from prism_control.state.model import SandboxState

if TYPE_CHECKING:
    from tests.sim.plane.agent import SimAgent
    from tests.sim.plane.plane import Plane

#: Makes a request of its id and a sandbox's.
_Kind = Callable[[str, str], Command]
#: In so many of all runs somebody is in haste.
_SHARE = 0.3
#: Between two requests, unless there is nothing; an agent needs up to 0.25 s for a start.
_PAUSE_MAX_S = 0.1
#: Between two requests of whom does not wait for an answer: about as long as a commit takes.
_DOUBLE_CLICK_S = 0.01
#: Haste goes on for so long when all is well again: no new leader makes up for what is wrong then.
_HEALED_MAX_S = 4.0
#: What a script finds and turns off and on; of a full node more than its agent begins at once.
_FOUND = frozenset({SandboxState.READY, SandboxState.PAUSED, SandboxState.STOPPED})


class Haste:
    """Of one run.

    Args:
        plane: The run.
        random: Its own, so that other runs stay as they are.
    """

    def __init__(self, plane: Plane, random: Random) -> None:
        self._plane = plane
        self._random = random
        self.happens = random.random() < _SHARE
        self._ends_s = math.inf

    async def run(self) -> None:
        """Ask until the plane is healed, and a little longer."""
        if self.happens:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._turn_all())
                tasks.create_task(self._open_and_close())

    def _goes_on(self) -> bool:
        now_s = self._plane.loop.time()
        if self._plane.is_healed and math.isinf(self._ends_s):
            self._ends_s = now_s + self._random.uniform(0.0, _HEALED_MAX_S)
        return now_s < self._ends_s

    async def _turn_all(self) -> None:
        """A script that stops and starts, or freezes and thaws, all there is."""
        while self._goes_on():
            await asyncio.sleep(self._random.uniform(0.5, 3.0))
            machine = self._random.choice(self._plane.members).replica.machine
            found = [row.id for row in machine.sandboxes() if row.state in _FOUND]
            kinds = (_pause, _resume) if self._random.random() < 0.3 else (_stop, _start)
            requests = self._random.randint(1, 5)
            async with asyncio.TaskGroup() as tasks:
                for sandbox_id in found:
                    tasks.create_task(self._turn(sandbox_id, kinds, requests))
                if self._random.random() < 0.3:
                    await asyncio.sleep(self._random.uniform(0.0, _PAUSE_MAX_S))
                    self._kill(self._random.choice(self._plane.agents))

    async def _turn(self, sandbox_id: str, kinds: tuple[_Kind, _Kind], requests: int) -> None:
        clients = self._plane.clients
        for number in range(requests):
            await clients.send(kinds[number % 2](clients.request(), sandbox_id))
            if self._random.random() < 0.5:
                await asyncio.sleep(self._random.uniform(0.0, _PAUSE_MAX_S))

    def _kill(self, agent: SimAgent) -> None:
        """An agent is replaced while it is at it."""
        if agent.runs:
            agent.crash(machine_too=False)
            self._plane.loop.call_later(self._random.uniform(0.01, 0.5), agent.come_back)

    async def _open_and_close(self) -> None:
        """An operator who opens a node too soon, and takes it back before he has his answer."""
        while self._goes_on():
            await asyncio.sleep(self._random.uniform(0.1, 1.0))
            node_id = self._random.choice(self._plane.agents).node_id
            await self._cordon(node_id, cordoned=True)
            # What is deleted meanwhile makes room, for which others wait.
            await asyncio.sleep(self._random.uniform(0.0, 2.0))
            async with asyncio.TaskGroup() as tasks:
                for cordoned in (False, True) * self._random.randint(1, 3):
                    tasks.create_task(self._cordon(node_id, cordoned=cordoned))
                    await asyncio.sleep(self._random.uniform(0.0, _DOUBLE_CLICK_S))
            await self._cordon(node_id, cordoned=False)

    async def _cordon(self, node_id: str, *, cordoned: bool) -> None:
        await self._plane.clients.send(commands.CordonNode(node_id, cordoned=cordoned))


def _stop(request: str, sandbox_id: str) -> Command:
    return commands.StopSandbox(request, b"f", sandbox_id, grace_ms=100)


def _start(request: str, sandbox_id: str) -> Command:
    return commands.StartSandbox(request, b"f", sandbox_id)


def _pause(request: str, sandbox_id: str) -> Command:
    return commands.PauseSandbox(request, b"f", sandbox_id)


def _resume(request: str, sandbox_id: str) -> Command:
    return commands.ResumeSandbox(request, b"f", sandbox_id)
