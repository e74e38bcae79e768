"""A wake-up for all who wait."""

import asyncio


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
