"""What the bubblewrap runtime does with the host: users, mounts, processes."""

import contextlib
import ctypes
import errno
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Final

_MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 2, 4, 32
_MNT_DETACH: Final = 2
#: Far above what distributions give to people, services and containers.
_UID_BASE: Final = 0x1000_0000
_UIDS_AN_AGENT: Final = 4096
_AGENTS: Final = 65_536
#: Each runtime that gives uids has a region of its own.
_REGION_UIDS: Final = _UIDS_AN_AGENT * _AGENTS
#: In a container with few uids mapped.
_UID_BASE_SMALL: Final = 30_000

_libc = ctypes.CDLL(None, use_errno=True)


def uid_range(node_id: str, region: int = 0) -> range:
    """Return the uids that a runtime of this agent gives to sandboxes; empty: there are not enough.

    Two agents of one machine have different ranges, most probably; if not, the other namespaces
    still separate their sandboxes.
    """
    mapped = 0
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        inside, _, count = (int(field) for field in line.split())
        mapped = max(mapped, inside + count)
    if mapped > _UID_BASE + (region + 1) * _REGION_UIDS:
        agent = zlib.crc32(node_id.encode()) % _AGENTS
        base = _UID_BASE + region * _REGION_UIDS + agent * _UIDS_AN_AGENT
        return range(base, base + _UIDS_AN_AGENT)
    base = _UID_BASE_SMALL + region * _UIDS_AN_AGENT
    return range(base, min(mapped, base + _UIDS_AN_AGENT))


def mount_tmpfs(path: Path, size_bytes: int, uid: int) -> None:
    """Mount a bounded file system of the sandbox's user."""
    inodes = max(1024, size_bytes // 4096)
    options = f"size={size_bytes},nr_inodes={inodes},mode=0755,uid={uid},gid={uid}"
    result = _libc.mount(
        b"prism", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode()
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {path}: {os.strerror(number)}")


def resize_tmpfs(path: Path, size_bytes: int, what: str = "files in /workspace") -> None:
    """Give a file system of `mount_tmpfs` another size, wherever else it is seen.

    Args:
        path: Where it is mounted.
        size_bytes: Of what it holds at most.
        what: Is in it, for the error's text: "its … take more".

    Raises:
        OSError: It holds more than that.
    """
    inodes = max(1024, size_bytes // 4096)
    options = f"size={size_bytes},nr_inodes={inodes}"
    flags = _MS_REMOUNT | _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"prism", os.fsencode(path), b"tmpfs", flags, options.encode()) != 0:
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            text = f"its {what} take more than {size_bytes >> 20} MiB"
            raise OSError(errno.ENOSPC, text)
        raise OSError(number, f"remount {path}: {os.strerror(number)}")


def hold_tmpfs(path: Path, size_bytes: int, uid: int) -> None:
    """Mount a file system, or give the one that there is its size, if its files allow that."""
    if os.path.ismount(path):
        with contextlib.suppress(OSError):
            resize_tmpfs(path, size_bytes)
    else:
        mount_tmpfs(path, size_bytes, uid)


def unmount(path: Path) -> None:
    """Unmount, also if something has it open; nothing mounted is success."""
    while _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        # One on the other: until none is left.
        pass
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise OSError(number, f"unmount {path}: {os.strerror(number)}")


def mounts_below(directory: Path) -> list[Path]:
    """Return what is mounted below a directory, the deepest first."""
    prefix = f"{directory}/"
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(prefix):
            found.append(Path(point))
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def supervised(tag: str) -> list[tuple[int, str]]:
    """Return the pids of supervisors, and of bwraps around one, whose tag begins with `tag`.

    The tag is the last argument: node id, slash, sandbox id. Code in a sandbox may give itself any
    arguments, so only what it cannot be counts: PID 1 of its namespace, or a process of ours.
    """
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")[:-1]
            if (
                len(arguments) >= 6
                and arguments[-5] == b"supervise"
                and arguments[-1].startswith(tag.encode())
                and _is_first_or_outside(Path(entry.path))
            ):
                found.append((int(entry.name), arguments[-1].decode("utf-8", "replace")))
    return found


def _is_first_or_outside(process: Path) -> bool:
    """Tell whether a process is PID 1 of a namespace below ours, or is in ours."""
    for line in (process / "status").read_bytes().splitlines():
        if line.startswith(b"NSpid:"):
            pids = line.split()[1:]
            return len(pids) == 1 or pids[-1] == b"1"
    return False


def kill_supervised(tag: str, exact: bool, timeout_s: float = 10.0) -> None:
    """Kill the sandbox with a tag (or all whose tag begins so), and wait until it is gone.

    With PID 1 of a PID namespace, the kernel kills all in it.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        pids = [pid for pid, its in supervised(tag) if its == tag or not exact]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            raise OSError(errno.EBUSY, f"processes {pids[:10]} do not end")
        time.sleep(0.002)
