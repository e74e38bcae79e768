"""An event loop without a clock, a selector or threads: the same program runs the same way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from random import Random
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

#: Seconds by which the wall clock of whoever runs at present is wrong.
wall_offset_s: ContextVar[float] = ContextVar("wall_offset_s", default=0.0)
#: 2026-01-01, so that times look like times.
EPOCH_S = 1_767_225_600.0


class StuckError(Exception):
    """Nothing is left that could ever happen, and the program is not at its end."""


class _Future(asyncio.Future[Any]):
    """A future whose place in a set is the same in each run."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in each run."""

    def __init__(
        self, number: int, coro: Any, loop: asyncio.AbstractEventLoop, **more: Any
    ) -> None:
        self._number = number
        super().__init__(coro, loop=loop, **more)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Selector:
    """Waits by moving the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StuckError("nothing is left that could happen")
        self._loop.now_s += max(timeout, 0.0)
        return []

    def close(self) -> None:
        """Nothing to let go of."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when nobody has anything to do.

    Args:
        random: Decides how long work in threads takes.
    """

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._random = random
        self._numbers = itertools.count(1)
        self._selector = _Selector(self)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Return the made-up monotonic time."""
        return self.now_s

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future with a number."""
        return _Future(next(self._numbers), self)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Do work of a thread after a while, here: nobody sees it half done."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:  # noqa: BLE001 - it belongs to whoever waits
                future.set_exception(error)

        self.call_later(self._random.uniform(0.0001, 0.003), work)
        return future

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        """There are no threads."""
        return self.call_soon(callback, *args, context=context)

    def __del__(self) -> None:
        """It holds nothing that must be let go of, so one that never ran needs no closing."""

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **more: Any
    ) -> asyncio.Task[Any]:
        return _Task(next(self._numbers), coro, loop, **more)

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none but timers."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""


class VirtualTime:
    """Stands in for the module `time`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        """Seconds."""
        return self._loop.now_s

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        """Nanoseconds."""
        return int(self._loop.now_s * 1e9)

    def time(self) -> float:
        """Seconds since 1970, as whoever asks believes."""
        return EPOCH_S + self._loop.now_s + wall_offset_s.get()

    def time_ns(self) -> int:
        """Nanoseconds since 1970, as whoever asks believes."""
        return int(self.time() * 1e9)

    def sleep(self, seconds: float) -> None:
        """Only threads sleep, and `run_in_executor` says how long their work takes."""


class VirtualSecrets:
    """Stands in for the module `secrets`."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def token_hex(self, count: int) -> str:
        """So many random bytes, in hexadecimal digits."""
        return self._random.randbytes(count).hex()

    def randbits(self, count: int) -> int:
        """So many random bits."""
        return self._random.getrandbits(count)


class VirtualRandom:
    """Stands in for the module `random`."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.uniform = random.uniform

    def Random(self) -> Random:
        """A generator of its own, seeded."""
        return Random(self._random.getrandbits(64))


@contextmanager
def virtual(
    modules: dict[str, tuple[str, ...]], loop: VirtualLoop, random: Random
) -> Iterator[None]:
    """Let modules see the made-up time and chance: module's name → what of it is replaced."""
    replacements = {
        "time": VirtualTime(loop),
        "secrets": VirtualSecrets(random),
        "random": VirtualRandom(random),
    }
    patches = [
        mock.patch(f"{module}.{name}", replacements[name])
        for module, names in modules.items()
        for name in names
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
