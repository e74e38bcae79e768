"""Connections to ports of sandboxes, and programs in them that listen."""

from typing import Any

import grpc
import grpc.aio
from prism.sandbox.v1 import sandbox_pb2

from tests.integration.agent.process import AgentProcess

#: Answers each connection with what it sent, once it has sent all.
ECHO = """
import socket, sys, threading
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=128,
    family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("up", flush=True)
def serve(connection):
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    connection.sendall(data + b"|%d" % len(data))
    connection.close()
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]]).start()
"""


class PortCall:
    """One connection, as a client of the API has it."""

    def __init__(self, stub: Any, sandbox: str, port: int) -> None:
        self._call = stub.ForwardPort()
        self._start = sandbox_pb2.ForwardPortStart(sandbox=sandbox, port=port)
        self.eof = False

    async def connect(self) -> "PortCall":
        await self._call.write(sandbox_pb2.ForwardPortRequest(start=self._start))
        response = await self._call.read()
        if response is grpc.aio.EOF:
            await self._call
        assert response.HasField("connected")
        return self

    async def send(self, data: bytes) -> None:
        await self._call.write(sandbox_pb2.ForwardPortRequest(data=data))

    async def send_eof(self) -> None:
        request = sandbox_pb2.ForwardPortRequest()
        request.eof.SetInParent()
        await self._call.write(request)

    async def receive(self) -> bytes:
        """Return a piece; empty: the sandbox sends no more."""
        response = await self._call.read()
        if response is grpc.aio.EOF:
            await self._call
            raise AssertionError("the call ended without eof")
        if response.HasField("eof"):
            self.eof = True
            return b""
        return bytes(response.data)

    async def receive_all(self) -> bytes:
        pieces = []
        while piece := await self.receive():
            pieces.append(piece)
        return b"".join(pieces)

    async def finish(self) -> None:
        """Return once the call has ended well."""
        assert await self._call.read() is grpc.aio.EOF
        assert await self._call.code() is grpc.StatusCode.OK

    async def failure(self) -> grpc.aio.AioRpcError:
        """Return how the call failed; what it gives until then is thrown away."""
        try:
            while await self._call.read() is not grpc.aio.EOF:
                pass
            await self._call
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the call did not fail")

    def cancel(self) -> None:
        self._call.cancel()


async def listen(
    agent: AgentProcess, sandbox: str, program: str, port: int, address: str = "127.0.0.1"
) -> Any:
    """Run a program that listens; return its exec once it does."""
    call = agent.open(sandbox, ["python3", "-c", program, address, str(port)])
    await call.until(b"up\n")
    return call
