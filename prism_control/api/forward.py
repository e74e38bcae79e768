"""Any node takes any write: here on the leader, or over one pooled channel to it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from prism_common.channels import ChannelPool
from prism_common.errors import (
    DeadlineError,
    NoLeaderError,
    NotLeaderError,
    OutcomeUnknownError,
    PrismError,
)
from prism_common.signal import Signal
from prism_common.status import from_rpc_error

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

#: Marks a forwarded call: it is never forwarded again.
FORWARDED: Final = "prism-forwarded"
#: A call without a deadline gets this one: every remote await is bounded.
_CALL_TIMEOUT_S: Final = 60.0
#: An election takes 1 to 2 s, and another after a split vote; then the caller is told.
_LEADER_WAIT_S: Final = 6.0
_RETRY_AFTER_S: Final = 1.0
#: Before the same leader is tried again.
_PAUSE_S: Final = 0.05
#: Nothing was done, or it may be sent again because its request id makes it happen once.
_SAFE_TO_RESEND: Final = frozenset({"NOT_LEADER", "NO_LEADER", "OUTCOME_UNKNOWN", "STOPPING"})


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

    def __init__(self, view: LeaderView, pool: ChannelPool) -> None:
        self._view = view
        self._pool = pool

    async def call(
        self,
        method: str,
        request: Request,
        response_type: type[Response],
        context: grpc.aio.ServicerContext[Request, Response],
        local: Callable[[Request, float], Awaitable[Response]],
    ) -> Response:
        """Serve one write. It must be safe to send twice: give it a request id first.

        Args:
            method: "/package.Service/Method".
            request: What to do.
            response_type: What comes back.
            context: Of the call.
            local: Does it on the leader, within the given seconds.

        Raises:
            NotLeaderError: The call was forwarded here, and this member does not lead.
            NoLeaderError: No leader within some seconds; nothing was done.
            OutcomeUnknownError: It may yet commit; resend it with the same request id.
            DeadlineError: The call's deadline has passed.
        """
        ends = time.monotonic() + time_left_s(context)
        leader_ends = min(ends, time.monotonic() + _LEADER_WAIT_S)
        forwarded = any(key == FORWARDED for key, _ in context.invocation_metadata() or ())
        failure: PrismError | None = None
        while (left_s := ends - time.monotonic()) > 0:
            try:
                if self._view.leads:
                    return await local(request, left_s)
                if forwarded:
                    raise self._not_leader()
                address = self._view.leader_api_address
                if address:
                    return await self._forward(method, request, response_type, address, left_s)
            except PrismError as error:
                if forwarded or error.code not in _SAFE_TO_RESEND:
                    raise
                failure = error
            if time.monotonic() >= leader_ends:
                break
            await self._wait_for_change(leader_ends)
        raise self._give_up(failure, time.monotonic() >= ends)

    async def _forward(
        self,
        method: str,
        request: Request,
        response_type: type[Response],
        address: str,
        timeout_s: float,
    ) -> Response:
        call = self._pool.get(address).unary_unary(
            method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response: Response = await call(
                request, timeout=timeout_s, metadata=((FORWARDED, "1"),)
            )
        except grpc.aio.AioRpcError as error:
            remote = from_rpc_error(error)
            # No ErrorInfo: the connection failed, perhaps after the leader had the request.
            if remote.code == "UNAVAILABLE":
                raise OutcomeUnknownError(
                    f"the leader at {address} went away: resend the same request_id",
                    retry_after_s=_RETRY_AFTER_S,
                ) from None
            raise remote from None
        return response

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

    def _give_up(self, failure: PrismError | None, deadline_passed: bool) -> PrismError:
        if isinstance(failure, OutcomeUnknownError) or (
            failure is not None and failure.code == OutcomeUnknownError.reason
        ):
            return failure
        if deadline_passed and failure is None:
            return DeadlineError("the call's deadline passed before a leader was known")
        return NoLeaderError(
            "no leader is known: writes need a majority of the control nodes; `prismctl peer ls` "
            "shows who is reachable",
            retry_after_s=_RETRY_AFTER_S,
        )
