"""Many creates or deletes: chunks of them, several in flight, and each item's own outcome."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.calls import take
from prism_cli.client import FINAL_REASONS, Backoff, Client, Deadline
from prism_cli.errors import UnreachableError, report, say
from prism_cli.options import Settings
from prism_common.errors import PrismError
from prism_common.status import DOMAIN, RemoteError

Request = TypeVar("Request", pb.CreateSandboxRequest, pb.DeleteSandboxRequest)
Outcome: TypeAlias = pb.Sandbox | PrismError

#: Items a call: below the server's 1,000, so that progress is seen.
_CHUNK_ITEMS: Final = 500
#: Items a call that also waits: the slowest of them holds up the others' results.
_WAITING_CHUNK_ITEMS: Final = 100
#: Bytes a call: below the server's 3 MiB, which counts the list's own framing.
_CHUNK_BYTES: Final = 2 * 2**20
#: Calls in flight: the server joins them in its queue, and one would leave it idle between two.
_CALLS: Final = 4
#: Failures that are listed one by one; what is beyond is counted by reason.
_LISTED_MAX: Final = 100
_OK: Final = grpc.StatusCode.OK.value[0]
_BUSY: Final = frozenset(
    code.value[0] for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
)


@dataclass(frozen=True, slots=True)
class Item:
    """One item's outcome: what became of the request at `position`."""

    position: int
    outcome: Outcome


def create_all(settings: Settings, requests: Sequence[pb.CreateSandboxRequest]) -> Iterator[Item]:
    """Create all; yield each outcome as it is known.

    Raises:
        UnreachableError: No server answers.
    """

    def send(client: Client, chunk: Sequence[pb.CreateSandboxRequest]) -> Sequence[pb.ItemResult]:
        request = pb.BatchCreateSandboxesRequest(requests=chunk)
        return client.call(lambda stubs: stubs.sandboxes.BatchCreateSandboxes, request).results

    return _run(settings, requests, send, _CHUNK_ITEMS)


def delete_all(settings: Settings, requests: Sequence[pb.DeleteSandboxRequest]) -> Iterator[Item]:
    """Delete all; yield each outcome as it is known.

    Raises:
        UnreachableError: No server answers.
    """

    def send(client: Client, chunk: Sequence[pb.DeleteSandboxRequest]) -> Sequence[pb.ItemResult]:
        request = pb.BatchDeleteSandboxesRequest(requests=chunk)
        return client.call(lambda stubs: stubs.sandboxes.BatchDeleteSandboxes, request).results

    waits = any(request.wait for request in requests)
    return _run(settings, requests, send, _WAITING_CHUNK_ITEMS if waits else _CHUNK_ITEMS)


_Found: TypeAlias = "queue.SimpleQueue[Item | BaseException]"


def _run(
    settings: Settings,
    requests: Sequence[Request],
    send: Callable[[Client, Sequence[Request]], Sequence[pb.ItemResult]],
    items_max: int,
) -> Iterator[Item]:
    chunks: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for chunk in chunked([request.ByteSize() for request in requests], items_max):
        chunks.put(chunk)
    found: _Found = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        try:
            with Client(settings) as client:
                while not stopped.is_set():
                    chunk = chunks.get_nowait()
                    _run_chunk(client, requests, chunk, send, found)
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001  (the main thread raises it)
            found.put(error)

    for _ in range(min(_CALLS, chunks.qsize())):
        threading.Thread(target=work, daemon=True, name="batch").start()
    try:
        for _ in range(len(requests)):
            item = take(found)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def chunked(sizes: Sequence[int], items_max: int) -> Iterator[list[int]]:
    """Yield positions, in order: groups of at most so many items, and of bytes that fit a call."""
    chunk: list[int] = []
    size = 0
    for position, own in enumerate(sizes):
        if chunk and (len(chunk) == items_max or size + own > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(position)
        size += own
    if chunk:
        yield chunk


def _run_chunk(
    client: Client,
    requests: Sequence[Request],
    chunk: list[int],
    send: Callable[[Client, Sequence[Request]], Sequence[pb.ItemResult]],
    found: _Found,
) -> None:
    """Send a chunk, and again, under the same request ids, what a retry can help.

    It gives up once nothing has come of it for as long as a call may take.
    """
    backoff, patience = Backoff(), Deadline(client.timeout_s)
    left = chunk
    while left:
        failures: dict[int, PrismError] = {}
        least_s = 0.0
        try:
            results = send(client, [requests[position] for position in left])
            for position, result in zip(left, results, strict=True):
                if result.code == _OK:
                    found.put(Item(position, result.sandbox))
                else:
                    failures[position] = failure_of(result)
        except UnreachableError:
            raise
        except RemoteError as error:
            least_s = error.retry_after_s or 0.0
            failures = dict.fromkeys(left, error)
        again = [position for position, failure in failures.items() if _can_retry(failure)]
        if len(failures) < len(left):
            backoff, patience = Backoff(), Deadline(client.timeout_s)
        wait_s = max(backoff.next_s(), least_s)
        if wait_s > patience.left_s:
            again = []
        for position, failure in failures.items():
            if position not in again:
                found.put(Item(position, failure))
        left = again
        if left:
            time.sleep(wait_s)


def _can_retry(failure: PrismError) -> bool:
    status = getattr(failure, "status", None)
    if status is None or failure.code in FINAL_REASONS or failure.code == "DISK_FULL":
        return False
    return status.code in _BUSY


def failure_of(result: pb.ItemResult) -> RemoteError:
    """Return an item's failure as if a call of its own had failed."""
    status = status_pb2.Status(code=result.code, message=result.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=result.reason, domain=DOMAIN))
    return RemoteError(status)


def report_failures(settings: Settings, failures: Sequence[tuple[str, PrismError]]) -> None:
    """Write each failure with what it is about; of very many, the rest counted by reason."""
    for about, failure in failures[:_LISTED_MAX]:
        report(failure, settings, about=about)
    rest = Counter(failure.code for _, failure in failures[_LISTED_MAX:])
    for reason, count in rest.most_common():
        say(f"and {count} more: {reason}")
