"""Any node takes any write: here on the leader, or over one pooled channel to it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from prism_common.caller import ORIGIN, client
from prism_common.channels import ChannelPool
from prism_common.errors import (
    DeadlineError,
    NoLeaderError,
    NotLeaderError,
    OutcomeUnknownError,
    PrismError,
    UpgradeNeededError,
)
from prism_common.signal import Signal
from prism_common.status import from_rpc_error
from prism_control.state.commands import VERSION

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)

#: Marks a forwarded call: it is never forwarded again.
FORWARDED: Final = "prism-forwarded"
#: A call without a deadline gets this one: every remote await is bounded.
_CALL_TIMEOUT_S: Final = 60.0
#: An election takes 1 to 2 s, and another after a split vote; then the caller is told.
_LEADER_WAIT_S: Final = 6.0
_RETRY_AFTER_S: Final = 1.0
#: For a member that leads no more to answer.
_MOVED_GRACE_S: Final = 0.5
#: Before the same leader is tried again.
_PAUSE_S: Final = 0.05
#: Nothing was done, or it may be sent again because its request id makes it happen once.
SAFE_TO_RESEND: Final = frozenset({"NOT_LEADER", "NO_LEADER", "OUTCOME_UNKNOWN", "STOPPING"})
#: Refused before it was proposed, which says nothing of an attempt before.
_NOT_PROPOSED: Final = frozenset({"QUEUE_FULL", "DISK_FULL", "TOO_MANY_CALLS"})
#: Statuses without ErrorInfo: the connection failed, or the leader's server ended the call.
_CONNECTION_LOST: Final = frozenset({"UNAVAILABLE", "CANCELLED"})
#: Answered before the call's own deadline, so that the caller gets a reason; after what waits for
#: READY says its own.
_DEADLINE_MARGIN_S: Final = 0.02


class Readable(Protocol[Response_co]):
    """A message's class, or what else reads an encoded answer."""

    def FromString(self, data: bytes, /) -> Response_co:
        """Return the answer."""


class LeaderView(Protocol):
    """Who leads, as this member knows."""

    @property
    def leads(self) -> bool:
        """Whether this member leads and may serve writes."""

    @property
    def leader_api_address(self) -> str:
        """host:port of the leader's API; empty: none is known, or it is this member."""

    @property
    def changed(self) -> Signal:
        """Notified when one of these changes."""


def time_left_s(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    """Return the seconds until a call's deadline, at most a minute where it has none."""
    remaining = context.time_remaining()
    return _CALL_TIMEOUT_S if remaining is None else max(remaining, 0.0)


class Forwarder:
    """Serves writes here or on the leader, through a change of leader, within the deadline."""

    def __init__(
        self, view: LeaderView, pool: ChannelPool, command_version: Callable[[], int]
    ) -> None:
        self._view = view
        self._pool = pool
        self._command_version = command_version

    async def call(
        self,
        method: str,
        request: Request,
        response_type: Readable[Response],
        context: grpc.aio.ServicerContext[Request, Response],
        local: Callable[[Request, float], Awaitable[Response]],
        needs: Callable[[], int] = lambda: 1,
    ) -> Response:
        """Serve one write. It must be safe to send twice: give it a request id first.

        Args:
            method: "/package.Service/Method".
            request: What to do.
            response_type: What comes back.
            context: Of the call.
            local: Does it on the leader, within the given seconds.
            needs: The version of commands that it needs. A leader of an older release would not
                know the fields, and do the rest.

        Raises:
            UpgradeNeededError: This cluster does not use that version yet.
            NotLeaderError: The call was forwarded here, and this member does not lead.
            NoLeaderError: No leader within some seconds; nothing was done.
            OutcomeUnknownError: It may yet commit; resend it with the same request id.
            DeadlineError: The call's deadline has passed.
        """
        ends = time.monotonic() + time_left_s(context)
        leader_ends = min(ends, time.monotonic() + _LEADER_WAIT_S)
        forwarded = any(key == FORWARDED for key, _ in context.invocation_metadata() or ())
        #: An attempt that may yet commit; no later one makes this untrue.
        unknown: PrismError | None = None
        while (left_s := ends - (started := time.monotonic())) > 0:
            try:
                if self._view.leads:
                    return await _within(left_s, local(request, left_s))
                if forwarded:
                    raise self._not_leader()
                address = self._view.leader_api_address
                if address:
                    self._check_version(needs)
                    return await self._forward(method, request, response_type, address, left_s)
            except PrismError as error:
                if error.code == OutcomeUnknownError.reason:
                    unknown = error
                if forwarded or error.code not in SAFE_TO_RESEND:
                    raise _as_known(error, unknown) from None
            # An attempt may wait for long; only what passes without a leader counts.
            leader_ends = min(ends, leader_ends + time.monotonic() - started)
            if time.monotonic() >= leader_ends:
                break
            await self._wait_for_change(leader_ends)
        raise unknown or _give_up(time.monotonic() >= ends)

    def _check_version(self, needs: Callable[[], int]) -> None:
        active = self._command_version()
        if active < VERSION and needs() > active:
            raise UpgradeNeededError(
                f"it needs commands of version {needs()}, and this cluster uses version {active} "
                "until every control node is upgraded",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def _forward(
        self,
        method: str,
        request: Request,
        response_type: Readable[Response],
        address: str,
        timeout_s: float,
    ) -> Response:
        send = self._pool.get(address).unary_unary(
            method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        metadata = ((FORWARDED, "1"), (ORIGIN, client.get()))
        call = send(request, timeout=timeout_s, metadata=metadata)
        failure: PrismError
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._cancel_when_moved(call, address))
            try:
                response: Response = await call
                return response
            except grpc.aio.AioRpcError as error:
                failure = _from_leader(error, address)
            except asyncio.CancelledError:
                if not watch.done():
                    raise
                failure = OutcomeUnknownError(
                    f"another member leads than the one at {address}: resend the same request_id",
                    retry_after_s=_RETRY_AFTER_S,
                )
            finally:
                watch.cancel()
        raise failure

    async def _cancel_when_moved(
        self, call: grpc.aio.UnaryUnaryCall[Any, Any], address: str
    ) -> None:
        """Give a call up once another leads: a leader that hangs may answer only much later.

        One that lives says by itself what became of it, and gets the time to.
        """
        while not self._view.leads and self._view.leader_api_address in ("", address):
            await self._view.changed.wait()
        await asyncio.sleep(_MOVED_GRACE_S)
        call.cancel()

    async def _wait_for_change(self, ends: float) -> None:
        pause_s = min(_PAUSE_S, max(ends - time.monotonic(), 0))
        try:
            async with asyncio.timeout(pause_s):
                await self._view.changed.wait()
        except TimeoutError:
            return

    def _not_leader(self) -> NotLeaderError:
        address = self._view.leader_api_address
        return NotLeaderError(
            "this member does not lead",
            retry_after_s=_PAUSE_S,
            metadata={"leader": address} if address else {},
        )


async def _within(timeout_s: float, work: Awaitable[Response]) -> Response:
    """Return what a call on this member returns; what it has proposed may outlive its deadline."""
    try:
        async with asyncio.timeout(max(timeout_s - _DEADLINE_MARGIN_S, 0)):
            return await work
    except TimeoutError:
        raise OutcomeUnknownError(
            "the call's deadline passed while it was under way: resend the same request_id",
            retry_after_s=_RETRY_AFTER_S,
        ) from None


def _from_leader(error: grpc.aio.AioRpcError, address: str) -> PrismError:
    remote = from_rpc_error(error)
    if remote.code in _CONNECTION_LOST:
        return OutcomeUnknownError(
            f"the leader at {address} went away: resend the same request_id",
            retry_after_s=_RETRY_AFTER_S,
        )
    return remote


def _as_known(error: PrismError, unknown: PrismError | None) -> PrismError:
    """Return what to tell: "not proposed" is no answer after an attempt that may yet commit."""
    return unknown if unknown is not None and error.code in _NOT_PROPOSED else error


def _give_up(deadline_passed: bool) -> PrismError:
    if deadline_passed:
        return DeadlineError("the call's deadline passed before a leader was known")
    return NoLeaderError(
        "no leader is known: writes need a majority of the control nodes; `prismctl peer ls` "
        "shows who is reachable",
        retry_after_s=_RETRY_AFTER_S,
    )
