"""The agent's connection to one supervisor."""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from prism_agent import limits
from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Event, Message, ProtocolError, Request
from prism_common.errors import SandboxGoneError

logger = logging.getLogger(__name__)


async def _connect(connection: socket.socket, address: str) -> None:
    """Connect; a queue of connections that is full for a moment is waited for."""
    async with asyncio.timeout(limits.SUPERVISOR_TIMEOUT_S):
        while True:
            try:
                connection.connect(address)
            except BlockingIOError:
                await asyncio.sleep(limits.RECONNECT_S)
            else:
                return


class SupervisorClient:
    """Sends requests and takes events; there is no other state than the socket.

    Args:
        on_event: Called with each UPDATE and ERROR.
        on_lost: Called once when the other end closes a connection that was made.
    """

    def __init__(self, on_event: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_lost = on_lost
        self._socket: socket.socket | None = None
        self._hello: asyncio.Future[Message] | None = None
        self._stdin: dict[int, asyncio.Future[int]] = {}
        #: The other end's; 0 before it has answered.
        self.version = 0
        #: Packets that the socket had no room for, oldest first; SUPERVISOR_UNSENT_MAX at most.
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        #: What the other end may say before it is looked how long it has said nothing, and since
        #: when; so at once it may say twice as much.
        self._allowed = float(limits.SUPERVISOR_SAYS_MAX)
        self._allowed_s = 0.0
        self._pause: asyncio.TimerHandle | None = None
        #: It is told once: what is at the other end may say nothing else.
        self._said_nonsense = False

    async def connect(self, path: Path) -> Message:
        """Connect, and return once the supervisor has answered with all that it has.

        Raises:
            SandboxGoneError: It does not answer.
        """
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            # A path in the data directory may be longer than an address can be; and a link that a
            # sandbox has put there must not lead to another's socket.
            named = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                await _connect(connection, f"/proc/self/fd/{named}")
            finally:
                os.close(named)
        except (OSError, TimeoutError) as error:
            connection.close()
            raise SandboxGoneError(f"the sandbox does not answer: {error}") from None
        self._socket = connection
        self._allowed_s = loop.time()
        loop.add_reader(connection, self._receive)
        self._hello = loop.create_future()
        self.send(Message(Request.HELLO))
        try:
            async with asyncio.timeout(limits.START_TIMEOUT_S):
                hello = await self._hello
        except TimeoutError:
            self.close()
            raise SandboxGoneError("the sandbox's supervisor does not answer") from None
        except asyncio.CancelledError:
            # Else it would be told of its loss later, when another may be in its place.
            self.close()
            raise
        self.version = hello.a
        if not protocol.VERSION_MIN <= hello.a <= protocol.VERSION:
            self.close()
            raise SandboxGoneError(f"the sandbox's supervisor is of version {hello.a}")
        return hello

    def serve(self, on_event: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        """Tell somebody else from now on; the connection stays."""
        self._on_event, self._on_lost = on_event, on_lost

    @property
    def connected(self) -> bool:
        """False: nothing can be sent any more."""
        return self._socket is not None

    def close(self) -> None:
        """Close the connection; the supervisor goes on."""
        connection, self._socket = self._socket, None
        if connection is None:
            return
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        loop = asyncio.get_running_loop()
        loop.remove_reader(connection)
        loop.remove_writer(connection)
        connection.close()
        gone = SandboxGoneError("the sandbox ended")
        for waiter in (self._hello, *self._stdin.values()):
            if waiter is not None and not waiter.done():
                waiter.set_exception(gone)
                waiter.exception()
        self._stdin.clear()
        for _, descriptors in self._unsent:
            for descriptor in descriptors:
                os.close(descriptor)
        self._unsent.clear()

    def _lose(self) -> None:
        if self._socket is not None:
            self.close()
            self._on_lost()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a request, at once or as soon as the socket has room.

        Raises:
            SandboxGoneError: There is no supervisor any more, or it has long read nothing: then the
                connection is given up, and nothing of what waited was sent.
        """
        if self._socket is None:
            raise SandboxGoneError("the sandbox ended")
        packet = message.encode()
        if message.kind == Request.EXEC:
            # Only this: what it says has other things asked of it, and would pay for itself.
            self._allow(limits.SUPERVISOR_SAYS_AN_EXEC)
        if not self._unsent and self._try_send(packet, descriptors):
            return
        if self._socket is not None and len(self._unsent) >= limits.SUPERVISOR_UNSENT_MAX:
            self._lose()
        if self._socket is None:
            raise SandboxGoneError("the sandbox ended")
        self._unsent.append((packet, [os.dup(each) for each in descriptors]))
        asyncio.get_running_loop().add_writer(self._socket, self._flush)

    def _try_send(self, packet: bytes, descriptors: Sequence[int]) -> bool:
        if self._socket is None:
            return False
        try:
            if descriptors:
                socket.send_fds(self._socket, [packet], list(descriptors))
            else:
                self._socket.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            self._lose()
            return False
        return True

    def _flush(self) -> None:
        while self._unsent:
            packet, descriptors = self._unsent[0]
            if not self._try_send(packet, descriptors):
                return
            self._unsent.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        if self._socket is not None:
            asyncio.get_running_loop().remove_writer(self._socket)

    def _allow(self, count: float) -> None:
        self._allowed = min(self._allowed + count, limits.SUPERVISOR_SAYS_MAX)

    def _may_speak(self, connection: socket.socket) -> bool:
        """Count what it says; False: it has said too much, and is listened to again later.

        What it does not get rid of holds it up, and no update is lost: each says how things are.
        """
        if self._allowed < 1:
            loop = asyncio.get_running_loop()
            now_s = loop.time()
            self._allow((now_s - self._allowed_s) * limits.SUPERVISOR_SAYS_PER_S)
            self._allowed_s = now_s
            if self._allowed < 1:
                loop.remove_reader(connection)
                self._pause = loop.call_later(limits.SUPERVISOR_PAUSE_S, self._listen, connection)
                return False
        self._allowed -= 1
        return True

    def _listen(self, connection: socket.socket) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(connection, self._receive)

    def _receive(self) -> None:
        for _ in range(64):
            if self._socket is None or not self._may_speak(self._socket):
                return
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._socket, protocol.MESSAGE_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self._lose()
                return
            if not packet:
                self._lose()
                return
            try:
                self._dispatch(protocol.decode_message(packet), descriptors)
            except ProtocolError as error:
                if not self._said_nonsense:
                    self._said_nonsense = True
                    logger.warning("a supervisor said nonsense", extra={"error": str(error)})
            finally:
                # What nobody has taken, whatever it came with.
                for descriptor in descriptors:
                    os.close(descriptor)

    def _dispatch(self, message: Message, descriptors: list[int]) -> None:
        if message.kind == Event.STDIN:
            waiter = self._stdin.pop(message.exec_number, None)
            if waiter is not None and not waiter.done() and descriptors:
                waiter.set_result(descriptors.pop())
            elif waiter is not None and not waiter.done():
                waiter.set_result(-1)
        elif message.kind == Event.HELLO and self._hello is not None and not self._hello.done():
            self._hello.set_result(message)
        elif message.kind in (Event.UPDATE, Event.ERROR):
            self._on_event(message)

    async def open_stdin(self, exec_number: int) -> int:
        """Return a descriptor of an exec's standard input; -1: it was closed.

        Raises:
            SandboxGoneError: There is no supervisor any more.
        """
        waiter = self._stdin.get(exec_number)
        if waiter is None or waiter.done():  # who asked before has gone, unanswered
            waiter = self._stdin[exec_number] = asyncio.get_running_loop().create_future()
            self.send(Message(Request.STDIN, exec_number))
        async with asyncio.timeout(limits.SUPERVISOR_TIMEOUT_S):
            return await waiter
