"""The terminal that a person sits at: raw while a command in a sandbox has it, and given back."""

import os
import termios
import tty
from contextlib import suppress
from typing import Final

#: Ctrl-P Ctrl-Q, as docker has it.
_DETACH_FIRST: Final = b"\x10"
_DETACH_SECOND: Final = b"\x11"
#: What a terminal that does not know its size is taken for.
_SIZE_DEFAULT: Final = (24, 80)
_CELLS_MAX: Final = 65_535


class LocalTerminal:
    """The terminal on standard input."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._before: list[int | list[bytes | int]] | None = None

    @property
    def is_raw(self) -> bool:
        """Whether keys go through as bytes now."""
        return self._before is not None

    def size(self) -> tuple[int, int]:
        """Return rows and columns, each from 1 to 65535."""
        try:
            found = os.get_terminal_size(self._descriptor)
        except OSError:
            return _SIZE_DEFAULT
        rows = found.lines or _SIZE_DEFAULT[0]
        columns = found.columns or _SIZE_DEFAULT[1]
        return min(rows, _CELLS_MAX), min(columns, _CELLS_MAX)

    def enter_raw(self) -> None:
        """Let every key through as a byte, also Ctrl-C, and write what comes as it is.

        What was typed before stays in the queue: it is for the command.
        """
        with suppress(termios.error):  # it is gone; SIGHUP says so
            if self._before is None:
                self._before = termios.tcgetattr(self._descriptor)
            tty.setraw(self._descriptor, termios.TCSADRAIN)

    def restore(self) -> None:
        """Make the terminal as it was. Harmless when it is not raw."""
        if self._before is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            self._before = None


class DetachKeys:
    """Finds Ctrl-P Ctrl-Q in what is typed, also where it comes in two reads."""

    def __init__(self) -> None:
        self._held = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what is for the command, and whether the keys were pressed.

        A Ctrl-P at the end is held until the next key.
        """
        if not data:
            return data, False
        if self._held:
            data = _DETACH_FIRST + data
        self._held = False
        before, keys, _ = data.partition(_DETACH_FIRST + _DETACH_SECOND)
        if keys:
            return before, True
        if data.endswith(_DETACH_FIRST):
            self._held = True
            return data[:-1], False
        return data, False
