"""A wake-up for all who wait."""

import asyncio
from collections.abc import Iterable


class Signal:
    """Wakes every waiter at each notify; whoever waits later waits for the next one.

    The pattern: look at the state, and wait only if there is nothing to do, with no await between
    the two. All on one event loop.
    """

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wake all who wait now."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return at the next notify."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


class KeyedSignal:
    """Wakes those who wait for one key, so that a change costs nothing to who waits for others.

    The pattern is that of `Signal`. Keys that nobody waits for take no room.
    """

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, key: str) -> None:
        """Wake all who wait for a key now."""
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    def notify_each(self, keys: Iterable[str]) -> None:
        """Wake all who wait for one of these; where nobody waits, they are not looked at."""
        if self._waiters:
            for key in keys:
                self.notify(key)

    def notify_all(self) -> None:
        """Wake all who wait for any key."""
        for key in list(self._waiters):
            self.notify(key)

    async def wait(self, key: str) -> None:
        """Return at the next notify of a key."""
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(key, set())
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(key) is waiters:
                del self._waiters[key]
