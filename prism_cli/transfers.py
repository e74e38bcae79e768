"""Several files in flight to and from a sandbox, each by a thread with a connection of its own."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, Self, TypeVar, cast

import grpc
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import FINAL_REASONS, Backoff, Client, Deadline, Stubs, retry_wait_s
from prism_cli.errors import CliError, UnreachableError
from prism_cli.options import Settings
from prism_common.errors import PrismError
from prism_common.limits import CHUNK_BYTES_MAX
from prism_common.status import RemoteError

Result = TypeVar("Result")

#: Small files take a round trip each, which is mostly waiting; a node takes 32 calls a sandbox.
_FLIGHTS_MAX: Final = 4
#: Files that were found and wait for a thread.
_WAITING_MAX: Final = 64
#: How often what was moved is shown, and looked whether it still moves.
_TICK_S: Final = 0.1
#: How often one file is begun anew where that can help.
_ATTEMPTS: Final = 5
#: Time for threads to remove what they have not finished.
_STOP_S: Final = 5.0
#: What is wrong with the sandbox and not with the one file: no other file will do better.
_FATAL_REASONS: Final = FINAL_REASONS | {"NOT_FOUND", "WRONG_STATE", "RUNTIME_FAKE", "NOT_AN_API"}


class StoppedError(Exception):
    """The program ends: what is under way is given up."""


class Job(Protocol):
    """One file."""

    @property
    def name(self) -> str:
        """What failures are said of."""

    def run(self, flight: "Flight") -> None:
        """Do it.

        Raises:
            PrismError, OSError: It failed, and left nothing behind.
        """


class Flight:
    """One thread's connection, and the call that it has under way."""

    def __init__(self, transfers: "Transfers", settings: Settings) -> None:
        self.client = Client(settings)
        self._transfers = transfers
        self._lock = threading.Lock()
        self._call: Any = None
        self._moved_at_s = 0.0
        self._moved = 0
        self._stalled = False

    def remote(self, attempt: Callable[[Stubs], Result], attempts: int = _ATTEMPTS) -> Result:
        """Return what `attempt` returns; begin it anew where the failure is one that passes.

        Raises:
            RemoteError, CliError: It failed.
            UnreachableError: No address answers.
            StoppedError: The program ends.
        """
        backoff = Backoff()
        while True:
            self._moved, self._stalled = 0, False
            stubs = self.client.connect(Deadline(self.client.timeout_s))
            try:
                return attempt(stubs)
            except (grpc.RpcError, ValueError) as error:  # ValueError: on a channel that is closed
                failure = self._failure(error)
            finally:
                with self._lock:
                    self._call = None
            # A file that is begun anew moves all of its bytes again.
            self.moved(-self._moved)
            attempts -= 1
            wait_s = _wait_s(failure, backoff)
            if wait_s is None or attempts <= 0:
                raise failure
            if failure.status_code is grpc.StatusCode.UNAVAILABLE:
                self.client.try_next_address()
            self._transfers.pause(wait_s)

    def _failure(self, error: Exception) -> RemoteError:
        self._transfers.check()
        if self._stalled:
            raise CliError(
                f"nothing of it was moved for {self.client.timeout_s:g} s; "
                "wait longer with --timeout"
            ) from None
        if not isinstance(error, grpc.RpcError):
            raise error
        return self.client.failure(error)

    def opened(self, call: Any) -> None:
        """Take note of the call under way: it ends when the program does, or when it stalls."""
        with self._lock:
            self._call, self._moved_at_s = call, time.monotonic()
        if self._transfers.stopped.is_set():
            call.cancel()

    def moved(self, count: int) -> None:
        """Take note of progress."""
        self._moved_at_s = time.monotonic()
        self._moved += count
        self._transfers.moved(count)

    def cancel_if_stalled(self, now_s: float) -> None:
        """End a call that has moved nothing for as long as a call may take."""
        with self._lock:
            late = now_s - self._moved_at_s > self.client.timeout_s
            if self._call is not None and late:
                self._stalled = True
                self._call.cancel()

    def cancel(self) -> None:
        """End the call under way."""
        with self._lock:
            if self._call is not None:
                self._call.cancel()


class Transfers:
    """Jobs, a few at a time. One that fails does not keep the others.

    Args:
        settings: Of the call.
        advance: Told of so many bytes more.
    """

    def __init__(self, settings: Settings, advance: Callable[[int], None]) -> None:
        self._settings = settings
        self._advance = advance
        self._jobs: queue.Queue[Job | None] = queue.Queue(_WAITING_MAX)
        self._flights: list[Flight] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Condition()
        self._left = 0
        self._fresh = 0
        self._fatal: BaseException | None = None
        self.stopped = threading.Event()
        self.failures: list[tuple[str, PrismError]] = []
        self.files = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for flight in self._flights:
            flight.cancel()
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _thread in self._threads:
            with contextlib.suppress(queue.Full):
                self._jobs.put_nowait(None)
        ends = Deadline(_STOP_S)
        for thread in self._threads:
            thread.join(ends.left_s)
        for flight in self._flights:
            flight.client.disconnect()

    # ── the main thread ──

    def add(self, job: Job) -> None:
        """Have a job done; waits while many wait already."""
        with self._lock:
            self._left += 1
            begin = self._left > len(self._threads) and len(self._threads) < _FLIGHTS_MAX
        if begin:
            flight = Flight(self, self._settings)
            thread = threading.Thread(target=self._work, args=[flight], daemon=True, name="cp")
            self._flights.append(flight)
            self._threads.append(thread)
            thread.start()
        while True:
            try:
                self._jobs.put(job, timeout=_TICK_S)
                break
            except queue.Full:
                self._tick()
        self._tick()

    def fail(self, name: str, error: Exception) -> None:
        """Take note of what could not even begin.

        Raises:
            PrismError: No other file would do better.
        """
        failure = as_failure(error)
        if _is_fatal(failure):
            raise failure
        self.failures.append((name, failure))

    def finish(self) -> None:
        """Return once all jobs are done."""
        while True:
            with self._lock:
                if self._left and self._fatal is None:
                    self._lock.wait(_TICK_S)
                left = self._left
            self._tick()
            if not left:
                return

    def _tick(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, 0
            fatal = self._fatal
        if fresh:
            self._advance(fresh)
        if fatal is not None:
            raise fatal
        now_s = time.monotonic()
        for flight in self._flights:
            flight.cancel_if_stalled(now_s)

    # ── the others ──

    def _work(self, flight: Flight) -> None:
        while (job := self._jobs.get()) is not None:
            failure: BaseException | None = None
            try:
                if not self.stopped.is_set():
                    job.run(flight)
            except StoppedError:
                pass
            except (BrokenPipeError, UnreachableError) as error:
                failure = error
            except (PrismError, OSError, UnicodeError) as error:
                failure = as_failure(error)
            except BaseException as error:  # noqa: BLE001  (the main thread raises it)
                failure = error
            with self._lock:
                self._left -= 1
                if failure is None:
                    self.files += 1
                elif isinstance(failure, PrismError) and not _is_fatal(failure):
                    self.failures.append((job.name, failure))
                elif self._fatal is None:
                    self._fatal = failure
                self._lock.notify_all()

    def moved(self, count: int) -> None:
        """Take note of progress."""
        with self._lock:
            self._fresh += count
            self.bytes += count

    def check(self) -> None:
        """Raise StoppedError once the program ends."""
        if self.stopped.is_set():
            raise StoppedError

    def pause(self, time_s: float) -> None:
        """Wait; raise StoppedError when the program ends."""
        if self.stopped.wait(time_s):
            raise StoppedError


def as_failure(error: Exception) -> PrismError:
    """Return what is said of a file that failed."""
    if isinstance(error, PrismError):
        return error
    if isinstance(error, UnicodeError):
        return CliError("its name is not UTF-8, so it cannot be sent")
    if isinstance(error, OSError):
        return CliError(error.strerror or str(error))
    raise error


def _is_fatal(failure: PrismError) -> bool:
    return isinstance(failure, UnreachableError) or failure.code in _FATAL_REASONS


def _wait_s(failure: RemoteError, backoff: Backoff) -> float | None:
    """Return how long to wait before a file is begun anew; None where it cannot help."""
    busy = failure.status_code is grpc.StatusCode.RESOURCE_EXHAUSTED
    if busy and failure.retry_after_s is not None:
        return max(backoff.next_s(), failure.retry_after_s)
    return retry_wait_s(failure, backoff)


# ── One file ─────────────────────────────────────────────────────────────────────────────────


class Source:
    """What a file is read from, also by a thread of gRPC's that may outlast the call.

    Args:
        descriptor: Closed at the end, unless it is standard input.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._ended = False
        #: Why it could not be read on.
        self.problem: OSError | None = None

    def read(self) -> bytes:
        """Return the next chunk; nothing at its end.

        Raises:
            OSError: It cannot be read.
        """
        if self._descriptor == 0:  # somebody may never type: closing must not wait for that
            return os.read(0, CHUNK_BYTES_MAX)
        with self._lock:
            # The number of a closed descriptor may be another file's by now.
            return b"" if self._ended else os.read(self._descriptor, CHUNK_BYTES_MAX)

    def close(self) -> None:
        """Close it."""
        if self._descriptor == 0:
            return
        with self._lock:
            if not self._ended:
                self._ended = True
                os.close(self._descriptor)


def send(flight: Flight, stubs: Stubs, first: pb.WriteFileRequest, source: Source) -> None:
    """Write one file in a sandbox. It is complete, or what was there is untouched.

    Raises:
        RpcError: As the call failed.
        OSError: The source cannot be read; the call is cancelled, so that nothing takes its place.
    """
    known = threading.Event()

    def requests() -> Iterator[pb.WriteFileRequest]:
        known.wait()
        yield first
        while True:
            try:
                data = source.read()
            except OSError as error:
                source.problem = error
                # Before the stream ends: an end would say that the file is complete.
                call.cancel()
                return
            if not data:
                return
            yield pb.WriteFileRequest(data=data)
            flight.moved(len(data))

    call = stubs.sandboxes.WriteFile.future(requests())
    flight.opened(call)
    known.set()
    try:
        call.result()
    except (grpc.RpcError, grpc.FutureCancelledError):
        if source.problem is not None:
            raise source.problem from None
        raise cast("grpc.RpcError", call) from None
    finally:
        call.cancel()
        source.close()


def receive(
    flight: Flight, stubs: Stubs, request: pb.ReadFileRequest, write: Callable[[bytes], None]
) -> None:
    """Read one file of a sandbox.

    Raises:
        RpcError: As the call failed.
        OSError: As `write` failed.
    """
    call = stubs.sandboxes.ReadFile(request)
    flight.opened(call)
    try:
        for response in call:
            write(response.data)
            flight.moved(len(response.data))
    finally:
        call.cancel()
