"""The agent's data directory: its lock, the node's identity, and what must outlive the process."""

import fcntl
import os
from pathlib import Path

import msgspec

from prism_common.errors import StartupError
from prism_common.names import generate_id

VERSION = 1


class NodeState(msgspec.Struct, kw_only=True):
    """What this node has promised, and whom it belongs to."""

    version: int = VERSION
    node_id: str
    #: Highest leader's term that was seen: no lower one is obeyed, ever.
    term: int = 0
    #: The first cluster that accepted it; an agent never changes cluster.
    cluster_id: str = ""
    #: Wall-clock time until which the leader counts this node as alive; 0: never registered.
    lease_until_s: float = 0.0

    def lease_is_over(self, now_s: float) -> bool:
        """Whether the leader may have given this node up, at a wall-clock time."""
        return 0 < self.lease_until_s <= now_s


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it.

    Raises:
        OSError: A part of it may be written.
    """
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path, content: bytes, durable: bool) -> None:
    """Replace a file so that a reader finds the old or the new contents, never half of it.

    Args:
        path: What to write.
        content: Its contents.
        durable: Also survive a crash of the machine (costs an fsync of file and directory).
    """
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, content)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DataDirectory:
    """Locked for this process while it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sandboxes = path / "sandboxes"
        self._lock = self._open(path)
        self.state = self._load()

    def _open(self, path: Path) -> int:
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.sandboxes.mkdir(exist_ok=True, mode=0o700)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"--data-dir: {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StartupError(
                f"--data-dir: {path} is in use by another prism-agent; give each its own"
            ) from None
        return lock

    def _load(self) -> NodeState:
        file = self.path / "node"
        try:
            state = msgspec.json.decode(file.read_bytes(), type=NodeState)
        except FileNotFoundError:
            state = NodeState(node_id=generate_id("nd"))
            write_atomically(file, msgspec.json.encode(state), durable=True)
        except (msgspec.MsgspecError, OSError) as error:
            raise StartupError(f"--data-dir: {file} cannot be read: {error}") from None
        if state.version != VERSION:
            raise StartupError(
                f"--data-dir: {file} is of version {state.version}; this agent reads {VERSION}"
            )
        return state

    def save(self, durable: bool) -> None:
        """Keep `state`. Promises (term, cluster) must be durable; a lease need not be."""
        write_atomically(self.path / "node", msgspec.json.encode(self.state), durable)

    def close(self) -> None:
        """Give the directory free."""
        os.close(self._lock)
