"""Limits by cgroups: version 2 where it has the controllers, version 1 otherwise.

Every agent has a cgroup of its own, `prism/<node id>`, and each sandbox one below it, so two agents
on one machine never touch each other's.
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from prism_agent.cgroup_mounts import ACCOUNTING, CONTROLLERS, FREEZER, CgroupMounts, read_mounts

_CPU_PERIOD_US: Final = 100_000
#: The supervisor and bwrap's monitor count as processes of the sandbox, and are not its own.
PROCESSES_OWN: Final = 2
_KILL_TIMEOUT_S: Final = 10.0
#: A process that waits for a disk freezes when it has what it waits for.
_FREEZE_TIMEOUT_S: Final = 5.0
#: The first attempt; each further one takes twice as long.
_FREEZE_ATTEMPT_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What a sandbox may use."""

    memory_bytes: int
    processes_max: int
    cpu_millicores: int


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """What it uses, and what happened.

    Attributes:
        cpu_ns: Processor time since it was made; None: nothing counts it.
        memory_limit_bytes: What the kernel holds it to.
    """

    memory_bytes: int = 0
    processes: int = 0
    oom_kills: int = 0
    cpu_ns: int | None = None
    memory_limit_bytes: int = 0


class Cgroups(Protocol):
    """The cgroups of one agent's sandboxes."""

    description: str

    def create(self, name: str, limits: CgroupLimits) -> None:
        """Make a sandbox's cgroup, or thaw the one that there is; and set its limits."""

    def limit(self, name: str, limits: CgroupLimits) -> None:
        """Set the limits of a sandbox that may run, or be frozen.

        Raises:
            OSError: Not all could be set; version 1 takes no memory limit below what is in use.
        """

    def procs_files(self, name: str) -> Sequence[Path]:
        """Return the files that a process writes 0 to in order to enter."""

    def usage(self, name: str) -> CgroupUsage:
        """Measure."""

    def oom_kills(self, name: str) -> int:
        """Return how many processes in it the kernel has killed for memory."""

    def total(self) -> CgroupUsage:
        """Measure all sandboxes together, with those of the past in what is counted."""

    def pids(self, name: str) -> set[int]:
        """Return the processes in it."""

    def kill(self, name: str) -> None:
        """Kill all in it, and return once it is empty."""

    def freeze(self, name: str) -> None:
        """Freeze all in it, and return once they are; on failure they run on.

        Raises:
            OSError: It cannot be done here, or not in time.
        """

    def thaw(self, name: str) -> None:
        """Let all in it run; nothing frozen is success."""

    def remove(self, name: str) -> None:
        """Kill all in it, and remove it."""

    def names(self) -> set[str]:
        """Return all that there are."""

    def close(self) -> None:
        """Remove the agent's own cgroup if it is empty."""


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="ascii") as file:
        file.write(text)


def _read_number(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _nanoseconds(path: Path, field: str = "", scale: int = 1) -> int | None:
    """Return a count of time; None: there is none."""
    if not path.exists():
        return None
    return (_read_field(path, field) if field else _read_number(path)) * scale


def _read_field(path: Path | str, field: str) -> int:
    """Return a number; 0: there is none. Asked at each exec: a text file takes twice as long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096).decode("ascii")
        finally:
            os.close(descriptor)
    except OSError:
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == field and value.isdigit():
            return int(value)
    return 0


class _Directories:
    """What both versions do alike: one directory a sandbox below each root.

    Args:
        roots: The agent's cgroup in each hierarchy; version 2 has one hierarchy only.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = list(roots)
        #: Those of sandboxes that are gone.
        self._oom_kills_removed = 0

    def oom_kills(self, name: str) -> int:
        """Return how many processes in it the kernel has killed for memory."""
        raise NotImplementedError

    def _paths(self, name: str) -> list[Path]:
        return [root / name for root in self._roots]

    #: The file that a process of one thread enters by.
    _entry = "cgroup.procs"

    def procs_files(self, name: str) -> Sequence[Path]:
        return [path / self._entry for path in self._paths(name)]

    def pids(self, name: str) -> set[int]:
        found: set[int] = set()
        for file in (path / "cgroup.procs" for path in self._paths(name)):
            with contextlib.suppress(OSError):
                found.update(int(line) for line in file.read_text(encoding="ascii").split())
        # 0 is a process that our own PID namespace does not show.
        return found - {0}

    def kill(self, name: str) -> None:
        """Kill until empty: a fork in between is found in the next round."""
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        self._forbid_forks(name)
        while pids := self.pids(name):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            # Frozen processes end when they are thawed: with the signal first, none of them runs.
            self.thaw(name)
            if time.monotonic() > deadline_s:
                raise OSError(errno.EBUSY, f"processes {sorted(pids)[:10]} do not end")
            time.sleep(0.001)

    def _forbid_forks(self, name: str) -> None:
        raise NotImplementedError

    #: Where a word freezes or thaws, what these words are, and where the kernel says "frozen".
    _freeze_words = ("1", "0")

    def _freezer(self, name: str) -> Path | None:
        raise NotImplementedError

    def _frozen(self, name: str) -> bool:
        raise NotImplementedError

    def freeze(self, name: str) -> None:
        """Freeze, and wait until the kernel says that all are."""
        file = self._freezer(name)
        if file is None or not file.exists():
            raise OSError(errno.EOPNOTSUPP, "its cgroup has no freezer")
        deadline_s = time.monotonic() + _FREEZE_TIMEOUT_S
        attempt_s = _FREEZE_ATTEMPT_S
        while True:
            _write(file, self._freeze_words[0])
            if self._wait_frozen(name, min(deadline_s, time.monotonic() + attempt_s)):
                return
            # Version 1 may miss a process that was just being forked, and then waits for ever.
            self.thaw(name)
            if time.monotonic() > deadline_s:
                raise OSError(errno.ETIMEDOUT, "its processes do not freeze")
            time.sleep(0.005)
            attempt_s *= 2

    def _wait_frozen(self, name: str, deadline_s: float) -> bool:
        while not self._frozen(name):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.0005)
        return True

    def thaw(self, name: str) -> None:
        """Thaw; what has no freezer is not frozen."""
        file = self._freezer(name)
        if file is not None and file.exists():
            with contextlib.suppress(FileNotFoundError):
                _write(file, self._freeze_words[1])

    def remove(self, name: str) -> None:
        self.kill(name)
        self._oom_kills_removed += self.oom_kills(name)
        for path in self._paths(name):
            _remove_directory(path)

    def names(self) -> set[str]:
        found: set[str] = set()
        for root in self._roots:
            with contextlib.suppress(FileNotFoundError):
                found.update(entry.name for entry in os.scandir(root) if entry.is_dir())
        return found

    def close(self) -> None:
        for root in self._roots:
            for path in (root, root.parent):
                with contextlib.suppress(OSError):
                    path.rmdir()


def _remove_directory(path: Path) -> None:
    """Remove a cgroup; just after its last process has ended it is busy for a moment."""
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while True:
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.001)
        else:
            return


class CgroupsV1(_Directories):
    """One hierarchy a controller."""

    # A thread that moves itself needs no lock on all forks of the machine; a process does, and
    # waits some 12 ms for it.
    _entry = "tasks"

    def __init__(self, mounts: dict[str, Path], agent: str) -> None:
        self._controllers = {name: mount / "prism" / agent for name, mount in mounts.items()}
        super().__init__(list(dict.fromkeys(self._controllers.values())))
        self.description = f"cgroup v1: {', '.join(mounts)}"

    def create(self, name: str, limits: CgroupLimits) -> None:
        """Make it, or thaw it; and set its limits."""
        for path in self._paths(name):
            path.mkdir(parents=True, exist_ok=True)
        self.thaw(name)
        self.limit(name, limits)

    def limit(self, name: str, limits: CgroupLimits) -> None:
        """Set its limits."""
        self._limit_memory(self._controllers["memory"] / name, limits.memory_bytes)
        if "pids" in self._controllers:
            pids_max = limits.processes_max + PROCESSES_OWN
            _write(self._controllers["pids"] / name / "pids.max", str(pids_max))
        if "cpu" in self._controllers:
            cpu = self._controllers["cpu"] / name
            quota_us = limits.cpu_millicores * _CPU_PERIOD_US // 1000
            _write(cpu / "cpu.cfs_period_us", str(_CPU_PERIOD_US))
            _write(cpu / "cpu.cfs_quota_us", str(max(quota_us, 1000)))

    def _limit_memory(self, memory: Path, size_bytes: int) -> None:
        """Set both limits, of which that with swap is never the lower one."""
        both = memory / "memory.memsw.limit_in_bytes"
        files = [memory / "memory.limit_in_bytes"]
        if both.exists():  # there where swap is accounted; without swap the first limit is all
            files.insert(1 if size_bytes <= _read_number(both) else 0, both)
        try:
            for file in files:
                _write(file, str(size_bytes))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            text = f"it uses more memory than {size_bytes >> 20} MiB, and the kernel frees no more"
            raise OSError(errno.EBUSY, text) from None

    _freeze_words = ("FROZEN", "THAWED")

    def _freezer(self, name: str) -> Path | None:
        root = self._controllers.get(FREEZER)
        return root / name / "freezer.state" if root is not None else None

    def _frozen(self, name: str) -> bool:
        file = self._freezer(name)
        return file is not None and file.read_text(encoding="ascii").strip() == "FROZEN"

    def usage(self, name: str) -> CgroupUsage:
        """Measure."""
        memory = self._controllers["memory"] / name
        return CgroupUsage(
            memory_bytes=_read_number(memory / "memory.usage_in_bytes"),
            processes=_read_number(self._controllers["pids"] / name / "pids.current")
            if "pids" in self._controllers
            else len(self.pids(name)),
            oom_kills=self.oom_kills(name),
            cpu_ns=self._cpu_ns(name),
            memory_limit_bytes=_read_number(memory / "memory.limit_in_bytes"),
        )

    def oom_kills(self, name: str) -> int:
        """Return how many processes in it the kernel has killed for memory."""
        return _read_field(f"{self._controllers['memory']}/{name}/memory.oom_control", "oom_kill")

    def _cpu_ns(self, name: str) -> int | None:
        root = self._controllers.get(ACCOUNTING)
        return None if root is None else _nanoseconds(root / name / "cpuacct.usage")

    def total(self) -> CgroupUsage:
        """Measure all; what the kernel killed it counts for each sandbox only."""
        return CgroupUsage(
            memory_bytes=_read_number(self._controllers["memory"] / "memory.usage_in_bytes"),
            oom_kills=self._oom_kills_removed + sum(map(self.oom_kills, self.names())),
            cpu_ns=self._cpu_ns("."),
        )

    def _forbid_forks(self, name: str) -> None:
        if "pids" in self._controllers:
            with contextlib.suppress(FileNotFoundError):
                _write(self._controllers["pids"] / name / "pids.max", "0")


class CgroupsV2(_Directories):
    """The unified hierarchy."""

    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self._root = root
        self.description = "cgroup v2"

    def create(self, name: str, limits: CgroupLimits) -> None:
        """Make it, or thaw it; and set its limits."""
        (self._root / name).mkdir(parents=True, exist_ok=True)
        self.thaw(name)
        self.limit(name, limits)

    def limit(self, name: str, limits: CgroupLimits) -> None:
        """Set its limits."""
        path = self._root / name
        _write(path / "memory.max", str(limits.memory_bytes))
        with contextlib.suppress(FileNotFoundError):
            _write(path / "memory.swap.max", "0")
        _write(path / "pids.max", str(limits.processes_max + PROCESSES_OWN))
        quota_us = max(limits.cpu_millicores * _CPU_PERIOD_US // 1000, 1000)
        _write(path / "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")

    def _freezer(self, name: str) -> Path | None:
        return self._root / name / "cgroup.freeze"

    def _frozen(self, name: str) -> bool:
        return _read_field(self._root / name / "cgroup.events", "frozen") == 1

    def usage(self, name: str) -> CgroupUsage:
        """Measure."""
        path = self._root / name
        return CgroupUsage(
            memory_bytes=_read_number(path / "memory.current"),
            processes=_read_number(path / "pids.current"),
            oom_kills=self.oom_kills(name),
            cpu_ns=_nanoseconds(path / "cpu.stat", "usage_usec", 1000),
            memory_limit_bytes=_read_number(path / "memory.max"),
        )

    def oom_kills(self, name: str) -> int:
        """Return how many processes in it the kernel has killed for memory."""
        return _read_field(f"{self._root}/{name}/memory.events", "oom_kill")

    def total(self) -> CgroupUsage:
        """Measure all; version 2 counts it for the agent's own cgroup, with what is gone."""
        return CgroupUsage(
            memory_bytes=_read_number(self._root / "memory.current"),
            oom_kills=self.oom_kills("."),
            cpu_ns=_nanoseconds(self._root / "cpu.stat", "usage_usec", 1000),
        )

    def _forbid_forks(self, name: str) -> None:
        with contextlib.suppress(OSError):
            # Of Linux 5.14; kills all at once, also what forks. Else the rounds of `kill` do it.
            _write(self._root / name / "cgroup.kill", "1")
            return
        with contextlib.suppress(FileNotFoundError):
            _write(self._root / name / "pids.max", "0")


# ── finding them ──


def _prepare_v2(parent: Path, agent: str) -> Path:
    """Make the agent's cgroup below `parent`, with all controllers for its children."""
    root = parent / "prism" / agent
    root.mkdir(parents=True, exist_ok=True)
    for path in (parent, parent / "prism", root):
        enabled = (path / "cgroup.subtree_control").read_text(encoding="ascii").split()
        wanted = [f"+{name}" for name in CONTROLLERS if name not in enabled]
        if wanted:
            _write(path / "cgroup.subtree_control", " ".join(wanted))
    return root


def _find_v2(mounts: CgroupMounts, agent: str) -> CgroupsV2:
    if mounts.v2 is None:
        raise OSError(errno.ENOENT, "cgroup v2 is not mounted")
    own = mounts.v2 / mounts.own_v2.lstrip("/")
    problem: OSError | None = None
    for parent in dict.fromkeys((mounts.v2, own)):
        try:
            return CgroupsV2(_prepare_v2(parent, agent))
        except OSError as error:
            problem = error
            for path in (parent / "prism" / agent, parent / "prism"):
                with contextlib.suppress(OSError):
                    path.rmdir()
    try:
        # A delegated cgroup that we are in ourselves: only leaves may hold processes.
        leaf = own / "prism-agent"
        leaf.mkdir(exist_ok=True)
        _write(leaf / "cgroup.procs", "0")
        return CgroupsV2(_prepare_v2(own, agent))
    except OSError as error:
        raise problem or error from None


def find(mounts: CgroupMounts, agent: str) -> tuple[Cgroups | None, str]:
    """Return the cgroups to use, or None and in words why there are none."""
    has_v2 = False
    if mounts.v2 is not None:
        with contextlib.suppress(OSError):
            controllers = (mounts.v2 / "cgroup.controllers").read_text(encoding="ascii").split()
            has_v2 = all(name in controllers for name in CONTROLLERS)
    if has_v2:
        try:
            return _find_v2(mounts, agent), ""
        except OSError as error:
            return None, _without(f"cgroup v2 is not ours to use ({error.strerror})")
    if "memory" not in mounts.v1:
        return None, _without("there is no memory controller")
    groups = CgroupsV1(mounts.v1, agent)
    name = ".probe"
    try:
        groups.create(name, CgroupLimits(16 * 2**20, 8, 100))
        groups.remove(name)
    except OSError as error:
        return None, _without(f"cgroup v1 is not ours to use ({error.strerror})")
    missing = [each for each in CONTROLLERS if each not in mounts.v1]
    return groups, f"cgroup v1 without {', '.join(missing)}" if missing else ""


def _without(why: str) -> str:
    return (
        f"{why}: memory and CPU of sandboxes are not limited, and processes by rlimit only; run as "
        "root, or with a delegated cgroup"
    )


def find_on_this_machine(agent: str) -> tuple[Cgroups | None, str]:
    """Return the cgroups to use here, or None; and in words what is missing."""
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    own = Path("/proc/self/cgroup").read_text(encoding="ascii")
    return find(read_mounts(mountinfo, own), agent)
