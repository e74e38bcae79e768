"""Listens for a sandbox's questions for names, inside its network namespace.

The port cannot be taken by code in the sandbox; the node's own servers are asked from outside.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from prism_agent.network.allowance import Allowance
from prism_agent.network.namespace import open_socket
from prism_agent.network.policy import Policy

if TYPE_CHECKING:
    # Loaded when a sandbox first asks for names: most agents have none that does.
    from prism_agent.network.answers import Answers, Open

#: As others do; sandboxes know no other.
ADDRESS: Final = "127.0.0.53"
_PORT: Final = 53
#: Questions a second that one sandbox is answered, and how many it may save up.
_QUESTIONS: Final = (100.0, 200.0)
#: Connections for questions by TCP, and how long one may last.
_CONNECTIONS_MAX: Final = 8
_CONNECTION_S: Final = 10.0
#: One question by TCP: its length goes before it.
_LENGTH_MAX: Final = 65_535


class Resolvers:
    """The resolvers of all sandboxes.

    Args:
        servers: The node's own DNS servers; empty: those of /etc/resolv.conf.
    """

    def __init__(self, servers: list[tuple[str, int]]) -> None:
        self._servers = servers
        self._resolvers: dict[str, _Resolver] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Answer until `stop`."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self._stop.wait()
            self._group = None
            for sandbox_id in list(self._resolvers):
                self.end(sandbox_id)

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    async def begin(self, sandbox_id: str, namespace: int, policy: Policy, opened: "Open") -> None:
        """Answer in a sandbox's network namespace.

        Raises:
            OSError: It cannot be listened on there.
        """
        from prism_agent.network.answers import Answers, upstream

        self.end(sandbox_id)
        answers = Answers(policy, opened, upstream(self._servers))
        datagrams = await open_socket(namespace, socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagrams.bind((ADDRESS, _PORT))
            streams = await open_socket(namespace, socket.AF_INET)
        except BaseException:
            datagrams.close()
            raise
        resolver = _Resolver(answers, self._spawn)
        try:
            streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            streams.bind((ADDRESS, _PORT))
            streams.listen(_CONNECTIONS_MAX)
            await resolver.listen(datagrams, streams)
        except BaseException:
            resolver.close()
            datagrams.close()
            streams.close()
            raise
        self._resolvers[sandbox_id] = resolver

    def end(self, sandbox_id: str) -> None:
        """Answer a sandbox no more."""
        resolver = self._resolvers.pop(sandbox_id, None)
        if resolver is not None:
            resolver.close()

    def forget(self) -> None:
        """Ask again for every name, and open what it leads to: the openings were lost."""
        for resolver in list(self._resolvers.values()):
            resolver.forget()

    def _spawn(self, work: Any) -> asyncio.Task[None] | None:
        if self._group is None:
            work.close()
            return None
        return self._group.create_task(work)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, resolver: "_Resolver") -> None:
        self._resolver = resolver
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        self._resolver.take_datagram(data, peer)


class _Resolver:
    """The resolver of one sandbox."""

    def __init__(
        self, answers: "Answers", spawn: Callable[[Any], asyncio.Task[None] | None]
    ) -> None:
        self._answers = answers
        self._spawn = spawn
        self._tasks: set[asyncio.Task[None]] = set()
        self._protocol = _Datagrams(self)
        self._server: asyncio.Server | None = None
        self._connections = 0
        self._questions = Allowance(*_QUESTIONS)
        self._closed = False

    async def listen(self, datagrams: socket.socket, streams: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self._protocol, sock=datagrams)
        self._server = await asyncio.start_server(
            self._take_connection, sock=streams, limit=_LENGTH_MAX
        )

    def close(self) -> None:
        self._closed = True
        if self._protocol.transport is not None:
            self._protocol.transport.abort()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()

    def forget(self) -> None:
        self._answers.forget()

    def _begin(self, work: Any) -> bool:
        task = self._spawn(work)
        if task is None:
            return False
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    # ── transports ──

    def take_datagram(self, data: bytes, peer: Any) -> None:
        if self._closed or not self._questions.take():
            return
        self._begin(self._answer_datagram(data, peer))

    async def _answer_datagram(self, data: bytes, peer: Any) -> None:
        answer = await self._answers.answer(data)
        transport = self._protocol.transport
        if answer and transport is not None and not transport.is_closing():
            transport.sendto(answer, peer)

    def _take_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed or self._connections >= _CONNECTIONS_MAX:
            writer.transport.abort()
            return
        if self._begin(self._serve(reader, writer)):
            self._connections += 1
        else:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(_CONNECTION_S):
                    while self._questions.take():
                        size = int.from_bytes(await reader.readexactly(2), "big")
                        answer = await self._answers.answer(await reader.readexactly(size))
                        if not answer:
                            return
                        writer.write(len(answer).to_bytes(2, "big") + answer)
                        await writer.drain()
        finally:
            self._connections -= 1
            writer.transport.abort()
