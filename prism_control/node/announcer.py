"""Tells followers of a commit that no entry has carried to them."""

import asyncio
from collections.abc import Callable
from typing import Final

from prism_control.raft.core import Core

#: After so long. Under load the next entries follow sooner, and carry it.
_ANNOUNCE_COMMIT_S: Final = 0.005


class CommitAnnouncer:
    """Looks, some milliseconds after a commit, whether the followers know of it.

    To tell them of each at once would double the messages.

    Args:
        core: The driver's.
        wake: Called when the driver should take a turn.
    """

    def __init__(self, core: Core, wake: Callable[[], None]) -> None:
        self._core = core
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_looking(self) -> bool:
        """Whether it has a commit to look after."""
        return self._timer is not None

    def applied(self) -> None:
        """Take note that something was committed and applied."""
        if self._core.replication is not None and not self.is_looking:
            self._timer = asyncio.get_running_loop().call_later(
                _ANNOUNCE_COMMIT_S, self._look, self._core.commit
            )

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, commit: int) -> None:
        self._timer = None
        if self._is_untold(commit):
            self._core.announce_commit()
            self._wake()
        elif self._is_untold(self._core.commit):
            # Entries have carried that one, and may yet carry what was committed since.
            self.applied()

    def _is_untold(self, commit: int) -> bool:
        """Whether some follower has the entries up to a commit, or a part, and does not know."""
        replication = self._core.replication
        if replication is None:
            return False
        return any(
            min(progress.match, commit) > progress.commit_sent
            for member, progress in replication.progress.items()
            if member != self._core.config.id
        )
