"""Supervisors that whoever has taken over a sandbox's own kernel speaks for."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_agent import limits
from prism_agent.exec_record import Exec, ExecRecord
from prism_agent.execs import Execs
from prism_agent.metrics import AgentMetrics
from prism_agent.output_room import OutputRoom
from prism_agent.runtime.base import Running
from prism_agent.supervisor import protocol
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Event, Message, Request, State
from prism_agent.supervisor.ring import Ring
from prism_common.errors import SandboxGoneError


class _Hostile:
    """The other end of one connection; it says hello and what a test has it say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._connection: socket.socket | None = None

    async def hello(self) -> None:
        loop = asyncio.get_running_loop()
        if self._connection is not None:
            self._connection.close()
        self._connection, _ = await loop.sock_accept(self._listener)
        self._connection.setblocking(False)
        await self.say(Message(Event.HELLO, 0, protocol.VERSION).encode())

    async def say(self, packet: bytes) -> None:
        assert self._connection is not None
        await asyncio.get_running_loop().sock_sendall(self._connection, packet)

    def say_with_descriptor(self, packet: bytes) -> None:
        assert self._connection is not None
        socket.send_fds(self._connection, [packet], [self._connection.fileno()])

    async def hear(self, kind: Request) -> None:
        assert self._connection is not None
        async with asyncio.timeout(10):
            while True:
                packet = await asyncio.get_running_loop().sock_recv(self._connection, 64)
                if protocol.decode_message(packet).kind == kind:
                    return

    async def answer_stdin(self, number: int) -> None:
        for _ in range(2):
            await self.hear(Request.STDIN)
        self.say_with_descriptor(Message(Event.STDIN, number).encode())

    def close(self) -> None:
        for each in (self._connection, self._listener):
            if each is not None:
                each.close()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[_Hostile]:
    other = _Hostile(tmp_path / "control")
    yield other
    other.close()


async def test_what_one_that_reads_nothing_is_told_is_bounded(hostile: _Hostile) -> None:
    lost: list[bool] = []
    client = SupervisorClient(lambda _: None, lambda: lost.append(True))
    await asyncio.gather(client.connect(hostile.path), hostile.hello())
    sent = 0
    while client.connected and sent < 10 * limits.SUPERVISOR_UNSENT_MAX:
        with contextlib.suppress(SandboxGoneError):
            client.send(Message(Request.FORGET, sent))
        sent += 1
    assert limits.SUPERVISOR_UNSENT_MAX <= sent < 10 * limits.SUPERVISOR_UNSENT_MAX
    assert lost == [True]
    assert not client.connected


async def test_execs_that_it_makes_up_are_not_remembered_without_end(
    hostile: _Hostile, tmp_path: Path
) -> None:
    execs = Execs(
        tmp_path, sandbox_pb2.SandboxSpec(), lambda: 0, lambda: None,
        AgentMetrics(CollectorRegistry()),
    )  # fmt: skip
    await asyncio.gather(execs.connect(Running(None, hostile.path), 0.0), hostile.hello())
    for number in range(2 * protocol.EXECS_MAX):
        await hostile.say(Message(Event.UPDATE, number, 0, State.RUNNING).encode())
    # What has ended and is of nobody is to be forgotten: by then all before it was heard.
    await hostile.say(Message(Event.UPDATE, 1 << 40, 0, State.DRAINED).encode())
    await hostile.hear(Request.FORGET)
    assert len(execs._known) == protocol.EXECS_MAX
    execs.detach()


async def test_no_word_of_its_end_keeps_a_sandbox_from_being_idle(
    hostile: _Hostile, tmp_path: Path
) -> None:
    (tmp_path / "execs").mkdir()
    record = ExecRecord(
        exec_id="ex-1", number=1, request_id="rq-1", digest="", argv=["true"],
        start_time_s=0.0, oom_kills=0, stdin=False,
    )  # fmt: skip
    each = Exec(OutputRoom(tmp_path / "execs"), record)
    each.save()
    Ring.create(each.ring_path).close()
    _write_state(each.ring_path, State.EXITED, 1 << 62)
    execs = Execs(
        tmp_path, sandbox_pb2.SandboxSpec(), lambda: 0, lambda: None,
        AgentMetrics(CollectorRegistry()),
    )  # fmt: skip
    running = Running(None, hostile.path)
    await asyncio.gather(execs.connect(running, 0.0), hostile.hello())
    # It ended in a future that is not believed, but not before it was heard of.
    heard_s = time.time()
    assert execs.activity.last_s <= heard_s
    assert not execs.busy
    for state in (State.RUNNING, State.EXITED):
        _write_state(each.ring_path, state, 1 << 62)
        await hostile.say(Message(Event.UPDATE, 1, 0, state).encode())
        await hostile.say(Message(Event.UPDATE, 2, 0, State.DRAINED).encode())
        await hostile.hear(Request.FORGET)
        # Nor does it run again, and to be spoken to again is no use of it.
        assert not execs.busy
        execs.detach()
        await asyncio.gather(execs.connect(running, None), hostile.hello())
        assert not execs.busy
        assert execs.activity.last_s <= heard_s
    execs.detach()


def _write_state(ring: Path, state: State, exit_ns: int) -> None:
    numbers = (2, protocol.MAGIC, state, 1 << 20, 0, 0, 0, 0, 0, exit_ns, 0, 0, 0, 0, 0, 0, 2)
    with ring.open("r+b") as file:
        file.write(protocol._RING.pack(*numbers))


async def test_nonsense_is_told_of_once_and_costs_no_descriptor(
    hostile: _Hostile, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[State] = []
    done = asyncio.Event()

    def on_event(message: Message) -> None:
        seen.append(protocol.decode_state(message.b))
        done.set()

    client = SupervisorClient(on_event, lambda: None)
    await asyncio.gather(client.connect(hostile.path), hostile.hello())
    descriptors = len(os.listdir("/proc/self/fd"))
    with caplog.at_level(logging.WARNING):
        for packet in (b"nonsense", Message(Event.UPDATE, 7, 0, 200).encode()):
            for _ in range(5):
                hostile.say_with_descriptor(packet)
        hostile.say_with_descriptor(Message(Event.UPDATE, 7, 0, State.RUNNING).encode())
        async with asyncio.timeout(10):
            await done.wait()
    assert seen == [State.RUNNING]
    assert [each.message for each in caplog.records] == ["a supervisor said nonsense"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    client.close()


async def test_one_that_floods_is_taken_at_a_rate_and_loses_nothing(
    hostile: _Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SUPERVISOR_SAYS_MAX", 64)
    monkeypatch.setattr(limits, "SUPERVISOR_SAYS_PER_S", 100)
    told: list[int] = []
    last = asyncio.Event()

    def on_event(message: Message) -> None:
        told.append(message.exec_number)
        if message.exec_number == 100:
            last.set()
        # What it says does not allow it to say more.
        client.send(Message(Request.FORGET, message.exec_number))

    client = SupervisorClient(on_event, lambda: None)
    began_s = asyncio.get_running_loop().time()
    await asyncio.gather(client.connect(hostile.path), hostile.hello())
    for number in range(101):
        await hostile.say(Message(Event.UPDATE, number, 0, State.DRAINED).encode())
    async with asyncio.timeout(20):
        await last.wait()
    assert told == list(range(101))
    # 64 at once, of which the greeting was one, and the others at the rate.
    assert asyncio.get_running_loop().time() - began_s >= (102 - 64) / 100
    client.close()


async def test_input_is_asked_for_again_where_the_first_who_asked_has_gone(
    hostile: _Hostile,
) -> None:
    client = SupervisorClient(lambda _: None, lambda: None)
    await asyncio.gather(client.connect(hostile.path), hostile.hello())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await client.open_stdin(1)
    hostile.say_with_descriptor(Message(Event.STDIN, 2).encode())
    descriptor, _ = await asyncio.gather(client.open_stdin(1), hostile.answer_stdin(1))
    os.close(descriptor)
    client.close()
