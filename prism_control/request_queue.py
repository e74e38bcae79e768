"""One bounded queue of requests: whether it batches, and when a refused one may come again."""

import asyncio
import random
from collections import deque
from dataclasses import dataclass
from typing import Final

from prism_common.errors import QueueFullError
from prism_control.state.commands import Command, CreateSandbox, DeleteSandbox
from prism_control.state.results import Result

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
class Item:
    """A command that waits, and who wait for its answer: more than one where it was sent again."""

    command: Command
    size: int
    futures: list[asyncio.Future[Result]]

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits."""
        return any(not future.done() for future in self.futures)

    def resolve(self, result: Result) -> None:
        """Answer all who wait."""
        for future in self.futures:
            if not future.done():
                future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Tell all who wait."""
        for future in self.futures:
            if not future.done():
                future.set_exception(error)


#: What has a queue of its own, and a request id.
_USERS: Final = (CreateSandbox, DeleteSandbox)


def _is_repeat(command: CreateSandbox | DeleteSandbox, waiting: Command) -> bool:
    """Whether a command asks for the same as one that waits under the same request id.

    Another content under a used request id is for the state machine to refuse.
    """
    return type(command) is type(waiting) and command.fingerprint == waiting.fingerprint


class RequestQueue:
    """One bounded queue, and whether it batches."""

    def __init__(self, op: str, capacity: int, settings: BatchingSettings) -> None:
        self.op = op
        self.capacity = capacity
        self.items: deque[Item] = deque()
        #: Those of them that have a request id, by it.
        self._by_request: dict[str, Item] = {}
        self._settings = settings
        self._last_arrival = float("-inf")
        self._interval_s = float("inf")
        #: Requests a second that left, smoothed; 0: not measured.
        self.drain_rate = 0.0
        self._drained_at = 0.0
        #: When the oldest that waits came.
        self.first_arrival = 0.0

    def put(self, command: Command, size: int, future: asyncio.Future[Result], now: float) -> None:
        """Add a request; one that waits already gets another to answer, and takes no more room.

        Raises:
            QueueFullError: With when to retry, from the measured drain rate, plus jitter.
        """
        request_id = ""
        if isinstance(command, _USERS):
            request_id = command.request_id
            waiting = self._by_request.get(request_id)
            if waiting is not None and _is_repeat(command, waiting.command):
                waiting.futures.append(future)
                return
        if len(self.items) >= self.capacity:
            raise QueueFullError(
                f"the {self.op} queue is full: {self.capacity} requests wait",
                retry_after_s=self._retry_after_s(),
            )
        self._interval_s = now - self._last_arrival
        self._last_arrival = now
        if not self.items:
            self.first_arrival = now
        item = Item(command, size, [future])
        self.items.append(item)
        if request_id:
            self._by_request.setdefault(request_id, item)

    def pop(self) -> Item:
        """Take out the oldest."""
        item = self.items.popleft()
        if isinstance(item.command, _USERS):
            self._by_request.pop(item.command.request_id, None)
        return item

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
