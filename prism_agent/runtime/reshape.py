"""Changes what a running sandbox was given at its start: its host's name, the sizes of its tmpfs.

From outside, with the rights of the host's root; the sandbox's own code may do neither.
"""

import ctypes
import os
import socket
from typing import Final

_CLONE_NEWUTS: Final = 0x0400_0000
_FSPICK_CLOEXEC: Final = 1
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_RECONFIGURE: Final = 7

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def set_hostname(namespace: int, name: str) -> None:
    """Name the host of a UTS namespace. This thread enters it, and comes back.

    Raises:
        OSError: It is as it was; or this thread cannot come back, and must not be used again.
    """
    own = os.open("/proc/thread-self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(namespace, _CLONE_NEWUTS), "entering a sandbox's UTS namespace")
        try:
            socket.sethostname(name)
        finally:
            _check(_libc.setns(own, _CLONE_NEWUTS), "leaving a sandbox's UTS namespace")
    finally:
        os.close(own)


def resize_inside(root: int, path: str, size_bytes: int) -> None:
    """Give a tmpfs another size that only the sandbox's mount namespace has.

    Args:
        root: Descriptor of the sandbox's root directory.
        path: Where it is mounted there; nothing has run there yet that could have put a link.
        size_bytes: Of its files.

    Raises:
        OSError: It holds more than that, or the kernel cannot do this.
    """
    picked = _check(_libc.fspick(root, path.encode(), _FSPICK_CLOEXEC), f"fspick {path}")
    try:
        _check(
            _libc.fsconfig(picked, _FSCONFIG_SET_STRING, b"size", str(size_bytes).encode(), 0),
            f"size of {path}",
        )
        _check(_libc.fsconfig(picked, _FSCONFIG_RECONFIGURE, None, None, 0), f"resizing {path}")
    finally:
        os.close(picked)
