"""What befalls members, agents and the links between them."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.plane.agent import SimAgent
    from tests.sim.plane.member import SimMember
    from tests.sim.plane.plane import Plane

NAMES = (
    "crash_member",
    "crash_leader",
    "crash_agent",
    "crash_machine",
    "cut_member",
    "cut_leader",
    "cut_agent",
    "one_way",
    "bad_network",
    "full_disk",
    "wrong_clock",
    "heal_network",
    "stale_word",
    "upgrade",
)


class Faults:
    """Strikes now and then, until the plane is healed."""

    def __init__(self, plane: Plane, random: Random) -> None:
        self._plane = plane
        self._random = random
        self._kinds = random.sample(NAMES, random.randrange(1, len(NAMES) + 1))
        self._pace_s = random.choice((0.3, 1.0, 3.0))
        self.count = 0

    async def run(self) -> None:
        """Strike."""
        while True:
            await asyncio.sleep(self._random.uniform(0.1, 2 * self._pace_s))
            kind = self._random.choice(self._kinds)
            self._plane.trace("fault", kind)
            self.count += 1
            getattr(self, f"_{kind}")()

    def _names(self) -> list[str]:
        return [each.name for each in (*self._plane.members, *self._plane.agents)]

    def _member(self) -> SimMember:
        return self._random.choice(self._plane.members)

    def _agent(self) -> SimAgent:
        return self._random.choice(self._plane.agents)

    def _leader(self) -> SimMember:
        leaders = [member for member in self._plane.members if member.leads]
        return self._random.choice(leaders or self._plane.members)

    def _crash_member(self) -> None:
        self._crash(self._member())

    def _crash_leader(self) -> None:
        self._crash(self._leader())

    def _crash(self, member: SimMember) -> None:
        if not member.runs:
            return
        member.crash()
        for other in self._plane.members:
            if other is not member and self._random.random() < 0.7:
                self._plane.loop.call_later(0.001, other.notice_end_of, member)
        self._later(self._random.uniform(0.01, 3.0), member)

    def _later(self, delay_s: float, victim: SimMember | SimAgent) -> None:
        self._plane.loop.call_later(delay_s, victim.come_back)

    def _crash_agent(self) -> None:
        self._end(self._agent(), machine_too=False)

    def _crash_machine(self) -> None:
        self._end(self._agent(), machine_too=True)

    def _end(self, agent: SimAgent, *, machine_too: bool) -> None:
        if agent.runs:
            agent.crash(machine_too)
            # Now and then it stays away for longer than the node's lease.
            longest_s = 30.0 if self._random.random() < 0.2 else 12.0 if machine_too else 0.5
            self._later(self._random.uniform(0.01, longest_s), agent)

    def _cut_member(self) -> None:
        self._cut(self._member().name)

    def _cut_leader(self) -> None:
        self._cut(self._leader().name)

    def _cut_agent(self) -> None:
        self._cut(self._agent().name)

    def _cut(self, name: str) -> None:
        self._plane.links.isolate(name, [other for other in self._names() if other != name])
        self._plane.check_calls()

    def _one_way(self) -> None:
        sender, receiver = self._random.sample(self._names(), 2)
        self._plane.links.block(sender, receiver)
        self._plane.check_calls()

    def _bad_network(self) -> None:
        self._plane.links.drop = self._random.choice((0.0, 0.01, 0.1))
        self._plane.links.delay_max_s = self._random.choice((0.002, 0.05, 0.3))

    def _full_disk(self) -> None:
        member = self._member()
        member.has_room = not member.has_room

    def _wrong_clock(self) -> None:
        # From the member's next life on, which begins at once.
        member = self._member()
        member.wall_offset_s = self._random.choice((-900.0, -2.0, 0.0, 2.0, 900.0))
        if member.runs:
            self._crash(member)

    def _stale_word(self) -> None:
        for agent in self._plane.agents:
            agent.hear_again(self._random)

    def _upgrade(self) -> None:
        member = self._member()
        if not member.is_new:
            self._crash(member)
            member.upgrade()

    def _heal_network(self) -> None:
        self._plane.links.heal()
