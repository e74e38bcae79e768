"""Runs pieces of work: those that take no time share a task, those that wait hold up no other."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Final

#: After so many pieces of work, of some 10 µs each, others on the loop have their turn.
_SLICE: Final = 512


class Works:
    """A queue of work, and as many tasks as there are pieces of it that wait.

    A task runs one piece after the other. Before each it sees to it that another task goes on with
    the queue should this piece wait: so a batch of what does not wait takes two tasks, and what
    waits has one of its own.

    Args:
        on_idle: Called when nothing is left that could be begun; it may add more.
    """

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._queue: deque[Coroutine[None, None, None]] = deque()
        self._group: asyncio.TaskGroup | None = None
        #: A task was made that has not begun yet.
        self._waking = False

    def open(self, group: asyncio.TaskGroup) -> None:
        """Begin to run."""
        self._group = group

    def close(self) -> None:
        """Drop what was not begun, and take no more: the process ends."""
        self._group = None
        while self._queue:
            self._queue.popleft().close()

    def add(self, work: Coroutine[None, None, None]) -> None:
        """Run it soon; an exception of it ends the group."""
        if self._group is None:
            work.close()
            return
        self._queue.append(work)
        self._wake()

    def _wake(self) -> None:
        if self._queue and not self._waking and self._group is not None:
            self._waking = True
            self._group.create_task(self._run())

    async def _run(self) -> None:
        self._waking = False
        done = 0
        while self._queue:
            work = self._queue.popleft()
            self._wake()
            await work
            done += 1
            if done % _SLICE == 0:
                await asyncio.sleep(0)
            if not self._queue:
                # What is added now is this task's: no other need wake for it.
                self._waking = True
                self._on_idle()
                self._waking = False
