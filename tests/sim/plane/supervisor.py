"""A sandbox's supervisor: what goes on when no agent lives, and for how long."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class SimSupervisor:
    """Stands in for a sandbox's processes, and for the `Execs` that speak to their supervisor.

    Args:
        loop: The machine's time.
        lease_over: Called when its lease is over: it ends all.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, lease_over: Callable[[], None]) -> None:
        self._loop = loop
        self._lease_over = lease_over
        #: Loop time; infinite: it has no lease.
        self._ends_s = math.inf
        self._timer: asyncio.TimerHandle | None = None
        #: What is frozen runs nowhere, and looks at no clock.
        self.is_frozen = False

    def set_lease(self, left_s: float) -> None:
        """Have it end all after so many seconds, unless told anew; 0: never."""
        self._ends_s = self._loop.time() + left_s if left_s > 0 else math.inf
        if left_s > 0 and self._timer is None:
            self._timer = self._loop.call_at(self._ends_s, self._look)

    def freeze(self) -> None:
        """Run nothing."""
        self.is_frozen = True

    def thaw(self) -> None:
        """Go on. What was said meanwhile is read before the clock is."""
        self.is_frozen = False
        self._loop.call_soon(self._look)

    def end(self) -> None:
        """Look at no clock any more."""
        self._ends_s = math.inf

    def _look(self) -> None:
        if self._timer is not None and self._timer.when() <= self._loop.time():
            self._timer = None
        if self.is_frozen:
            return
        if self._loop.time() >= self._ends_s:
            self._lease_over()
        elif self._timer is None and not math.isinf(self._ends_s):
            self._timer = self._loop.call_at(self._ends_s, self._look)
