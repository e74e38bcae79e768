"""A TCP connection into a sandbox whose loopback is its own kernel's: carried by its supervisor.

`supervisor/relay.c` is the other end. It connects to a socket of the directory that it shares with
the agent. Whoever has taken over the sandbox's kernel may answer there, and can say bytes of that
one connection: what it says is bounded, and is not believed to be whole before it says so.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

from prism_agent.network.forward import Forward, broken_off, port_busy, port_closed
from prism_agent.runtime.base import Shared
from prism_agent.supervisor import protocol
from prism_common.errors import SandboxGoneError, WrongStateError

_LENGTH: Final = struct.Struct("=I")
_EOF: Final = _LENGTH.pack(0)
#: In time it was not connected to, though something listens.
_BUSY: Final = frozenset({errno.EAGAIN, errno.EINPROGRESS, errno.ETIMEDOUT})


class Relayed(Forward):
    """As its base says, by frames over a socket of a shared directory.

    Args:
        shared: The directory.
        number: Names the socket; no other connection of this sandbox has it.
        ask: Asks the supervisor to connect that socket, by its number, to a port.
        on_close: Called once when it is closed.
        in_use: Held while it lasts.
    """

    def __init__(
        self,
        shared: Shared,
        number: int,
        ask: Callable[[int, int], None],
        on_close: Callable[[Forward], None],
        in_use: contextlib.AbstractContextManager[None],
    ) -> None:
        super().__init__(-1, on_close, in_use)
        self._shared = shared
        self._number = number
        self._ask = ask

    async def connect(self, port: int) -> None:
        """Have the supervisor connect to a port on the sandbox's loopback.

        Raises:
            WrongStateError: Nothing listens there, or it does not accept connections.
            SandboxGoneError: The sandbox ends just now.
        """
        if self._failure is not None:
            raise self._failure
        with self._listener() as listener:
            self._ask(self._number, port)
            connection: socket.socket | None = None
            try:
                async with self._connect_in_time(port):
                    loop = asyncio.get_running_loop()
                    connection, _ = await loop.sock_accept(listener)
                    connection.setblocking(False)
                    status = await loop.sock_recv(connection, 1)
                if status != b"\0":
                    raise _refusal(status, port)
                taken, connection = connection, None
            finally:
                if connection is not None:
                    connection.close()
        await self._take(taken)

    @contextlib.contextmanager
    def _listener(self) -> Iterator[socket.socket]:
        """Listen under a name that the supervisor knows, and take the name away again."""
        directory = os.open(
            self._shared.directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        name = f"{self._number}.port"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Its path may be longer than an address can be.
            listener.bind(f"/proc/self/fd/{directory}/{name}")
            os.chown(
                name, self._shared.uid, self._shared.uid, dir_fd=directory, follow_symlinks=False
            )
            listener.listen(1)
            listener.setblocking(False)
            yield listener
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            os.close(directory)

    async def received(self) -> AsyncIterator[bytes]:
        """Yield what the sandbox sends, until it sends no more.

        Raises:
            PrismError: It was broken off, from whichever side.
        """
        assert self._reader is not None  # noqa: S101  (connect comes first)
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > protocol.RELAY_BYTES_MAX:
                    raise EOFError
                data = await self._reader.readexactly(length)
            except (OSError, EOFError):
                self.fail(broken_off())
            if self._failure is not None:
                raise self._failure
            if not length:
                self._received_eof = True
                return
            yield data

    async def send(self, data: bytes) -> None:
        """Send, and return when there is room for more.

        Raises:
            PrismError: The sandbox takes no more.
        """
        view = memoryview(data)
        while view:
            piece, view = view[: protocol.RELAY_BYTES_MAX], view[protocol.RELAY_BYTES_MAX :]
            await super().send(_LENGTH.pack(len(piece)) + piece)

    def send_eof(self) -> None:
        """Say that no more is sent; what was sent arrives first."""
        if not self._sent_eof and self._writer is not None:
            self._writer.write(_EOF)
            self._sent_eof = True
            self._settled.set()


def _refusal(status: bytes, port: int) -> Exception:
    """Return what is said where the supervisor did not connect to a port."""
    if not status:
        return SandboxGoneError("the sandbox ended")
    if status[0] == errno.ECONNREFUSED:
        return port_closed(port)
    if status[0] in _BUSY:
        return port_busy(port)
    return WrongStateError(
        f"port {port} in the sandbox cannot be connected to: {os.strerror(status[0])}",
        reason="PORT_CLOSED",
    )
