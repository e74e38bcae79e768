"""Where the machine has cgroups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What limits a sandbox.
CONTROLLERS: Final = ("memory", "pids", "cpu")
#: Controllers of version 1 only: needed to pause, and to measure processor time.
FREEZER: Final = "freezer"
ACCOUNTING: Final = "cpuacct"


@dataclass(frozen=True, slots=True)
class CgroupMounts:
    """Where cgroups are mounted, and where this process is in them."""

    v1: dict[str, Path]
    v2: Path | None
    own_v2: str = "/"


def read_mounts(mountinfo: str, own: str) -> CgroupMounts:
    """Read /proc/self/mountinfo and /proc/self/cgroup."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 3:
            continue
        point = Path(fields[4].replace("\\040", " "))
        if rest[0] == "cgroup2":
            v2 = v2 or point
        elif rest[0] == "cgroup":
            for option in rest[2].split(","):
                if option in (*CONTROLLERS, FREEZER, ACCOUNTING):
                    v1.setdefault(option, point)
    own_v2 = "/"
    for line in own.splitlines():
        if line.startswith("0::"):
            own_v2 = line[3:]
    return CgroupMounts(v1, v2, own_v2)
