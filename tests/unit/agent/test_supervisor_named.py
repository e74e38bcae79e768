"""The supervisor where no descriptor can be passed to it: execs come as files of a directory.

gVisor is not needed: the supervisor is root in a PID namespace, as it is there.
"""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prism_agent.network.relayed import Relayed
from prism_agent.runtime.base import Shared
from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.shared_files import SharedFiles
from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Message, Request, State
from prism_agent.supervisor.ring import Ring
from prism_common.errors import WrongStateError
from tests.integration.agent.ports import ECHO
from tests.unit.agent.supervised import RING_BYTES, Supervised, output_of

#: Says how each connection ended.
ENDING = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("up", flush=True)
while True:
    connection = listener.accept()[0]
    try:
        while connection.recv(65536):
            pass
        print("end", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Named:
    """A supervisor, and the two directories that its execs go through."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.execs = directory / "execs"
        self.shared = directory / "shared"
        for each in (self.execs, self.shared):
            each.mkdir(mode=0o700)
        self.files = SharedFiles(Shared(self.shared, 0), self.execs)
        self.supervised = Supervised(directory, program, listen_in=self.shared)

    async def connect(self) -> None:
        async with asyncio.timeout(20):
            while not (self.shared / "control").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await self.supervised.client.connect(self.shared / "control")

    def start(self, number: int, argv: list[str], flags: int = 0) -> Ring:
        ring = Ring.create(self.execs / f"{number}.ring", RING_BYTES)
        self.supervised.rings[number] = ring
        spec = protocol.encode_spec("/", argv, {"PATH": "/usr/bin:/bin"})
        self.files.put(number, spec, with_input=bool(flags & protocol.EXEC_STDIN))
        self.supervised.client.send(Message(Request.EXEC, number, 0, flags))
        return ring

    async def until(self, ring: Ring, text: bytes) -> None:
        """Return once an exec has written something."""
        async with asyncio.timeout(20):
            while text not in output_of(ring):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.shared.iterdir())


@pytest.fixture(params=["built", "sanitised"])
async def named(
    tmp_path: Path, request: pytest.FixtureRequest, sanitised: Path | None
) -> AsyncIterator[Named]:
    if os.geteuid() != 0:
        pytest.skip("needs root: the supervisor becomes another user for each exec")
    if shutil.which("bwrap") is None or not os.access(SUPERVISOR, os.X_OK):
        pytest.skip("needs bwrap and the built supervisor")
    program = SUPERVISOR if request.param == "built" else sanitised
    if program is None:
        pytest.skip("the compiler has no sanitisers")
    one = Named(tmp_path, program)
    await one.connect()
    yield one
    assert one.supervised.end() == ""


async def test_exec_is_the_user_without_any_right(named: Named) -> None:
    ring = named.start(1, ["sh", "-c", "id -u; id -G; grep Cap /proc/self/status; exit 7"])
    header = await named.supervised.wait(1, State.DRAINED)
    user, groups, *capabilities = output_of(ring).decode().splitlines()
    assert (header.exit_code, user, groups) == (7, "1000", "1000")
    assert {int(line.split()[1], 16) for line in capabilities} == {0}
    assert named.names() == ["control"]


async def test_input_comes_whole_and_ends(named: Named) -> None:
    named.start(1, ["sh", "-c", "wc -c"], protocol.EXEC_STDIN)
    await named.supervised.wait(1, State.RUNNING)
    writing = named.files.open_input(1)
    os.set_blocking(writing, True)
    await asyncio.to_thread(_write, writing, b"x" * 300_000)
    os.close(writing)
    named.supervised.client.send(Message(Request.CLOSE_STDIN, 1))
    await named.supervised.wait(1, State.DRAINED)
    assert output_of(named.supervised.rings[1]) == b"300000\n"


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def test_input_stays_open_while_the_agent_is_away(named: Named) -> None:
    ring = named.start(1, ["sh", "-c", "read a; echo $a; read b; echo $b"], protocol.EXEC_STDIN)
    for word in (b"one", b"two"):
        await named.supervised.wait(1, State.RUNNING)
        writing = named.files.open_input(1)
        os.write(writing, word + b"\n")
        os.close(writing)
        await named.until(ring, word)
    assert (await named.supervised.wait(1, State.DRAINED)).exit_code == 0


async def test_who_waits_for_input_is_killed(named: Named) -> None:
    named.start(1, ["cat"], protocol.EXEC_STDIN)
    await named.supervised.wait(1, State.RUNNING)
    named.supervised.client.send(Message(Request.SIGNAL, 1, 9))
    assert (await named.supervised.wait(1, State.DRAINED)).signal == 9
    assert named.files.open_input(1) == -1


async def test_terminal_is_typed_into_and_takes_another_size(named: Named) -> None:
    script = "trap 'stty size' WINCH; read a; echo got $a; while :; do sleep 0.01; done"
    flags = protocol.EXEC_STDIN | protocol.exec_terminal(24, 80)
    ring = named.start(1, ["bash", "-c", script], flags)
    await named.supervised.wait(1, State.RUNNING)
    writing = named.files.open_input(1)
    os.write(writing, b"hello\n")
    await named.until(ring, b"got hello\r\n")
    named.supervised.client.send(Message(Request.RESIZE, 1, 50, 132))
    await named.until(ring, b"50 132\r\n")
    os.close(writing)
    named.supervised.client.send(Message(Request.SIGNAL, 1, 9))
    assert (await named.supervised.wait(1, State.DRAINED)).signal == 9


async def test_what_is_missing_or_a_link_is_refused(named: Named) -> None:
    named.supervised.client.send(Message(Request.EXEC, 1))
    assert (await named.supervised.error()).a == errno.ENOENT
    named.supervised.events.clear()
    (named.shared / "2.spec").symlink_to("/etc/passwd")
    named.supervised.client.send(Message(Request.EXEC, 2))
    assert (await named.supervised.error()).a == errno.ELOOP
    assert named.names() == ["control"]


async def test_a_link_in_place_of_the_socket_leads_nowhere(named: Named, tmp_path: Path) -> None:
    named.supervised.client.close()
    (named.shared / "control").rename(tmp_path / "elsewhere")
    (named.shared / "control").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="does not answer"):
        await named.supervised.client.connect(named.shared / "control")


# ── ports ────────────────────────────────────────────────────────────────────────────────────


class Port(Relayed):
    """A connection to a port, as the agent has it."""

    def __init__(self, named: Named, number: int) -> None:
        def ask(number: int, port: int) -> None:
            named.supervised.client.send(Message(Request.RELAY, number, port))

        shared = Shared(named.shared, 0)
        super().__init__(shared, number, ask, lambda _: None, contextlib.nullcontext())

    async def all(self) -> bytes:
        return b"".join([data async for data in self.received()])

    def break_the_rules(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)


async def listen(named: Named, program: str, number: int = 1, address: str = "127.0.0.1") -> Ring:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("needs python3 in the system")
    ring = named.start(number, [python, "-c", program, address, "8000"])
    await named.until(ring, b"up\n")
    return ring


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_bytes_and_ends_pass_both_ways_to_a_port(named: Named, address: str) -> None:
    await listen(named, ECHO, address=address)
    data = os.urandom(1_000_000)

    async def one(number: int) -> None:
        async with asyncio.timeout(20), Port(named, number) as port:
            await port.connect(8000)
            await port.send(data)
            port.send_eof()
            assert await port.all() == data + b"|1000000"

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(one(number))
    assert named.names() == ["control"]


async def test_what_is_no_frame_breaks_a_connection_off(named: Named) -> None:
    ring = await listen(named, ENDING)
    for data in (b"\xff\xff\xff\xff", b"\1\0\1\0", bytes(4) + b"\1\0\0\0x"):
        async with asyncio.timeout(20), Port(named, 1) as port:
            await port.connect(8000)
            port.break_the_rules(data)
            with pytest.raises(WrongStateError, match="broke the connection off"):
                await port.all()
    # It was told of two resets; what had ended in good order by then had done so.
    await named.until(ring, b"ConnectionResetError\nConnectionResetError\nend\n")


async def test_who_goes_away_is_noticed_though_nobody_reads(named: Named) -> None:
    ring = await listen(named, ENDING.replace("try:", "try:\n        time.sleep(1.5)"))
    async with asyncio.timeout(20):
        async with Port(named, 1) as port:
            await port.connect(8000)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await port.send(bytes(60_000))
    await named.until(ring, b"ConnectionResetError\n")


async def test_a_port_that_does_not_answer_is_told(named: Named) -> None:
    async with asyncio.timeout(20), Port(named, 1) as port:
        with pytest.raises(WrongStateError, match="nothing listens"):
            await port.connect(8000)
    for number in (0, 65_536):
        named.supervised.events.clear()
        named.supervised.client.send(Message(Request.RELAY, 1, number))
        assert (await named.supervised.error()).a == errno.EINVAL
    named.supervised.events.clear()
    named.supervised.client.send(Message(Request.RELAY, 7, 8000))
    assert (await named.supervised.error()).a == errno.ECONNREFUSED


def test_what_is_there_already_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "execs").mkdir()
    (tmp_path / "shared").mkdir()
    files = SharedFiles(Shared(tmp_path / "shared", os.getuid()), tmp_path / "execs")
    (tmp_path / "secret").write_text("kept")
    (tmp_path / "shared" / "1.spec").symlink_to(tmp_path / "secret")
    with pytest.raises(FileExistsError):
        files.put(1, b"spec", with_input=False)
    assert (tmp_path / "secret").read_text() == "kept"
    files.sweep()
    assert list((tmp_path / "shared").iterdir()) == []
