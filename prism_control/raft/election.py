"""When to campaign, and how a campaign stands (§5.2, thesis 9.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft import quorum

if TYPE_CHECKING:
    from prism_control.raft.config import RandomSource
    from prism_control.raft.types import Configuration, MemberId


class Election:
    """The election timer and the votes of the current campaign."""

    __slots__ = ("_random", "_ticks", "_timeout", "_votes", "elapsed", "is_hurried")

    def __init__(self, random: RandomSource, election_ticks: int) -> None:
        self._random = random
        self._ticks = election_ticks
        #: Ticks since a leader was heard, a vote was given or a campaign began; a leader's
        #: since it last looked for its quorum.
        self.elapsed = 0
        #: Drawn anew at each reset from [e, 2e), so that members seldom campaign together.
        self._timeout = 0
        #: Whether the leader's connection has ended since it was last heard: it may be dead.
        self.is_hurried = False
        #: Answers to the current campaign by voter; empty outside one. The first answer counts.
        self._votes: dict[MemberId, bool] = {}
        self.reset()

    def reset(self) -> None:
        """Begin to wait anew, outside any campaign."""
        self.elapsed = 0
        self.is_hurried = False
        self._timeout = self._random.randrange(self._ticks, 2 * self._ticks)
        self._votes = {}

    def heard(self) -> None:
        """Take note of a sign of life of the leader."""
        if self.is_hurried:
            self.reset()
        self.elapsed = 0

    def hurry(self, rank: int) -> None:
        """Wait for little more: the leader's connection has ended, as it does when it dies.

        Args:
            rank: Place among those who may campaign; each waits a little longer than the one
                before, so that their votes are not split.
        """
        ticks = 1 + 2 * rank + self._random.randrange(0, 2)
        self._timeout = min(self._timeout, self.elapsed + ticks)
        self.is_hurried = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to campaign."""
        return self.elapsed >= self._timeout

    @property
    def is_past_minimum(self) -> bool:
        """Whether the least election timeout is over, and with it a lease (thesis 4.2.3)."""
        return self.elapsed >= self._ticks

    def record(
        self, member: MemberId, granted: bool, configuration: Configuration
    ) -> quorum.VoteResult:
        """Count an answer, unless this member has answered before, and tell how it stands."""
        self._votes.setdefault(member, granted)
        return quorum.vote_result(configuration, self._votes)
