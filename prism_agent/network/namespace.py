"""Entering a network namespace: always in a thread that ends there, never as the process."""

import asyncio
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

_Result = TypeVar("_Result")

_CLONE_NEWNET: Final = 0x4000_0000
_HELPER: Final = Path(__file__).parent.parent / "supervisor" / "prism-supervisor"
_HELPER_TIMEOUT_S: Final = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter(namespace: int) -> None:
    """Move this thread, which must be one that `apart` has made, into a network namespace."""
    _check(_libc.setns(namespace, _CLONE_NEWNET), "enter a network namespace")


def enter_new() -> None:
    """Move this thread, which must be one that `apart` has made, into a new network namespace."""
    _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")


async def apart(work: Callable[[], _Result]) -> _Result:
    """Do blocking work in a thread that is used for nothing else and ends with it.

    A namespace is a property of a thread, and of the processes and sockets that it makes.
    """
    executor = ThreadPoolExecutor(1, "prism-network")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work)
    finally:
        executor.shutdown(wait=False)


async def open_socket(
    namespace: int, family: socket.AddressFamily, kind: socket.SocketKind = socket.SOCK_STREAM
) -> socket.socket:
    """Return a socket, not blocking, that belongs to a network namespace wherever it is used.

    Args:
        namespace: Its descriptor.
        family: AF_INET or AF_INET6.
        kind: SOCK_STREAM or SOCK_DGRAM; without root only the first.

    Raises:
        OSError: The kernel refused; the text says what.
    """
    if os.geteuid() != 0:
        return await asyncio.to_thread(_ask_helper, namespace, family)

    def make() -> socket.socket:
        enter(namespace)
        return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    return await apart(make)


def _ask_helper(namespace: int, family: socket.AddressFamily) -> socket.socket:
    """Have a process make the socket.

    Without root one must first enter the user namespace that owns the network namespace, and the
    kernel lets no process with threads do that.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        done = subprocess.run(  # noqa: S603
            [str(_HELPER), "socket", str(namespace), str(theirs.fileno()), str(int(family))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(namespace, theirs.fileno()),
            env={},
            timeout=_HELPER_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(0, done.stderr.decode("utf-8", "replace").strip() or "no socket")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    made = socket.socket(fileno=descriptors[0])
    made.setblocking(False)
    return made
