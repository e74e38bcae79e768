"""Starts programs from a process that has thousands of descriptors open.

`subprocess` closes each of them in every child, and holds up all threads meanwhile: a millisecond
with a thousand, ten with eight thousand. All of ours are closed by the kernel when a program is
executed, save those that are passed, so nothing is left to close.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field


class Child:
    """A child of this process, until it was seen to have ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._reaped = False

    def has_ended(self) -> bool:
        """Look, and let it go if it has."""
        if not self._reaped:
            try:
                self._reaped = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
            except ChildProcessError:
                self._reaped = True
        return self._reaped


@dataclass(slots=True)
class Descriptors:
    """What a child inherits. They are closed here once it runs."""

    numbers: list[int] = field(default_factory=list)

    def add(self, number: int) -> int:
        """Have the child inherit a descriptor, and return it."""
        self.numbers.append(number)
        return number

    def add_data(self, content: bytes) -> int:
        """Have the child inherit a file that says this, and return it."""
        number = self.add(os.memfd_create("data", os.MFD_CLOEXEC))
        os.write(number, content)
        os.lseek(number, 0, os.SEEK_SET)
        return number

    def close(self) -> None:
        """Close them here."""
        for number in self.numbers:
            os.close(number)
        self.numbers.clear()


def spawn(arguments: Sequence[str], log: int, passed: Sequence[int]) -> Child:
    """Start a program without an environment.

    Args:
        arguments: The program, found by PATH if it is no path, and what it is told.
        log: Descriptor of its standard output and standard error.
        passed: Descriptors that it has under the same numbers. Those of other starts at the same
            time are not passed: ours stay as they are.

    Raises:
        OSError: There is no such program, or no room for another process.
    """
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    # Onto itself: it stays open in the child, and in the child only.
    actions += [(os.POSIX_SPAWN_DUP2, number, number) for number in passed]
    pid = os.posix_spawnp(
        arguments[0],
        list(arguments),
        {},
        file_actions=actions,
        # Python ignores these, and what is ignored stays so in what is executed.
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        setsigmask=[],
    )
    return Child(pid)
