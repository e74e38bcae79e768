"""The connection to the control plane: finds a node that answers, bounds and retries calls.

Imported inside commands only: grpc takes longer to load than the rest of the program.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, Self, TypeVar

import grpc
from prism.cluster.v1 import cluster_pb2_grpc
from prism.node.v1 import node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_cli.calls import Stream, aside
from prism_cli.errors import UnreachableError
from prism_cli.options import Settings, Source
from prism_common import limits
from prism_common.addresses import parse_address
from prism_common.channels import CHANNEL_OPTIONS
from prism_common.errors import PrismError
from prism_common.status import RemoteError, from_rpc_error

Request = TypeVar("Request")
Response = TypeVar("Response")

#: Our own reason: another protocol is spoken at the address.
NOT_AN_API: Final = "NOT_AN_API"
#: Reasons of UNAVAILABLE that no retry changes: the sandbox has ended.
FINAL_REASONS: Final = frozenset({"SANDBOX_GONE", "SANDBOX_LOST", "NODE_LOST", "LOST"})
#: A name that resolves and an address that never answers: the next one is tried after this.
_ATTEMPT_S: Final = limits.CONNECT_TIMEOUT_S
#: gRPC's words for a port where another protocol is spoken, such as that of the metrics.
_NOT_GRPC: Final = ("http1.x server", "http2 header with status", "Failed parsing HTTP/2")
#: A page may hold large environments; it is halved down to this where it does not fit a message.
_PAGE_SIZE: Final = 500


class Stubs:
    """The services of one connection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.sandboxes = sandbox_pb2_grpc.SandboxServiceStub(channel)
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


class Deadline:
    """A moment by which something must be done."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self._at = time.monotonic() + time_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 at least."""
        return max(0.0, self._at - time.monotonic())


class Backoff:
    """Waits that double, so that a restarted server is found soon and a missing one let be."""

    def __init__(self) -> None:
        self._next_s = limits.RECONNECT_MIN_S

    def next_s(self) -> float:
        """Return how long to wait now."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, limits.RECONNECT_MAX_S)
        return wait_s


class Client:
    """A client of one cluster: one connection at a time, to the first address that answers."""

    def __init__(self, settings: Settings) -> None:
        self.addresses, self._source = settings.addresses()
        self.timeout_s = settings.timeout_s
        self._connect_window_s = settings.connect_window_s
        self._index = 0
        self._refusals: dict[str, str] = {}
        self._channel: grpc.Channel | None = None
        self._stubs: Stubs | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    @property
    def address(self) -> str:
        """The address in use, or to be tried next."""
        return self.addresses[self._index]

    def call(
        self,
        method: "Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Request, Response]]",
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        """Call, and call again while the answer is UNAVAILABLE and a retry can help.

        Every write of ours carries a request id or is idempotent, so each retry is the same one.

        Raises:
            RemoteError: The server refused, or the time is up.
            UnreachableError: No address answers.
        """
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        backoff = Backoff()
        answered: RemoteError | None = None
        while True:
            stubs = self.connect(deadline)
            try:
                return aside(partial(method(stubs), request, timeout=deadline.left_s))
            except grpc.RpcError as error:
                failure = self.failure(error)
            if failure.code == "DEADLINE_EXCEEDED" and answered is not None:
                raise answered  # what the server said before says more than that time is up
            answered = failure
            wait_s = retry_wait_s(failure, backoff)
            if wait_s is None or wait_s >= deadline.left_s:
                raise failure
            self.try_next_address()
            time.sleep(wait_s)

    def stream(
        self,
        method: "Callable[[Stubs], grpc.UnaryStreamMultiCallable[Request, Response]]",
        request: Request,
        timeout_s: float | None = None,
    ) -> Iterator[Response]:
        """Yield the responses of one call; the caller resumes it where that can be.

        Raises:
            RemoteError: The server refused, or the stream broke.
            UnreachableError: No address answers.
        """
        stubs = self.connect(Deadline(self.timeout_s))
        call = Stream(partial(method(stubs), request, timeout=timeout_s))
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.failure(error) from None
        finally:
            call.cancel()

    def converse(
        self,
        method: "Callable[[Stubs], grpc.StreamStreamMultiCallable[Request, Response]]",
        requests: Iterable[Request],
    ) -> Stream[Response]:
        """Open a stream in both directions. It has no deadline: the caller watches it."""
        stubs = self.connect(Deadline(self.timeout_s))
        return Stream(partial(method(stubs), iter(requests)))

    def connect(self, deadline: Deadline) -> Stubs:
        """Return the connection, made if there is none."""
        if self._stubs is not None:
            return self._stubs
        window = Deadline(min(self._connect_window_s, deadline.left_s))
        backoff = Backoff()
        while True:
            for _ in self.addresses:
                if self._dial(min(_ATTEMPT_S, max(window.left_s, 0.05))):
                    assert self._stubs is not None  # noqa: S101  (for the type checker)
                    return self._stubs
                self._index = (self._index + 1) % len(self.addresses)
            wait_s = backoff.next_s()
            if wait_s >= window.left_s:
                raise self._unreachable()
            time.sleep(wait_s)

    def _dial(self, time_s: float) -> bool:
        """Open a channel to an address that accepts connections; else keep why not.

        A plain connection asks first: it fails at once and says why. gRPC's own watch of a
        connection makes closing the channel wait 0.2 s, longer than most commands take.
        """
        where = parse_address(self.address, "--api")
        try:
            socket.create_connection((where.host, where.port), timeout=time_s).close()
        except OSError as error:
            self._refusals[self.address] = error.strerror or "timed out"
            return False
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self._channel = aside(partial(grpc.insecure_channel, self.address, options=options))
        self._stubs = Stubs(self._channel)
        return True

    def try_next_address(self) -> None:
        """Leave this node; the next call dials the next address."""
        self.disconnect()
        self._index = (self._index + 1) % len(self.addresses)

    def disconnect(self) -> None:
        """Close the connection; calls under way are cancelled.

        A close that meets an event of the same channel can block for good (grpc/grpc#20026), so
        nothing waits for it.
        """
        if self._channel is not None:
            threading.Thread(target=self._channel.close, daemon=True, name="close").start()
        self._channel = self._stubs = None

    def failure(self, error: grpc.RpcError) -> RemoteError:
        """Return a failed call's status, with the address that gave it."""
        failure = from_rpc_error(error)
        failure.add_note(f"server: {self.address}")
        if any(words in failure.message for words in _NOT_GRPC):
            failure.add_note(f"gRPC: {failure.message}")
            failure.message = f"{self.address} answers, and is not a Prism API; check --api"
            failure.code = NOT_AN_API
        elif failure.code == "UNAVAILABLE":  # no ErrorInfo: gRPC's own words say little to people
            failure.add_note(f"gRPC: {failure.message}")
            failure.message = f"the connection to {self.address} broke"
        elif failure.code == "DEADLINE_EXCEEDED":
            failure.message = f"{self.address} gave no answer within {self.timeout_s:g} s"
        return failure

    def _unreachable(self) -> UnreachableError:
        places: dict[Source, str] = {
            "--api": "as --api says",
            "PRISM_API": "as PRISM_API says",
            "context file": "as the context file says",
            "default": "the default",
        }
        tried = ", ".join(
            f"{address} ({self._refusals.get(address, 'not tried')})" for address in self.addresses
        )
        return UnreachableError(
            f"no answer from {tried}, {places[self._source]}; start a server, "
            "or name one with --api HOST:PORT or PRISM_API"
        )


def retry_wait_s(failure: RemoteError, backoff: Backoff) -> float | None:
    """Return how long to wait before the same call again; None where it cannot help."""
    if failure.status_code is not grpc.StatusCode.UNAVAILABLE or failure.code in FINAL_REASONS:
        return None
    wait_s = backoff.next_s()
    if failure.retry_after_s is not None:
        return max(wait_s, failure.retry_after_s)
    return wait_s if failure.code == "UNAVAILABLE" else None


def resume_wait_s(broken: PrismError, backoff: Backoff) -> float | None:
    """Return how long to wait before a broken stream is resumed; None where it cannot be."""
    if not isinstance(broken, RemoteError):
        return backoff.next_s()
    cut = broken.code == "CANCELLED"  # by a server that stops: no ErrorInfo, and not by us
    if broken.status_code is not grpc.StatusCode.UNAVAILABLE and not cut:
        return None
    if broken.code in FINAL_REASONS or broken.code == NOT_AN_API:
        return None
    return max(backoff.next_s(), broken.retry_after_s or 0.0)


def list_sandboxes(
    client: Client, request: sandbox_pb2.ListSandboxesRequest
) -> tuple[list[sandbox_pb2.Sandbox], int]:
    """Return all pages, and the revision that a watch may start from: the first page's."""
    found: list[sandbox_pb2.Sandbox] = []
    revision = 0
    request.page_size = _PAGE_SIZE
    while True:
        try:
            page = client.call(lambda stubs: stubs.sandboxes.ListSandboxes, request)
        except RemoteError as error:
            too_large = error.status_code is grpc.StatusCode.RESOURCE_EXHAUSTED
            if not too_large or "larger than max" not in error.message or request.page_size == 1:
                raise
            request.page_size //= 2
            continue
        found += page.sandboxes
        revision = revision or page.revision
        if not page.next_page_token:
            return found, revision
        request.page_token = page.next_page_token
