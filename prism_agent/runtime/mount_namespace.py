"""The mount namespace that starts are made from: the host's, without what no sandbox needs.

Each sandbox begins with a copy of a mount namespace. The host's own has a mount for every sandbox's
files, so that copies of it would grow with each sandbox: a start of 100 took 17 ms of processor
time, and one of 500 took 26 ms. It may also hold what other services mount, and copies would keep
that from being unmounted.
"""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from prism_agent.runtime import image

#: What bwrap itself looks at, beside the image and its own program.
_NEEDED: Final = ("/etc", "/proc", "/dev")
_TIMEOUT_S: Final = 10.0


def needless(mountinfo: str, needed: Iterable[PurePosixPath]) -> list[str]:
    """Return the mount points that neither hold nor are in a needed path, the last mounted first.

    Args:
        mountinfo: As /proc/self/mountinfo says it.
        needed: Absolute paths.
    """
    needed = list(needed)
    found = []
    for line in mountinfo.splitlines():
        text = line.split()[4].encode().decode("unicode_escape")
        point = PurePosixPath(text.encode("latin-1").decode("utf-8", "surrogateescape"))
        if not any(point.is_relative_to(each) or each.is_relative_to(point) for each in needed):
            found.append(str(point))
    return found[::-1]


class MountNamespace:
    """Held by a descriptor, so it goes with this process.

    Args:
        supervisor: The program that makes it.
        bwrap: Needed in it.

    Raises:
        OSError: It could not be made; the text says why.
    """

    def __init__(self, supervisor: Path, bwrap: Path) -> None:
        names = (*image.SYSTEM_DIRECTORIES, *_NEEDED, str(bwrap))
        needed = [PurePosixPath(Path(each).resolve()) for each in names]
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        points = needless(mountinfo, needed)
        self.descriptor = -1
        with subprocess.Popen(  # noqa: S603
            [str(supervisor), "namespace", *points],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
        ) as child:
            if child.stdout is None or child.stdout.read(1) != b"\0":
                _, said = child.communicate(timeout=_TIMEOUT_S)
                raise OSError(0, said.decode("utf-8", "replace").strip() or "it said nothing")
            self.descriptor = os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            child.communicate(timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Let it go; what was copied from it stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
