"""A control node's disk and clock, as `meddle.c` spoils them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("meddle.c")
_CONTROL: Final = struct.Struct("<qqqq")


def build(directory: Path) -> Path:
    """Compile the library; return it.

    Raises:
        SystemExit: There is no compiler, or it does not compile.
    """
    library = directory / "meddle.so"
    compiler = ("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    try:
        subprocess.run((*compiler, "-o", str(library), str(_SOURCE), "-ldl"), check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"nemesis: {_SOURCE.name} cannot be compiled: {error}") from None
    return library


class Meddle:
    """What one node's library is told, and what it tells."""

    def __init__(self, library: Path, control: Path) -> None:
        self._library = library
        self._control = control
        control.write_bytes(_CONTROL.pack(0, 0, 0, 0))

    @property
    def environment(self) -> dict[str, str]:
        """What the node must be started with."""
        return {"LD_PRELOAD": str(self._library), "PRISM_MEDDLE": str(self._control)}

    def slow_disk(self, delay_s: float) -> None:
        """Let every sync take so much longer; 0: as ever."""
        self._write(0, int(delay_s * 1e6))

    def shift_clock(self, offset_s: int) -> None:
        """Let the wall clock be wrong by so many seconds; 0: right."""
        self._write(1, offset_s)

    @property
    def delayed_syncs(self) -> int:
        """Syncs that were delayed so far."""
        return self._read()[2]

    @property
    def shifted_reads(self) -> int:
        """Readings of the clock that were wrong so far."""
        return self._read()[3]

    def _read(self) -> tuple[int, int, int, int]:
        first, second, third, fourth = _CONTROL.unpack(self._control.read_bytes())
        return first, second, third, fourth

    def _write(self, position: int, value: int) -> None:
        # In place: the node has mapped this very file.
        with self._control.open("r+b") as file:
            file.seek(8 * position)
            file.write(value.to_bytes(8, "little", signed=True))
