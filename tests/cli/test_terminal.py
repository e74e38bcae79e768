"""exec -it and attach -it on a real pseudo-terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pytest
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.terminal import DetachKeys
from tests.cli.conftest import Run
from tests.cli.fake_prism import FakePrism

WAIT_S = 30.0


class Person:
    """Someone at a terminal, where `prismctl` runs."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        self.keyboard, self.terminal = pty.openpty()
        self.resize(30, 100)
        self.before = termios.tcgetattr(self.terminal)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prism_cli", *args],
            env=environment,
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
        )

    def type(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def sees(self, words: bytes) -> None:
        end = time.monotonic() + WAIT_S
        while words not in self.seen:
            ready, _, _ = select.select([self.keyboard], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} is not in {self.seen!r}"
            self.seen += os.read(self.keyboard, 65536)

    def leaves(self) -> int:
        """Wait for the end; the terminal is as it was."""
        status = self.process.wait(WAIT_S)
        assert termios.tcgetattr(self.terminal) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
        os.close(self.terminal)


Sit = Callable[..., Person]


@pytest.fixture
def sit(fake: FakePrism, environment: dict[str, str]) -> Iterator[Sit]:
    fake.put("web", pb.SANDBOX_STATE_READY)
    people: list[Person] = []

    def start(*args: str) -> Person:
        ours = {"PRISM_API": fake.address, "TERM": "vt220", "COLORTERM": "truecolor"}
        people.append(Person(args, environment | ours))
        return people[-1]

    yield start
    for person in people:
        person.close()


def test_keys_are_bytes_and_the_exit_status_is_the_commands(sit: Sit, fake: FakePrism) -> None:
    person = sit("sandbox", "exec", "-it", "web", "--", "shell")
    person.sees(b"ready")
    person.type(b"\x03\x04\x1a\x1c")  # Ctrl-C, Ctrl-D, Ctrl-Z, Ctrl-\
    person.sees(b"1c>")
    person.type(b"q")
    assert person.leaves() == 5
    for key in (b"03", b"04", b"1a", b"1c"):
        assert key in person.seen
    start = fake.requests("Exec")[0]
    assert (start.terminal.rows, start.terminal.columns) == (30, 100)
    assert dict(start.env) == {"TERM": "vt220", "COLORTERM": "truecolor"}


def test_a_new_size_reaches_the_command(sit: Sit, fake: FakePrism) -> None:
    person = sit("sandbox", "exec", "-it", "web", "--", "shell")
    person.sees(b"ready")
    person.resize(50, 120)
    person.process.send_signal(signal.SIGWINCH)  # it is not the session's foreground group
    execution = fake.execs["ex-1"]
    with execution.changed:
        assert execution.changed.wait_for(lambda: execution.sizes == [(50, 120)], WAIT_S)


def test_detach_keys_leave_it_running_and_attach_goes_on(sit: Sit, fake: FakePrism) -> None:
    person = sit("sandbox", "exec", "-it", "web", "--", "shell")
    person.sees(b"ready")
    person.type(b"\x10")
    person.type(b"\x11")
    person.sees(b"prismctl sandbox attach -it web ex-1")
    assert person.leaves() == 0
    assert fake.execs["ex-1"].exit is None
    again = sit("sandbox", "attach", "-it", "web", "ex-1")
    again.sees(b"ready")
    again.type(b"q")
    assert again.leaves() == 5


def test_detach_keys_work_where_a_shell_ignores_sigquit(sit: Sit, fake: FakePrism) -> None:
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as children of `&` have it
    try:
        person = sit("sandbox", "exec", "-it", "web", "--", "shell")
    finally:
        signal.signal(signal.SIGQUIT, before)
    person.sees(b"ready")
    person.type(b"\x10\x11")
    assert person.leaves() == 0
    assert fake.execs["ex-1"].exit is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back(sit: Sit, fake: FakePrism, number: int) -> None:
    person = sit("sandbox", "exec", "-it", "web", "--", "shell")
    person.sees(b"ready")
    assert termios.tcgetattr(person.terminal) != person.before
    person.process.send_signal(number)
    assert person.leaves() == 128 + number
    assert fake.execs["ex-1"].exit is None


def test_without_a_terminal_it_is_refused_in_one_line(cli: Run, fake: FakePrism) -> None:
    for words in (("exec", "-it", "web", "--", "cat"), ("attach", "-it", "web", "ex-1")):
        result = cli("sandbox", *words)
        assert result.returncode == 2
        assert b"standard input is not a terminal" in result.stderr
    assert fake.calls == []


def test_detach_keys_are_found_across_reads() -> None:
    keys = DetachKeys()
    assert keys.feed(b"ab") == (b"ab", False)
    assert keys.feed(b"a\x10") == (b"a", False)
    assert keys.feed(b"x") == (b"\x10x", False)
    assert keys.feed(b"\x10\x10") == (b"\x10", False)
    assert keys.feed(b"\x11rest") == (b"", True)
