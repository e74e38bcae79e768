"""Members that form their first cluster with `raft.formation`, in every order and with faults.

The edge (`node/formation.py`) is imitated step by step: any step of any member may come next,
any message may be lost, and any member may crash between two steps, keeping what it had written.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from random import Random

from prism_control.raft import formation
from prism_control.raft.formation import PeerView
from prism_control.raft.types import Configuration, MemberId
from tests.sim.invariants import ViolationError
from tests.sim.options import member

Promise = tuple[str, Configuration]


@dataclass
class Starter:
    """One member that has no cluster yet; `accepted` and `started` are on its disk."""

    id: MemberId
    expected: int
    join: tuple[MemberId, ...]
    accepted: Promise | None = None
    started: Promise | None = None
    #: Volatile: the proposal under way, and who has still to accept it.
    proposal: Promise | None = None
    waiting: list[MemberId] = field(default_factory=list)
    proposals: int = 0

    def view(self) -> PeerView:
        """Return what it answers to Discover."""
        cluster_id, configuration = self.started or ("", Configuration())
        return PeerView(member(self.id), cluster_id, self.expected, configuration)

    @property
    def promised(self) -> Configuration:
        """What it has accepted; without voters if nothing."""
        return self.accepted[1] if self.accepted else Configuration()

    def accept(self, promise: Promise, proposer: MemberId) -> bool:
        """Answer Form."""
        if self.started is not None:
            return False
        if formation.may_accept(self.id, self.expected, promise[1], proposer, self.promised):
            return False
        self.accepted = promise
        return True

    def crash(self) -> None:
        """Forget what is not on disk."""
        self.proposal, self.waiting = None, []


class Formation:
    """Members that start together, from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random = Random(f"formation {seed}")
        self._expected = random.choice((1, 2, 3, 3, 5))
        # Sometimes more members than expected find each other, and their lists differ.
        extra = random.choice((0, 0, 0, 1, 2)) if self._expected > 1 else 0
        ids = tuple(range(1, self._expected + extra + 1))
        self._is_exact = extra == 0
        self._members = {id_: Starter(id_, self._expected, self._join_list(ids)) for id_ in ids}
        self._loss = random.choice((0.0, 0.1, 0.5))
        self._crashes = random.choice((0.0, 0.05, 0.3))
        self._cut: set[MemberId] = set()

    def _join_list(self, ids: tuple[MemberId, ...]) -> tuple[MemberId, ...]:
        if self._is_exact or self._random.random() < 0.5:
            return ids
        return tuple(sorted(self._random.sample(ids, self._expected)))

    def run(self) -> None:
        """Run with faults, and then without.

        Raises:
            ViolationError: Two clusters were formed, or none.
        """
        random = self._random
        for _ in range(random.randrange(10, 200)):
            starter = random.choice(list(self._members.values()))
            if random.random() < self._crashes:
                starter.crash()
            if random.random() < 0.05:
                self._cut = {id_ for id_ in self._members if random.random() < 0.4}
            self._step(starter)
            self._check()
        self._cut, self._loss = set(), 0.0
        for _ in range(20 * len(self._members)):
            for starter in self._members.values():
                self._step(starter)
                self._check()
        if self._is_exact and any(s.started is None for s in self._members.values()):
            raise ViolationError("liveness: no cluster is formed")

    def _reaches(self, sender: MemberId, receiver: MemberId) -> bool:
        is_cut = (sender in self._cut) != (receiver in self._cut)
        return not is_cut and self._random.random() >= self._loss

    def _step(self, starter: Starter) -> None:
        if starter.started is not None:
            return
        if starter.proposal is not None:
            self._go_on(starter)
            return
        peers = [
            self._members[id_].view()
            for id_ in starter.join
            if self._reaches(starter.id, id_) and self._reaches(id_, starter.id)
        ]
        decision = formation.decide(member(starter.id), starter.expected, peers, starter.promised)
        if isinstance(decision, formation.Start):
            starter.started = (decision.cluster_id, decision.configuration)
        elif isinstance(decision, formation.Propose):
            self._propose(starter, decision.configuration)

    def _propose(self, starter: Starter, configuration: Configuration) -> None:
        starter.proposals += 1
        cluster_id = f"{starter.id}.{starter.proposals}"
        if starter.accepted is not None and starter.accepted[1] == configuration:
            cluster_id = starter.accepted[0]
        starter.accepted = starter.proposal = (cluster_id, configuration)
        starter.waiting = [id_ for id_ in configuration.voters if id_ != starter.id]

    def _go_on(self, starter: Starter) -> None:
        """Ask one more member to accept, or start."""
        proposal = starter.proposal
        if proposal is None:
            return
        if starter.waiting:
            id_ = starter.waiting.pop(0)
            is_heard = self._reaches(starter.id, id_)
            accepted = is_heard and self._members[id_].accept(proposal, starter.id)
            if not (accepted and self._reaches(id_, starter.id)):
                starter.crash()  # gives this attempt up
            return
        starter.crash()
        if starter.accepted is not None and starter.accepted[0] == proposal[0]:
            starter.started = proposal

    def _check(self) -> None:
        # Two sets of members that never meet may well form two clusters; if they share a member,
        # then at most one of them may work.
        working: dict[str, set[MemberId]] = {}
        for starter in self._members.values():
            if starter.started is None:
                continue
            cluster_id, configuration = starter.started
            started = [
                id_
                for id_ in configuration.voters
                if (other := self._members[id_].started) and other[0] == cluster_id
            ]
            if 2 * len(started) > len(configuration.voters):
                working[cluster_id] = set(configuration.voters)
        for one, two in itertools.combinations(working, 2):
            if working[one] & working[two]:
                raise ViolationError(f"two clusters have a majority each: {one} and {two}")
