"""Standard input of one exec: written as fast as it is read, and closed once."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable


class ExecInput:
    """Our end of an exec's standard input, if we hold one."""

    def __init__(self) -> None:
        self._descriptor = -1
        #: Held by the request that is being written: one follows the other.
        self._lock = asyncio.Lock()

    def hold(self, descriptor: int) -> None:
        """Write to this descriptor from now on, and close it in the end."""
        self._descriptor = descriptor

    def close(self) -> None:
        """Close our end."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def close_in_turn(self, then: Callable[[], None]) -> None:
        """Close our end after what is being written, and do the rest."""
        async with self._lock:
            self.close()
            then()

    async def write(self, data: bytes, reopen: Callable[[], Awaitable[int]]) -> None:
        """Write as fast as the exec reads. What it never reads is lost.

        Args:
            data: What to write.
            reopen: Returns a descriptor where we hold none; -1: its input is closed.
        """
        async with self._lock:
            if self._descriptor < 0:
                self._descriptor = await reopen()
            view = memoryview(data)
            while view and self._descriptor >= 0:
                try:
                    view = view[os.write(self._descriptor, view) :]
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    if error.errno not in (errno.EPIPE, errno.EIO):
                        raise
                    # It has closed its input, or hung up.
                    return

    async def _writable(self) -> None:
        """Return once it takes more, or is closed."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        # A descriptor of its own, since ours may be closed while we wait.
        descriptor = os.dup(self._descriptor)
        loop.add_writer(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(descriptor)
            os.close(descriptor)
