"""Programs that are started by the agent have what is passed to them, and nothing else."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.runtime.spawn import Child, Descriptors, spawn


def run(arguments: list[str], log: Path, passed: list[int]) -> str:
    with log.open("wb") as file:
        child = spawn(arguments, file.fileno(), passed)
    until_ended(child)
    return log.read_text()


def until_ended(child: Child) -> None:
    deadline_s = time.monotonic() + 20
    while not child.has_ended():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_it_inherits_what_is_passed_and_no_environment(tmp_path: Path) -> None:
    descriptors = Descriptors()
    number = descriptors.add_data(b"content\n")
    other = descriptors.add_data(b"of another start\n")
    try:
        script = f"ls /proc/self/fd; cat /proc/self/fd/{number}"
        said = run(["sh", "-c", script], tmp_path / "log", [number])
    finally:
        descriptors.close()
    lines = said.split()
    assert str(other) not in lines
    assert {"0", "1", "2", str(number), "content"} <= set(lines)
    assert run(["env"], tmp_path / "log", []).strip() == ""


def test_signals_that_python_ignores_are_not_ignored(tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    said = run(["grep", "SigIgn", "/proc/self/status"], tmp_path / "log", [])
    assert int(said.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_a_program_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, pytest.raises(FileNotFoundError):
        spawn(["/no/such/program"], log.fileno(), [])


def test_the_launcher_closes_what_it_was_not_told_to_keep(tmp_path: Path) -> None:
    """Whatever the agent's own parent, or a library, has left inheritable."""
    kept, leaked = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    try:
        done = subprocess.run(
            [str(SUPERVISOR), "launch-in", "-1", str(kept), "0", "1024", "0", "0", "--",
             "/bin/ls", "/proc/self/fd"],
            pass_fds=[kept, leaked], capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        os.close(kept)
        os.close(leaked)
    numbers = done.stdout.split()
    assert str(kept) in numbers
    # One more is the directory that `ls` reads, which takes the lowest number that is free.
    assert len(numbers) == 5
