"""When to campaign, and how a campaign stands (§5.2, thesis 9.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism_control.raft import quorum

if TYPE_CHECKING:
    from prism_control.raft.config import RandomSource
    from prism_control.raft.types import Configuration, MemberId


class Election:
    """The election timer and the votes of the current campaign."""

    __slots__ = ("_random", "_ticks", "_timeout", "_votes", "elapsed")

    def __init__(self, random: RandomSource, election_ticks: int) -> None:
        self._random = random
        self._ticks = election_ticks
        #: Ticks since a leader was heard, a vote was given or a campaign began; a leader's
        #: since it last looked for its quorum.
        self.elapsed = 0
        #: Drawn anew at each reset from [e, 2e), so that members seldom campaign together.
        self._timeout = 0
        #: Answers to the current campaign by voter; empty outside one. The first answer counts.
        self._votes: dict[MemberId, bool] = {}
        self.reset()

    def reset(self) -> None:
        """Begin to wait anew, outside any campaign."""
        self.elapsed = 0
        self._timeout = self._random.randrange(self._ticks, 2 * self._ticks)
        self._votes = {}

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
