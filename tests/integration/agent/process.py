"""A real prism-agent, as a process of its own."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from prism.agent.v1 import agent_pb2_grpc
from prism.node.v1 import node_pb2_grpc
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.purge import purge
from prism_agent.runtime import host
from prism_common.channels import open_channel

ROOT = Path(__file__).parents[3]
_MAIN = "from prism_agent.main import main; main()"


@dataclass
class Result:
    """How an exec went."""

    exec_id: str = ""
    pieces: dict[int, list[bytes]] = field(default_factory=dict)
    exit: sandbox_pb2.ExecExit | None = None
    sequences: list[int] = field(default_factory=list)

    def add(self, response: sandbox_pb2.ExecResponse) -> None:
        kind = response.WhichOneof("response")
        if kind == "started":
            self.exec_id = response.started.exec_id
        elif kind == "output":
            self.sequences.append(response.output.sequence)
            self.pieces.setdefault(response.output.stream, []).append(response.output.data)
        else:
            self.exit = response.exit

    @property
    def stdout(self) -> bytes:
        return b"".join(self.pieces.get(sandbox_pb2.OUTPUT_STREAM_STDOUT, ()))

    @property
    def stderr(self) -> bytes:
        return b"".join(self.pieces.get(sandbox_pb2.OUTPUT_STREAM_STDERR, ()))

    @property
    def code(self) -> int:
        assert self.exit is not None
        return self.exit.exit_code


class AgentProcess:
    """Start, kill, start again: the data directory stays."""

    def __init__(
        self,
        data_dir: Path,
        control: str,
        *flags: str,
        prefix: tuple[str, ...] = (),
        python: tuple[str, ...] = (sys.executable,),
    ) -> None:
        self.data_dir = data_dir
        #: What it is started by.
        self._prefix = (*prefix, *python)
        self._control = control
        self._flags = flags
        self._process: asyncio.subprocess.Process | None = None
        self._channel: grpc.aio.Channel | None = None
        self.address = ""
        self.log = data_dir.with_suffix(".log")
        self._log_offset = 0

    async def start(self) -> None:
        """Start it, and return once it serves."""
        await self.spawn()
        await self.serving()

    async def spawn(self) -> None:
        """Start it, and return at once."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
        with self.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._prefix,
                "-c",
                _MAIN,
                f"--data-dir={self.data_dir}",
                "--name=test-node",
                "--listen=127.0.0.1:0",
                "--metrics=127.0.0.1:0",
                *([f"--control={self._control}"] if self._control else []),
                *self._flags,
                stderr=log,
                env=environment,
            )

    async def serving(self) -> None:
        """Return once what was spawned serves."""
        self.address = await self._read_address(self._log_offset)
        if self._channel is not None:
            await self._channel.close()
        self._channel = open_channel(self.address)

    async def _read_address(self, offset: int) -> str:
        async with asyncio.timeout(60):
            while True:
                text = self.log.read_bytes()[offset:].decode()
                found = re.search(r"serving .*listen=(\S+)", text)
                if found:
                    return found[1]
                assert self._process is not None
                if self._process.returncode is not None:
                    raise AssertionError(f"the agent did not start: {text}")
                await asyncio.sleep(0.01)

    @property
    def node_id(self) -> str:
        """The node's id: another agent of this machine may have a sandbox of the same id."""
        return str(json.loads((self.data_dir / "node").read_text())["node_id"])

    def supervised(self, sandbox_id: str) -> list[int]:
        """Return a sandbox's supervisor and the bwrap around it."""
        tag = f"{self.node_id}/{sandbox_id}"
        return [pid for pid, its in host.supervised(tag) if its == tag]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It was started, and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Return its exit status when it has ended by itself."""
        assert self._process is not None
        return await self._process.wait()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Signal the agent, and return its exit status."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(60):
            return await self._process.wait()

    async def kill(self) -> None:
        """Kill it. Calls under way fail by themselves, as a client sees them fail."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def clear(self) -> None:
        """End it by force if it runs still, and remove what it has left."""
        await self.end(signal.SIGKILL)
        await purge(self.data_dir)

    @property
    def stub(self) -> agent_pb2_grpc.AgentServiceStub:
        assert self._channel is not None
        return agent_pb2_grpc.AgentServiceStub(self._channel)

    @property
    def node(self) -> node_pb2_grpc.NodeServiceStub:
        assert self._channel is not None
        return node_pb2_grpc.NodeServiceStub(self._channel)

    # ── execs ──

    def open(self, sandbox_id: str, argv: list[str], **fields: Any) -> Any:
        """Begin an exec; return the call, whose first request was written."""
        timeout_s = fields.pop("timeout_s", None)
        start = sandbox_pb2.ExecStart(sandbox=sandbox_id, argv=argv, **fields)
        if timeout_s:
            start.timeout.FromNanoseconds(int(timeout_s * 1e9))
        return _Call(self.stub.Exec(), sandbox_pb2.ExecRequest(start=start))

    async def run(
        self, sandbox_id: str, argv: list[str], stdin: bytes | None = None, **fields: Any
    ) -> Result:
        """Run a command to its end."""
        call = self.open(sandbox_id, argv, stdin=stdin is not None, **fields)
        if stdin is not None:
            await call.send(stdin=stdin)
            await call.send(stdin_eof={})
        return await call.result()

    async def python(self, sandbox_id: str, program: str, **fields: Any) -> Result:
        """Run a Python program to its end."""
        return await self.run(sandbox_id, ["python3", "-c", program], **fields)

    def attach(self, sandbox_id: str, exec_id: str, after_sequence: int = 0) -> Any:
        start = sandbox_pb2.AttachStart(
            sandbox=sandbox_id, exec_id=exec_id, after_sequence=after_sequence
        )
        return _Call(self.stub.AttachExec(), sandbox_pb2.AttachExecRequest(start=start))


class _Call:
    """One exec or attach under way."""

    def __init__(self, call: Any, first: Any) -> None:
        self._call = call
        self._first: Any = first
        self.so_far = Result()

    async def _begin(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            await self._call.write(first)

    async def send(self, **fields: Any) -> None:
        await self._begin()
        if "stdin_eof" in fields:
            request = sandbox_pb2.ExecRequest()
            request.stdin_eof.SetInParent()
        else:
            request = sandbox_pb2.ExecRequest(**fields)
        await self._call.write(request)

    async def send_attach(self, **fields: Any) -> None:
        await self._begin()
        request = sandbox_pb2.AttachExecRequest()
        if fields.pop("stdin_eof", False):
            request.stdin_eof.SetInParent()
        for name, value in fields.items():
            setattr(request, name, value)
        await self._call.write(request)

    async def __aiter__(self) -> AsyncIterator[sandbox_pb2.ExecResponse]:
        await self._begin()
        while (response := await self._call.read()) is not grpc.aio.EOF:
            self.so_far.add(response)
            yield response
        if await self._call.code() is not grpc.StatusCode.OK:
            # Raise what the stream ended with.
            await self._call

    async def result(self) -> Result:
        async for _ in self:
            pass
        return self.so_far

    async def until(self, text: bytes) -> Result:
        """Read until standard output holds `text`."""
        await self._begin()
        while text not in self.so_far.stdout:
            response = await self._call.read()
            if response is grpc.aio.EOF:
                raise AssertionError(f"ended without {text!r}: {self.so_far}")
            self.so_far.add(response)
        return self.so_far

    def cancel(self) -> None:
        self._call.cancel()
