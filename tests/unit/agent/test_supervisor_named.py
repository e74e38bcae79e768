"""The supervisor where no descriptor can be passed to it: execs come as files of a directory.

gVisor is not needed: the supervisor is root in a PID namespace, as it is there.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prism_agent.runtime.base import Shared
from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.shared_files import SharedFiles
from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Message, Request, State
from prism_agent.supervisor.ring import Ring
from tests.unit.agent.supervised import RING_BYTES, Supervised, output_of


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
