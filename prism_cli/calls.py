"""gRPC calls in threads of their own, so that the main thread only ever waits.

A signal raises in the main thread. Inside gRPC's code it can come where the interpreter may not
raise, and is lost: a Ctrl-C that does nothing.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

Result = TypeVar("Result")
Response = TypeVar("Response")
ResponseOnly = TypeVar("ResponseOnly", covariant=True)

#: A signal that comes just before a wait begins is seen when it ends; so no wait is longer.
_WAIT_S: Final = 0.2
#: Responses read before they are used, of at most 1 MiB each.
_AHEAD_MAX: Final = 4


class Call(Protocol[ResponseOnly]):
    """gRPC's call under way."""

    def __iter__(self) -> Iterator[ResponseOnly]:
        """Yield responses; raise grpc.RpcError where the call fails."""

    def cancel(self) -> bool:
        """End the call."""


def aside(work: Callable[[], Result]) -> Result:
    """Return what `work` returns in a thread; an interrupted caller leaves it behind.

    Raises:
        RpcError: As `work` raised it.
    """
    outcome: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:  # noqa: BLE001  (the caller raises it)
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True, name="call").start()
    result, error = take(outcome)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only where `work` returned it


def take(items: queue.SimpleQueue[Result]) -> Result:
    """Return the next item; a signal's exception gets through at once, or nearly so."""
    while True:
        try:
            return items.get(timeout=_WAIT_S)
        except queue.Empty:
            continue


class Stream(Generic[Response]):
    """The responses of a call that a thread opens and reads, a few ahead of their use."""

    def __init__(self, open_call: Callable[[], Call[Response]]) -> None:
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD_MAX)
        self._lock = threading.Lock()
        self._call: Call[Response] | None = None
        self._cancelled = False
        threading.Thread(target=self._read, args=[open_call], daemon=True, name="stream").start()

    def __iter__(self) -> Iterator[Response]:
        """Yield responses; raise grpc.RpcError where the call fails."""
        while True:
            kind, value = take(self._items)
            if kind == "failed":
                raise value
            if kind == "ended":
                return
            self._room.release()
            yield value

    def cancel(self) -> None:
        """End the call; an iteration under way then fails with CANCELLED."""
        with self._lock:
            self._cancelled = True
            call = self._call
        if call is not None:
            call.cancel()
        self._room.release()

    def _read(self, open_call: Callable[[], Call[Response]]) -> None:
        try:
            call = open_call()
            with self._lock:
                self._call = call
                cancelled = self._cancelled
            if cancelled:
                call.cancel()
            for response in call:
                self._room.acquire()
                self._items.put(("response", response))
        except (grpc.RpcError, ValueError) as error:  # ValueError: on a channel that is closed
            self._items.put(("failed", error))
        else:
            self._items.put(("ended", None))
