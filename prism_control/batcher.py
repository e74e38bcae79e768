"""Requests to proposals: bounded queues, pass-through at low load, group commit under load.

The driver takes what waits once a turn, that is, when the previous entries have left for the disk:
a batch is whatever arrived meanwhile, and nobody sleeps through a fixed window.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prism_common.errors import DiskFullError, PrismError, QueueFullError, StoppingError
from prism_control.metrics import BatcherMetrics
from prism_control.state import commands
from prism_control.state.commands import Command, CreateSandbox, DeleteSandbox
from prism_control.state.results import Result

#: Together with the bytes bound: one entry is applied in one go, in about 15 ms.
_BATCH_ITEMS_MAX: Final = 1000
_BATCH_BYTES_MAX: Final = 1 * 2**20
#: In pass-through each request is an entry of its own; so many fit into one turn.
_ENTRIES_A_TURN_MAX: Final = 64
#: Stop, start, and what the leader itself proposes. Bounded by its callers; this is the backstop.
_OTHER_QUEUE_SIZE: Final = 20_000
#: Under load a request waits this long for others to share its entry: each entry costs the leader,
#: its followers and the disk as much as some tens of requests do. A lone request never waits.
_LINGER_CREATE_S: Final = 0.005
#: Placements and reports: each is the work of a whole pass, and one commit serves them all.
_LINGER_OTHER_S: Final = 0.01
#: How often it is looked whether they are due.
_TICK_S: Final = 0.0025
#: Load: more than so many users' requests a second, …
_BUSY_RATE: Final = 400.0
#: … averaged over this time.
_BUSY_WINDOW_S: Final = 0.1
#: Before anything was measured.
_RETRY_DEFAULT_S: Final = 0.25
_RETRY_MIN_S: Final = 0.05
_RETRY_MAX_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class BatchingSettings:
    """The flags of batching; the defaults took a burst of 10,000 sandboxes.

    Attributes:
        enabled: False: every request is an entry of its own.
        create_queue_size: Creates that may wait.
        delete_queue_size: Deletes that may wait.
        threshold: Batch when more than so many wait.
        interval_ms: Batch when requests come less than this apart.
    """

    enabled: bool = True
    create_queue_size: int = 12_000
    delete_queue_size: int = 22_000
    threshold: int = 50
    interval_ms: int = 250


@dataclass(slots=True)
class _Item:
    command: Command
    size: int
    future: asyncio.Future[Result]


class EntryBatch:
    """One entry to be proposed, and the callers that wait for its items."""

    def __init__(self, items: Sequence[_Item], at_ms: int, done: Callable[[int], None]) -> None:
        self._items = items
        self._done = done
        self.data = commands.encode(
            commands.propose(at_ms, tuple([item.command for item in items]))
        )

    def resolve(self, result: object) -> None:
        """Give each caller the result of its own item."""
        results: Sequence[Result] = result  # type: ignore[assignment]
        for item, answer in zip(self._items, results, strict=True):
            if not item.future.done():
                item.future.set_result(answer)
        self._done(len(self._items))

    def fail(self, error: Exception) -> None:
        """Tell every caller."""
        for item in self._items:
            if not item.future.done():
                item.future.set_exception(error)


def _outcome(future: asyncio.Future[Result] | PrismError) -> Result | PrismError:
    """Return what became of a command; what is no PrismError is a bug, and raised."""
    if isinstance(future, PrismError):
        return future
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, PrismError):
        raise error
    return error


class _Queue:
    """One bounded queue, and whether it batches."""

    def __init__(self, op: str, capacity: int, settings: BatchingSettings) -> None:
        self.op = op
        self.capacity = capacity
        self.items: deque[_Item] = deque()
        self._settings = settings
        self._last_arrival = float("-inf")
        self._interval_s = float("inf")
        #: Requests a second that left, smoothed; 0: not measured.
        self.drain_rate = 0.0
        self._drained_at = 0.0
        #: When the oldest that waits came.
        self.first_arrival = 0.0

    def put(self, item: _Item, now: float) -> None:
        """Add a request.

        Raises:
            QueueFullError: With when to retry, from the measured drain rate, plus jitter.
        """
        if len(self.items) >= self.capacity:
            raise QueueFullError(
                f"the {self.op} queue is full: {self.capacity} requests wait",
                retry_after_s=self._retry_after_s(),
            )
        self._interval_s = now - self._last_arrival
        self._last_arrival = now
        if not self.items:
            self.first_arrival = now
        self.items.append(item)

    def batching(self, now: float) -> bool:
        """Whether requests are batched at present; it switches back by itself."""
        if not self._settings.enabled:
            return False
        if len(self.items) > self._settings.threshold:
            return True
        interval_s = max(self._interval_s, now - self._last_arrival)
        return interval_s * 1000 < self._settings.interval_ms

    def drained(self, count: int, now: float) -> None:
        """Take note that so many requests have been answered."""
        elapsed_s = now - self._drained_at
        self._drained_at = now
        if 0 < elapsed_s < 1:
            self.drain_rate += 0.2 * (count / elapsed_s - self.drain_rate)

    def _retry_after_s(self) -> float:
        # A tenth of the queue must have left before one more request is worth the trip.
        wait_s = self.capacity / 10 / self.drain_rate if self.drain_rate else _RETRY_DEFAULT_S
        wait_s = min(max(wait_s, _RETRY_MIN_S), _RETRY_MAX_S)
        return wait_s * random.uniform(1.0, 1.5)  # noqa: S311


class _Load:
    """How many requests users make a second, as an average that fades."""

    def __init__(self) -> None:
        self._level = 0.0
        self._at = float("-inf")

    def add(self, count: int, now: float) -> None:
        """Take note of requests."""
        self._level = self._faded(now) + count
        self._at = now

    def busy(self, now: float) -> bool:
        """Whether waiting for company is likely to be worth it."""
        return self._faded(now) > _BUSY_RATE * _BUSY_WINDOW_S

    def _faded(self, now: float) -> float:
        return self._level * math.exp((self._at - now) / _BUSY_WINDOW_S)


class Batcher:
    """Between the API and the driver, on the leader.

    Args:
        settings: The flags.
        metrics: What is counted.
        wake: Tells the driver that something waits.
        has_room: Whether the disk takes more.
    """

    def __init__(
        self,
        settings: BatchingSettings,
        metrics: BatcherMetrics,
        wake: Callable[[], None],
        has_room: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._wake = wake
        self._has_room = has_room
        self._creates = _Queue("create", settings.create_queue_size, settings)
        self._deletes = _Queue("delete", settings.delete_queue_size, settings)
        self._others = _Queue("other", _OTHER_QUEUE_SIZE, settings)
        self._queues = (self._others, self._creates, self._deletes)
        self._closed: PrismError | None = None
        self._last_ms = 0
        self._load = _Load()
        self._timer: asyncio.TimerHandle | None = None
        for queue in self._queues:
            metrics.rejected.labels(queue.op)
            metrics.batch_size.labels(queue.op)

    async def submit(self, command: Command, size: int = 256) -> Result:
        """Propose a command; return its own result once it is committed and applied.

        Args:
            command: What to propose.
            size: About how many bytes it takes.

        Raises:
            QueueFullError, DiskFullError, StoppingError, NoLeaderError: Nothing was proposed.
            OutcomeUnknownError: It may yet commit.
        """
        self._check_open()
        return await self._put(command, size)

    async def submit_all(self, group: Sequence[tuple[Command, int]]) -> list[Result | PrismError]:
        """Propose a group of commands with their sizes; return each one's own result or failure.

        They wait together: where the queue has no room for all, the last of them are refused.
        """
        self._check_open()
        futures: list[asyncio.Future[Result] | PrismError] = []
        for command, size in group:
            try:
                futures.append(self._put(command, size))
            except QueueFullError as error:
                futures.append(error)
        waiting = [future for future in futures if isinstance(future, asyncio.Future)]
        try:
            if waiting:
                await asyncio.wait(waiting)
        except asyncio.CancelledError:
            for future in waiting:
                future.cancel()
            raise
        return [_outcome(future) for future in futures]

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed
        if not self._has_room():
            raise DiskFullError(
                "the leader's disk is full: writes are refused until there is room; reads and "
                "running sandboxes go on",
                retry_after_s=5.0,
            )

    def _put(self, command: Command, size: int) -> asyncio.Future[Result]:
        queue = self._queue_of(command)
        now = time.monotonic()
        item = _Item(command, size, asyncio.get_running_loop().create_future())
        if queue is not self._others:
            self._load.add(1, now)
        try:
            queue.put(item, now)
        except QueueFullError:
            self._metrics.rejected.labels(queue.op).inc()
            raise
        self._wake_for(queue, now)
        return item.future

    def take(self) -> Sequence[EntryBatch]:
        """Return the entries of this turn. A delete never overtakes a create that came before."""
        now = time.monotonic()
        batches: list[EntryBatch] = []
        for queue in self._queues:
            if not self._goes(queue, now):
                continue
            batching = queue.batching(now)
            while queue.items and len(batches) < _ENTRIES_A_TURN_MAX:
                items = self._take_items(queue, _BATCH_ITEMS_MAX if batching else 1)
                if not items:
                    continue
                self._metrics.batch_size.labels(queue.op).observe(len(items))
                batches.append(EntryBatch(items, self._now_ms(), self._drain_counter(queue)))
        for queue in self._queues:
            if queue.items:
                self._wake_for(queue, now)
        return batches

    def _goes(self, queue: _Queue, now: float) -> bool:
        """Whether a queue's requests leave in this turn."""
        return not queue.batching(now) or self._due(queue, now)

    def _due(self, queue: _Queue, now: float) -> bool:
        """Whether a queue's requests have waited for company as long as they should.

        Creates go no later than the deletes that came after them.
        """
        deletes = self._deletes
        if queue is self._creates and deletes.items and self._goes(deletes, now):
            return True
        linger_s = _LINGER_OTHER_S if queue is self._others else _LINGER_CREATE_S
        return (
            now >= queue.first_arrival + linger_s
            or len(queue.items) >= _BATCH_ITEMS_MAX
            or not self._load.busy(now)
        )

    def _wake_for(self, queue: _Queue, now: float) -> None:
        """Have the driver take a queue's requests now, or once they are due."""
        if self._goes(queue, now):
            self._wake()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = time.monotonic()
        waiting = [queue for queue in self._queues if queue.items]
        if any(self._due(queue, now) for queue in waiting):
            self._wake()
        elif waiting:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._ring)

    def fail_all(self, error: PrismError) -> None:
        """Fail what waits: it was not proposed, and is safe to retry."""
        for queue in self._queues:
            while queue.items:
                item = queue.items.popleft()
                if not item.future.done():
                    item.future.set_exception(error)

    def close(self) -> None:
        """Refuse from now on, and fail what waits."""
        self._closed = StoppingError(
            "this member is stopping; nothing was proposed", retry_after_s=0.5
        )
        self.fail_all(self._closed)

    def queues(self) -> dict[str, tuple[int, int, bool]]:
        """Return for each op its queue's length, capacity, and whether it batches."""
        now = time.monotonic()
        return {q.op: (len(q.items), q.capacity, q.batching(now)) for q in self._queues}

    def _queue_of(self, command: Command) -> _Queue:
        match command:
            case CreateSandbox():
                return self._creates
            case DeleteSandbox():
                return self._deletes
            case _:
                return self._others

    def _take_items(self, queue: _Queue, count_max: int) -> list[_Item]:
        items: list[_Item] = []
        size = 0
        while queue.items and len(items) < count_max and size < _BATCH_BYTES_MAX:
            item = queue.items.popleft()
            # A caller that has gone gets no sandbox that nobody would know of.
            if not item.future.done():
                items.append(item)
                size += item.size
        return items

    def _drain_counter(self, queue: _Queue) -> Callable[[int], None]:
        return lambda count: queue.drained(count, time.monotonic())

    def _now_ms(self) -> int:
        """The wall clock in milliseconds; it never goes back within one leadership."""
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms
