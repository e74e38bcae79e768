"""Streams of requests whose end means that something is complete."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, TypeVar

import grpc.aio

Request = TypeVar("Request")

#: gRPC ends the stream of a client that went away as it ends one that is complete, and says a turn
#: of the event loop later (0.1 ms when measured) that the call was cancelled.
_SETTLE_S: Final = 0.003
_SETTLE_TURNS: Final = 10


async def whole(
    requests: AsyncIterator[Request], context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[Request]:
    """Yield a client's requests, and end only if the client said that these were all.

    Raises:
        asyncio.CancelledError: The client went away, so what it sent is a part of something.
    """
    async for request in requests:
        yield request
    await asyncio.sleep(_SETTLE_S)
    for _ in range(_SETTLE_TURNS):
        await asyncio.sleep(0)
    if context.cancelled():
        raise asyncio.CancelledError
