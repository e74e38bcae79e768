"""Followers are told of a commit that no entry has carried to them, and of no other."""

import asyncio
import random
from collections.abc import Iterable

import pytest

from prism_control.node.announcer import CommitAnnouncer
from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.types import (
    AppendReply,
    AppendRequest,
    Configuration,
    Heartbeat,
    Member,
    Message,
    SnapshotMeta,
    VoteReply,
    VoteRequest,
)


class Leader:
    """A core that leads three, and what it sends."""

    def __init__(self) -> None:
        members = tuple(Member(n, f"n{n}", f"h:{n}", f"a:{n}") for n in (1, 2, 3))
        hard_state, first = bootstrap(Configuration((1, 2, 3), members=members))
        self.core = Core(
            CoreConfig(1, 4, 1), random.Random(1), hard_state, SnapshotMeta(), (first,)
        )
        self.sent: list[Message] = []
        while self.core.replication is None:
            self.core.tick()
            for request in [m for m in self.turn() if isinstance(m, VoteRequest)]:
                term = request.term
                self.core.step(VoteReply(2, 1, term, pre_vote=request.pre_vote, granted=True))
        self.turn()
        self.answer(self.core.log.last_index)
        self.turn()
        self.woken = 0
        self.announcer = CommitAnnouncer(self.core, self.wake)

    def wake(self) -> None:
        self.woken += 1

    def turn(self) -> Iterable[Message]:
        """Do all that the core wants done; return what it sends."""
        sent: list[Message] = []
        while (ready := self.core.take_ready()) is not None:
            self.core.persisted(ready)
            if ready.committed:
                self.core.applied(ready.committed[-1].index)
            sent += [*ready.messages_now, *ready.messages_after_persist]
        return sent

    def answer(self, index: int) -> None:
        """Both followers have the log up to an index."""
        for follower in (2, 3):
            self.core.step(AppendReply(follower, 1, self.core.term, False, index, 0, 0))

    def commit(self) -> None:
        """Commit one more entry, and apply it."""
        self.core.propose([b"x"])
        self.turn()
        self.answer(self.core.log.last_index)
        self.turn()
        assert self.core.applied_index == self.core.log.last_index
        self.announcer.applied()


async def looked(leader: Leader) -> None:
    """Wait until the announcer has looked, and would have looked again."""
    async with asyncio.timeout(5):
        while leader.announcer.is_looking:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
def leader() -> Leader:
    return Leader()


async def test_the_last_commit_is_announced_to_each_follower(leader: Leader) -> None:
    leader.commit()
    await looked(leader)
    assert leader.woken == 1
    heartbeats = [m for m in leader.turn() if isinstance(m, Heartbeat)]
    assert {m.receiver: m.commit for m in heartbeats} == dict.fromkeys((2, 3), leader.core.commit)


async def test_a_commit_that_entries_have_carried_is_not_announced(leader: Leader) -> None:
    leader.commit()
    leader.core.propose([b"y"])
    sent = list(leader.turn())
    carried = {m.receiver: m.commit for m in sent if isinstance(m, AppendRequest)}
    assert carried == dict.fromkeys((2, 3), leader.core.commit)
    await looked(leader)
    assert leader.woken == 0


async def test_a_commit_since_then_is_announced_in_its_turn(leader: Leader) -> None:
    leader.commit()
    # Its entries carry the commit before; nothing carries its own.
    leader.commit()
    await looked(leader)
    assert leader.woken == 1
    heartbeats = [m for m in leader.turn() if isinstance(m, Heartbeat)]
    assert {m.commit for m in heartbeats} == {leader.core.commit}
