"""Agents whose process ends for long or for good, while what they have started goes on."""

from __future__ import annotations

import asyncio
import math
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.plane.agent import SimAgent
    from tests.sim.plane.plane import Plane

#: In so many of all runs agents are away.
_SHARE = 0.3
#: Until its node is lost, and what ran there is placed again, even if nobody leads at first.
_AWAY_S = (4.0, 20.0)
#: So many agents live at least: what may be placed again has somewhere to go.
_AGENTS_MIN = 2


class Absences:
    """Of one run.

    Args:
        plane: The run.
        random: Its own, so that other runs stay as they are.
    """

    def __init__(self, plane: Plane, random: Random) -> None:
        self._plane = plane
        self._random = random
        self.happen = random.random() < _SHARE
        self.count = 0

    async def run(self) -> None:
        """Let agents go until the plane is healed."""
        while self.happen:
            await asyncio.sleep(self._random.uniform(1.0, 8.0))
            present = [agent for agent in self._plane.agents if agent.runs]
            if len(present) <= _AGENTS_MIN:
                continue
            agent = self._random.choice(present)
            if self._random.random() < 0.4:
                await self._live_shortly(agent)
            away_s = math.inf if self._random.random() < 0.5 else self._random.uniform(*_AWAY_S)
            self._plane.trace("away", agent.name, away_s)
            agent.away_until_s = self._plane.loop.time() + away_s
            agent.crash(machine_too=False)
            if not agent.is_gone:
                self._plane.loop.call_at(agent.away_until_s, agent.come_back)
            self.count += 1

    async def _live_shortly(self, agent: SimAgent) -> None:
        """Let an agent die a first time, and begin again what it was starting, unheard or not."""
        agent.crash(machine_too=False)
        if self._random.random() < 0.5:
            self._plane.links.isolate(agent.name, [each.name for each in self._plane.members])
            self._plane.check_calls()
        await asyncio.sleep(self._random.uniform(0.01, 0.2))
        agent.come_back()
        await asyncio.sleep(self._random.uniform(0.01, 0.3))
