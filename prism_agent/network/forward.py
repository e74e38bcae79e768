"""One TCP connection into a sandbox, made in its network namespace, so that it needs no address."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from prism_agent import limits
from prism_agent.network.namespace import open_socket
from prism_common.errors import PrismError, SandboxGoneError, WrongStateError

#: IPv6 second: a program that listens on "localhost" may have taken either.
_LOOPBACKS: Final = (
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET6, "::1"),
)
#: Closing resets: the other end must not take what was broken off for complete.
_RESET: Final = struct.pack("ii", 1, 0)


class Forward:
    """Connects, and carries bytes both ways until both sides have ended or one has failed.

    Args:
        namespace: Descriptor of the sandbox's network namespace; this object's from now on. -1: it
            is connected to in another way (`relayed.py`).
        on_close: Called once when it is closed.
        in_use: Held while it lasts.
    """

    def __init__(
        self,
        namespace: int,
        on_close: Callable[["Forward"], None],
        in_use: contextlib.AbstractContextManager[None],
    ) -> None:
        self._namespace = namespace
        self._on_close = on_close
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._failure: Exception | None = None
        #: While it connects: when that is given up.
        self._connecting: asyncio.Timeout | None = None
        #: The client has sent all, or the forward has failed.
        self._settled = asyncio.Event()
        self._sent_eof = False
        self._received_eof = False
        self._in_use = contextlib.ExitStack()
        self._in_use.enter_context(in_use)

    async def __aenter__(self) -> "Forward":
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._close()

    async def connect(self, port: int) -> None:
        """Connect to a port on the sandbox's loopback.

        Raises:
            WrongStateError: Nothing listens there, or it does not accept connections.
            SandboxGoneError: The sandbox ends just now.
        """
        if self._failure is not None:
            raise self._failure
        for family, address in _LOOPBACKS:
            try:
                connection = await open_socket(self._namespace, family)
            except OSError:
                if family is socket.AF_INET:
                    raise
                continue
            try:
                async with self._connect_in_time(port):
                    await asyncio.get_running_loop().sock_connect(connection, (address, port))
            except PrismError:
                connection.close()
                raise
            except OSError:
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                await self._take(connection)
                return
        raise port_closed(port)

    @contextlib.asynccontextmanager
    async def _connect_in_time(self, port: int) -> AsyncIterator[None]:
        """Give the block the time to connect, or until this has failed.

        Raises:
            PrismError: It was not connected in time, or has failed meanwhile.
        """
        try:
            async with asyncio.timeout(limits.FORWARD_CONNECT_S) as self._connecting:
                yield
        except TimeoutError:
            raise self._failure or port_busy(port) from None
        finally:
            self._connecting = None

    async def _take(self, connection: socket.socket) -> None:
        if connection.family is not socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader, self._writer = await asyncio.open_connection(
            sock=connection, limit=limits.FORWARD_BYTES
        )
        if self._failure is not None:
            raise self._failure

    async def received(self) -> AsyncIterator[bytes]:
        """Yield what the sandbox sends, until it sends no more.

        What is not taken is not read either: the sandbox then waits.

        Raises:
            PrismError: It was broken off, from whichever side.
        """
        assert self._reader is not None  # noqa: S101  (connect comes first)
        while True:
            try:
                data = await self._reader.read(limits.READ_BYTES)
            except OSError:
                data = b""
                self.fail(broken_off())
            if self._failure is not None:
                raise self._failure
            if not data:
                self._received_eof = True
                return
            yield data

    async def send(self, data: bytes) -> None:
        """Send, and return when there is room for more.

        Raises:
            PrismError: The sandbox takes no more.
        """
        if self._sent_eof:
            raise WrongStateError("data after eof", reason="AFTER_EOF")
        assert self._writer is not None  # noqa: S101  (connect comes first)
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError:
            raise broken_off() from None

    def send_eof(self) -> None:
        """Say that no more is sent; what was sent arrives first."""
        if self._sent_eof or self._writer is None:
            return
        self._sent_eof = True
        with contextlib.suppress(OSError):
            self._writer.write_eof()
        self._settled.set()

    async def wait_sent(self) -> None:
        """Return once the client has sent all.

        Raises:
            PrismError: It was broken off.
        """
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def fail(self, failure: Exception) -> None:
        """Break it off: whoever waits for it is told why."""
        if self._failure is not None:
            return
        self._failure = failure
        self._settled.set()
        if self._connecting is not None and not self._connecting.expired():
            self._connecting.reschedule(asyncio.get_running_loop().time())
        if self._reader is not None:
            self._reader.set_exception(failure)

    def end(self) -> None:
        """The sandbox ends."""
        self.fail(SandboxGoneError("the sandbox ended"))

    def _close(self) -> None:
        if self._namespace >= 0:
            os.close(self._namespace)
        writer, self._writer = self._writer, None
        if writer is not None and self._sent_eof and self._received_eof:
            writer.close()
        elif writer is not None:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _RESET
                )
            writer.transport.abort()
        self._in_use.close()
        self._on_close(self)


def broken_off() -> PrismError:
    """Return what is said when the sandbox ends a connection otherwise than by eof."""
    return WrongStateError("the sandbox broke the connection off", reason="CONNECTION_RESET")


def port_closed(port: int) -> PrismError:
    """Return what is said where nothing listens."""
    return WrongStateError(
        f"nothing listens on port {port} in the sandbox (on 127.0.0.1, ::1 or all addresses)",
        reason="PORT_CLOSED",
    )


def port_busy(port: int) -> PrismError:
    """Return what is said where something listens, and does not take connections."""
    return WrongStateError(
        f"port {port} in the sandbox accepts no connection: the program that listens there is too "
        "busy",
        reason="PORT_BUSY",
    )
