"""The node's call into ports of its sandboxes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.files import FileService
from prism_agent.network.forward import Forward
from prism_common import limits
from prism_common.errors import InvalidArgumentError, NotServedError, PrismError

_Context = grpc.aio.ServicerContext[Any, Any]
_PORT_MAX: Final = 65_535


class PortService(FileService):
    """Ports of the node's sandboxes, which are named by their ids here."""

    async def ForwardPort(
        self, request_iterator: AsyncIterator[sandbox_pb2.ForwardPortRequest], context: _Context
    ) -> AsyncIterator[sandbox_pb2.ForwardPortResponse]:
        """Connect to a port inside, and pass bytes both ways until both sides have ended."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgumentError("the first request must be start", field="start")
        start = first.start
        if not 1 <= start.port <= _PORT_MAX:
            raise InvalidArgumentError(
                f"start.port: {start.port}; 1 to {_PORT_MAX}", field="start.port"
            )
        async with self._sandboxes.open_forward(start.sandbox) as forward:
            try:
                await forward.connect(start.port)
            except OSError as error:
                raise NotServedError(f"ports by this agent ({error.strerror}): it") from None
            response = sandbox_pb2.ForwardPortResponse()
            response.connected.SetInParent()
            yield response
            async with _Sender(forward, request_iterator):
                async for data in forward.received():
                    yield sandbox_pb2.ForwardPortResponse(data=data)
                response = sandbox_pb2.ForwardPortResponse()
                response.eof.SetInParent()
                yield response
                await forward.wait_sent()


class _Sender:
    """Passes on what the client sends, while what the sandbox sends is passed on to the client."""

    def __init__(
        self, forward: Forward, requests: AsyncIterator[sandbox_pb2.ForwardPortRequest]
    ) -> None:
        self._sending = _send(forward, requests)
        self._group = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        await self._group.__aenter__()
        self._task = self._group.create_task(self._sending)

    async def __aexit__(self, *exc_info: Any) -> None:
        if self._task is not None:
            self._task.cancel()
        # What was raised outside of the group is not the group's.
        await self._group.__aexit__(None, None, None)


async def _send(forward: Forward, requests: AsyncIterator[sandbox_pb2.ForwardPortRequest]) -> None:
    """Pass on what the client sends; what is wrong with it breaks the connection off."""
    try:
        async for request in requests:
            match request.WhichOneof("request"):
                case "data":
                    if len(request.data) > limits.CHUNK_BYTES_MAX:
                        raise InvalidArgumentError(
                            f"data: {len(request.data)} bytes; at most {limits.CHUNK_BYTES_MAX} "
                            "a message",
                            field="data",
                        )
                    await forward.send(request.data)
                case "eof":
                    forward.send_eof()
                case "start":
                    raise InvalidArgumentError("start comes first, and only once", field="start")
                case _:
                    # A newer client may say more than we know.
                    pass
    except PrismError as error:
        forward.fail(error)
