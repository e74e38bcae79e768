"""Local connections carried to a port of a sandbox, many at once."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from prism.sandbox.v1 import sandbox_pb2 as pb
from prism.sandbox.v1 import sandbox_pb2_grpc

from prism_cli.client import FINAL_REASONS
from prism_cli.errors import CliError, LeavingError, say
from prism_cli.options import Format
from prism_cli.output import write_data, write_lines
from prism_common.channels import open_channel
from prism_common.status import RemoteError, from_rpc_error

#: One message; small beside a connection's window, large beside its framing.
_READ_BYTES: Final = 64 * 1024
#: Of one local connection, read before it is sent.
_AHEAD_BYTES: Final = 128 * 1024
#: Listening sockets' queues: a browser opens a few at a time, a load test many.
_BACKLOG: Final = 256
#: Closing resets.
_RESET: Final = struct.pack("ii", 1, 0)


class _BrokenOffError(Exception):
    """The local end of a connection has gone."""


class Forwarder:
    """Carries connections to one sandbox.

    Args:
        addresses: API addresses, the one to begin with first.
        sandbox_id: Where to: the id, so that a later sandbox of that name is not meant.
        name: What people call it.
    """

    def __init__(self, addresses: Sequence[str], sandbox_id: str, name: str) -> None:
        self._addresses = list(addresses)
        self._sandbox_id = sandbox_id
        self.name = name
        self._channel: grpc.aio.Channel | None = None
        #: Set when no connection can be made any more.
        self.gone: asyncio.Future[RemoteError] | None = None

    async def close(self) -> None:
        """Close the connection to the API; what is under way is cut off."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def carry(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one connection to its end; a failure is said, and resets it."""
        whole = False
        try:
            call = await self._connect(port)
            try:
                await self._converse(call, reader, writer)
                whole = True
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            self._explain(port, from_rpc_error(error))
        except _BrokenOffError:
            pass
        finally:
            if not whole:
                _reset(writer)
            writer.close()

    async def _connect(self, port: int) -> Any:
        """Return a call that is connected, by the first node that can make it."""
        start = pb.ForwardPortRequest(
            start=pb.ForwardPortStart(sandbox=self._sandbox_id, port=port)
        )
        tried = 0
        while True:
            channel = self._channel = self._channel or open_channel(self._addresses[0])
            call = sandbox_pb2_grpc.SandboxServiceStub(channel).ForwardPort()
            try:
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.write(start)
                if await call.read() is not grpc.aio.EOF:
                    return call
                await _raise_status(call)
            except grpc.aio.AioRpcError as error:
                tried += 1
                if (
                    error.code() is not grpc.StatusCode.UNAVAILABLE
                    or from_rpc_error(error).code in FINAL_REASONS
                    or tried >= len(self._addresses)
                ):
                    raise
                self._leave(channel)
            except BaseException:
                call.cancel()
                raise

    def _leave(self, channel: grpc.aio.Channel) -> None:
        """Try the next address; others may have done so already, and use the old one still."""
        if self._channel is channel:
            self._channel = None
            self._addresses.append(self._addresses.pop(0))

    async def _converse(
        self, call: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        sending = asyncio.TaskGroup()
        await sending.__aenter__()
        sender = sending.create_task(_send(call, reader))
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.WhichOneof("response") == "data":
                    writer.write(response.data)
                    try:
                        await writer.drain()
                    except OSError:
                        raise _BrokenOffError from None
                elif response.WhichOneof("response") == "eof" and writer.can_write_eof():
                    with contextlib.suppress(OSError):
                        writer.write_eof()
            await _raise_status(call)
        finally:
            sender.cancel()
            # What was raised outside of the group is not the group's.
            await sending.__aexit__(None, None, None)

    def _explain(self, port: int, failure: RemoteError) -> None:
        if failure.code == "CANCELLED":  # by ourselves: the local end has gone
            return
        say(f"{self.name}:{port}: {failure.message or failure.code}")
        ended = failure.code in FINAL_REASONS or failure.status_code is grpc.StatusCode.NOT_FOUND
        if ended and self.gone is not None and not self.gone.done():
            self.gone.set_result(failure)


async def _send(call: Any, reader: asyncio.StreamReader) -> None:
    """Send what the local end sends; one that has broken off ends the call."""
    try:
        while data := await reader.read(_READ_BYTES):
            await call.write(pb.ForwardPortRequest(data=data))
        request = pb.ForwardPortRequest()
        request.eof.SetInParent()
        await call.write(request)
        await call.done_writing()
    except OSError:
        call.cancel()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        # It has ended; whoever reads it says why.
        pass


async def _raise_status(call: Any) -> None:
    """Raise what a call ended with, if it is not OK."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )


def _reset(writer: asyncio.StreamWriter) -> None:
    """Have the local end see that what it got is not all."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _listen(address: str, port: int, name: str, remote: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        CliError: The address or the port cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=_BACKLOG)
    except socket.gaierror:
        raise CliError(f"--address: {address!r} is not an address of this machine") from None
    except OSError as error:
        hint = ""
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            hint = f"; give another: prismctl sandbox port {name} 0:{remote}"
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise CliError(f"{address}:{port}: {why}{hint}") from None


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator["asyncio.Future[int]"]:
    """Give a future that the first signal to end sets."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number in numbers if kept[number] is not signal.SIG_IGN]

    def tell(number: int) -> None:
        if not told.done():
            told.set_result(number)

    for number in caught:
        loop.add_signal_handler(number, tell, number)
    try:
        yield told
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
            signal.signal(number, kept[number])


def run(
    forwarder: Forwarder, wanted: Sequence[tuple[int, int]], address: str, output: Format
) -> None:
    """Listen for each (local, remote), say where, and carry connections until a signal.

    Raises:
        CliError: A port cannot be listened on, or the sandbox is gone.
        KeyboardInterrupt: By Ctrl-C.
        LeavingError: By another signal.
    """
    listeners: list[socket.socket] = []
    try:
        for local, remote in wanted:
            listeners.append(_listen(address, local, forwarder.name, remote))
        number = asyncio.run(_serve(forwarder, listeners, wanted, output))
    finally:
        for listener in listeners:
            listener.close()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number:
        raise LeavingError(number)


async def _serve(
    forwarder: Forwarder,
    listeners: Sequence[socket.socket],
    wanted: Sequence[tuple[int, int]],
    output: Format,
) -> int:
    """Return the signal that ended it."""
    forwarder.gone = asyncio.get_running_loop().create_future()
    carrying: set[asyncio.Task[None]] = set()

    async with _signals() as told, asyncio.TaskGroup() as group:

        def accept(remote: int) -> Any:
            def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = group.create_task(forwarder.carry(remote, reader, writer))
                carrying.add(task)
                task.add_done_callback(carrying.discard)

            return take

        servers = [
            await asyncio.start_server(accept(remote), sock=listener, limit=_AHEAD_BYTES)
            for listener, (_, remote) in zip(listeners, wanted, strict=True)
        ]
        _announce(forwarder.name, listeners, wanted, output)
        ends: list[asyncio.Future[Any]] = [told, forwarder.gone]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for server in servers:
            server.close()
        for task in list(carrying):
            task.cancel()
    await forwarder.close()
    if told.done():
        return told.result()
    raise CliError(f"sandbox {forwarder.name} is gone")


def _announce(
    name: str,
    listeners: Sequence[socket.socket],
    wanted: Sequence[tuple[int, int]],
    output: Format,
) -> None:
    """Say where each port is; one that was asked for by number as well."""
    found = []
    for listener, (_, remote) in zip(listeners, wanted, strict=True):
        host, port = listener.getsockname()[:2]
        found.append((f"[{host}]:{port}" if ":" in host else f"{host}:{port}", remote))
    if output is Format.NAME:
        write_lines([where for where, _ in found])
    elif output is Format.TABLE:
        write_lines([f"{where} -> {name}:{remote}" for where, remote in found])
    else:
        write_data(
            output,
            [{"address": where, "sandbox": name, "port": remote} for where, remote in found],
        )
    # Who reads it by a pipe waits for it.
    sys.stdout.flush()
