"""The stream between an agent and a member, as grpc.aio shows it to the agent's session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from prism.agent.v1 import agent_pb2

from prism_common.errors import PrismError
from prism_common.status import DETAILS_KEY, code_named, status_of

if TYPE_CHECKING:
    from tests.sim.plane.agent import SimAgent
    from tests.sim.plane.member import SimMember
    from tests.sim.plane.plane import Plane

#: A stream over a link that is cut ends after so long, by keepalive.
_KEEPALIVE_S = (0.5, 4.0)


class _Pipe:
    """One direction of a stream."""

    def __init__(self, plane: Plane, sender: str, receiver: str) -> None:
        self._plane = plane
        self._ends = (sender, receiver)
        self._messages: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._last_s = 0.0
        self.is_cut = False

    def put(self, message: Any) -> None:
        """Send: in order, late, or never."""
        delay_s = self._plane.links.delay_s(*self._ends)
        if delay_s is None or self.is_cut:
            # A stream loses no single message: from here on nothing arrives, until it ends.
            self.is_cut = True
            return
        # Two timers of one time may fire in any order.
        self._last_s = max(self._last_s + 1e-6, self._plane.loop.time() + delay_s)
        self._plane.loop.call_at(self._last_s, self._arrive, message)

    def _arrive(self, message: Any) -> None:
        self._messages.append(message)
        self._arrived.set()

    async def get(self) -> Any:
        """Wait for the next message."""
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()


class Call:
    """One call of AgentGateway.Session."""

    def __init__(self, plane: Plane, agent: SimAgent, member: SimMember) -> None:
        self._plane = plane
        self._agent = agent
        self._member = member
        self._life = member.life
        self._up = _Pipe(plane, agent.name, member.name)
        self._down = _Pipe(plane, member.name, agent.name)
        self._failure: grpc.aio.AioRpcError | None = None
        self._ended = asyncio.Event()
        self._server: asyncio.Task[None] | None = None
        self._begun = False
        if not member.runs:
            self._fail(grpc.StatusCode.UNAVAILABLE, "connection refused")
        plane.calls.append(self)

    # ── the agent's side ─────────────────────────────────────────────────────────────────────

    async def write(self, message: agent_pb2.SessionRequest) -> None:
        """Send a message of the agent."""
        if self._failure is not None:
            if not self._begun:
                raise self._failure
            raise asyncio.InvalidStateError("the stream has ended")
        copy = agent_pb2.SessionRequest()
        copy.CopyFrom(message)
        if not self._begun:
            self._begun = True
            self._server = self._plane.loop.create_task(self._serve())
        self._up.put(copy)
        await asyncio.sleep(0)

    async def read(self) -> Any:
        """Return the next message for the agent, or the end of the stream."""
        get = self._plane.loop.create_task(self._down.get())
        end = self._plane.loop.create_task(self._ended.wait())
        try:
            await asyncio.wait((get, end), return_when=asyncio.FIRST_COMPLETED)
        finally:
            get.cancel()
            end.cancel()
        if get.done() and not get.cancelled():
            return get.result()
        return grpc.aio.EOF

    def cancel(self) -> None:
        """End the call."""
        self._fail(grpc.StatusCode.CANCELLED, "cancelled")
        if self._server is not None:
            self._server.cancel()

    async def code(self) -> grpc.StatusCode:
        """Return how it ended."""
        await self._ended.wait()
        if self._failure is None:
            raise RuntimeError("a call that has not ended")
        return self._failure.code()

    async def initial_metadata(self) -> Any:
        """Return nothing."""
        return grpc.aio.Metadata()

    async def trailing_metadata(self) -> Any:
        """Return what the failure carried."""
        return self._failure.trailing_metadata() if self._failure else grpc.aio.Metadata()

    async def details(self) -> str:
        """Return the failure's text."""
        return (self._failure.details() if self._failure else "") or ""

    # ── what happens to it ───────────────────────────────────────────────────────────────────

    @property
    def is_over(self) -> bool:
        """Whether it has ended for the agent."""
        return self._failure is not None

    def check(self) -> None:
        """End, some time later, if the link is cut or the member's process has ended."""
        if self.is_over:
            return
        if self._life != self._member.life:
            self._fail(grpc.StatusCode.UNAVAILABLE, "connection reset")
            if self._server is not None:
                self._server.cancel()
            return
        links, names = self._plane.links, (self._agent.name, self._member.name)
        open_both_ways = links.passes(*names) and links.passes(*reversed(names))
        if self._up.is_cut or self._down.is_cut or not open_both_ways:
            self._up.is_cut = self._down.is_cut = True
            delay_s = self._plane.random.uniform(*_KEEPALIVE_S)
            self._plane.loop.call_later(delay_s, self._break)

    def _break(self) -> None:
        self._fail(grpc.StatusCode.UNAVAILABLE, "keepalive timed out")
        if self._server is not None:
            self._server.cancel()

    def _fail(self, code: grpc.StatusCode, text: str, metadata: Any = None) -> None:
        if self._failure is None:
            nothing = grpc.aio.Metadata()
            self._failure = grpc.aio.AioRpcError(
                code, nothing, nothing if metadata is None else metadata, details=text
            )
            self._ended.set()

    # ── the member's side ────────────────────────────────────────────────────────────────────

    async def _serve(self) -> None:
        first = await self._up.get()
        dispatcher = self._member.dispatcher
        if dispatcher is None or self._life != self._member.life:
            self._fail(grpc.StatusCode.UNAVAILABLE, "connection reset")
            return

        async def requests() -> AsyncIterator[agent_pb2.SessionRequest]:
            while True:
                yield await self._up.get()

        async def write(response: agent_pb2.SessionResponse | bytes) -> None:
            data = response if isinstance(response, bytes) else response.SerializeToString()
            self._down.put(agent_pb2.SessionResponse.FromString(data))
            await asyncio.sleep(0)

        names = f"{self._agent.name}-{self._member.name}"
        self._plane.trace("register", names, len(first.register.sandboxes))
        try:
            await dispatcher.serve(first.register, requests(), write)
        except* (PrismError, TimeoutError) as group:
            error = first_of(group)
            self._plane.trace("refuse", names, error)
            if not isinstance(error, PrismError):
                error = PrismError(str(error))
            status = status_of(error)
            metadata = grpc.aio.Metadata((DETAILS_KEY, status.SerializeToString()))
            delay_s = self._plane.links.delay_s(self._member.name, self._agent.name)
            if delay_s is None:
                self._down.is_cut = True
            else:
                self._plane.loop.call_later(
                    delay_s, self._fail, code_named(status.code), status.message, metadata
                )
        else:
            self._fail(grpc.StatusCode.OK, "")


def first_of(group: BaseException) -> BaseException:
    """Return the first error of a group of groups."""
    error = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Channel:
    """What an agent's stub is made of."""

    def __init__(self, plane: Plane, agent: SimAgent, address: str) -> None:
        self._plane = plane
        self._agent = agent
        self._member = plane.member_named(address.partition(":")[0])

    def stream_stream(self, path: str, *_: object, **__: object) -> Any:
        """Return what begins a call."""
        return lambda: Call(self._plane, self._agent, self._member)

    async def close(self) -> None:
        """Nothing to let go of."""
