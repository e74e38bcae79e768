"""Accepts calls side by side: grpc.aio by itself asks its core for one, and then for the next."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

#: Calls that may be handed over by one look of the loop, beside gRPC's own.
_ACCEPTORS: Final = 64
_SERVES: Final[str] = cygrpc._schedule_rpc_coro.__name__


def serves_a_call(task: asyncio.Task[Any]) -> bool:
    """Whether a task is gRPC's for one call."""
    return getattr(task.get_coro(), "__name__", "") == _SERVES


class Acceptors:
    """Accepts for a server that has been started, until it stops.

    Between asking for a call and asking for the next, grpc.aio needs some turns of the loop and
    one of its own thread. In a loop that has work a turn takes a part of a millisecond, so that
    calls wait to be accepted longer than for all that is done for them (ADR 27). This uses what
    grpc.aio keeps to itself, and holds for the version that is pinned.

    Args:
        server: The server.
        handlers: Its handlers; it has no interceptors.
    """

    def __init__(self, server: grpc.aio.Server, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server: Any = server._server  # type: ignore[attr-defined]
        self._handlers = list(handlers)
        self._loop = asyncio.get_running_loop()
        self._calls: set[asyncio.Task[None]] = set()
        self._acceptors = [self._loop.create_task(self._accept()) for _ in range(_ACCEPTORS)]

    async def ended(self) -> None:
        """Return once all have ended, which they do when the server stops."""
        await asyncio.gather(*self._acceptors)

    async def _accept(self) -> None:
        while self._server.is_running():
            try:
                state = await self._server._request_call()
            except Exception:
                if self._server.is_running():
                    logger.exception("a call could not be accepted")
                    raise
                return
            serve = cygrpc._handle_rpc(self._handlers, (), state, self._loop, False)
            call = self._loop.create_task(cygrpc._schedule_rpc_coro(serve, state, self._loop))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
