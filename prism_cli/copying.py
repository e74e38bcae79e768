"""What is copied where: trees walked, one directory at a time, and a job for each file."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import Client, Stubs
from prism_cli.errors import CliError, printable
from prism_cli.local_files import LocalTree, check_name, leads_out
from prism_cli.options import Settings
from prism_cli.progress import progress
from prism_cli.streams import write_all
from prism_cli.transfers import Flight, Source, Transfers, receive, send
from prism_common.errors import PrismError
from prism_common.status import RemoteError

#: Links followed for a path that the user named, as the kernel has it.
_LINKS_MAX: Final = 40
_MODE_BITS: Final = 0o777
#: The years 1 to 9999.
_TIME_MIN_S, _TIME_MAX_S = -62_135_596_800, 253_402_300_799
_FILE: Final = pb.FILE_TYPE_REGULAR
_DIRECTORY: Final = pb.FILE_TYPE_DIRECTORY
_LINK: Final = pb.FILE_TYPE_SYMLINK


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of it: files that were copied, links too; bytes; and what failed, with why."""

    files: int
    bytes: int
    failures: list[tuple[str, PrismError]]


class Copier:
    """Copies between this machine and one sandbox."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def from_stdin(self, sandbox: str, path: str) -> Copied:
        """Write a file from standard input."""
        with Client(self._settings) as client:
            target = Remote(client, sandbox).file_target(path, "the input")
        with self._transfers(f"to {sandbox}:{target}", None) as transfers:
            transfers.add(Upload(sandbox, target, _open_stdin, 0, None, "-", attempts=1))
            return _finish(transfers)

    def to_stdout(self, sandbox: str, path: str) -> Copied:
        """Write a file's contents to standard output."""
        with Client(self._settings) as client:
            info = Remote(client, sandbox).source(path)
        if info.type == _DIRECTORY:
            raise CliError(f"{sandbox}:{path} is a directory; only a file is copied to -")
        with self._transfers(f"from {sandbox}:{path}", info.size_bytes) as transfers:
            transfers.add(Print(sandbox, info.path))
            return _finish(transfers)

    def upload(self, source: str, sandbox: str, path: str) -> Copied:
        """Copy from this machine into a sandbox."""
        try:
            status = os.stat(source)
        except OSError as error:
            raise CliError(f"{source}: {error.strerror}") from None
        with Client(self._settings) as client:
            remote = Remote(client, sandbox)
            if not stat.S_ISDIR(status.st_mode):
                if not stat.S_ISREG(status.st_mode):
                    raise CliError(f"{source}: not a regular file; its contents can come by -")
                target = remote.file_target(path, os.path.basename(source))
                with self._transfers(f"to {sandbox}:{target}", status.st_size) as transfers:
                    transfers.add(_upload(sandbox, target, source, status, followed=True))
                    return _finish(transfers)
            target = remote.tree_target(path, _own_name(source))
            with self._transfers(f"to {sandbox}:{target}", None) as transfers:
                remote.make_directory(target, stat.S_IMODE(status.st_mode))
                _upload_tree(transfers, remote, source, target)
                return _finish(transfers)

    def download(self, sandbox: str, path: str, destination: str) -> Copied:
        """Copy from a sandbox to this machine."""
        with Client(self._settings) as client:
            remote = Remote(client, sandbox)
            info = remote.source(path)
            if info.type not in (_FILE, _DIRECTORY):
                raise CliError(f"{sandbox}:{path} is neither a file nor a directory")
            name = _own_name(path, info.path)
            if name:
                check_name(name)
            elif info.type == _FILE:
                raise CliError(f"{sandbox}:{path} is a file, and not a directory")
            place, parts = _local_target(info, name, destination)
            try:
                tree = LocalTree(place)
            except OSError as error:
                raise CliError(f"{place}: {error.strerror}") from None
            total = info.size_bytes if info.type == _FILE else None
            try:
                with self._transfers(f"from {sandbox}:{path}", total) as transfers:
                    if info.type == _FILE:
                        transfers.add(Download(sandbox, info, tree, parts))
                    else:
                        _download_tree(transfers, remote, info, tree, parts)
                    return _finish(transfers)
            finally:
                tree.close()

    @contextlib.contextmanager
    def _transfers(self, what: str, total: int | None) -> Iterator[Transfers]:
        with (
            progress(f"copying {what}", total, "bytes") as advance,
            Transfers(self._settings, advance) as transfers,
        ):
            yield transfers


def _finish(transfers: Transfers) -> Copied:
    transfers.finish()
    return Copied(transfers.files, transfers.bytes, transfers.failures)


def _own_name(path: str, resolved: str = "") -> str:
    """Return the name under which a tree is put into a directory; empty: its contents are."""
    if path.endswith("/.") or path == ".":
        return ""
    name = path.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        name = resolved.rstrip("/").rpartition("/")[2]
    return "" if name in (".", "..") else name


# ── The sandbox's side ───────────────────────────────────────────────────────────────────────


class Remote:
    """What one sandbox has."""

    def __init__(self, client: Client, sandbox: str) -> None:
        self._client = client
        self.sandbox = sandbox

    def find(self, path: str) -> pb.FileInfo | None:
        """Return what is at a path, links followed; None: nothing is.

        Its own path is where the last link led.
        """
        for _ in range(_LINKS_MAX):
            request = pb.StatFileRequest(sandbox=self.sandbox, path=path)
            try:
                info = self._client.call(lambda stubs: stubs.sandboxes.StatFile, request)
            except RemoteError as error:
                if error.code == "FILE_NOT_FOUND":
                    return None
                raise
            if info.type != _LINK:
                # Not the server's word for it: `..` behind a link is the kernel's to resolve.
                info.path = path
                return info
            target = info.link_target
            parent = path.rstrip("/").rpartition("/")[0]
            path = target if target.startswith("/") else f"{parent}/{target}"
        raise CliError(f"{self.sandbox}:{path}: too many links")

    def source(self, path: str) -> pb.FileInfo:
        """Return what is at a path.

        Raises:
            CliError: Nothing is.
        """
        info = self.find(path)
        if info is None:
            raise CliError(f"{self.sandbox}:{path}: no such file")
        return info

    def file_target(self, path: str, name: str) -> str:
        """Return where a file goes: into the directory at a path, or to that path."""
        info = self.find(path)
        if info is not None and info.type == _DIRECTORY:
            if name == "the input":
                raise CliError(f"{self.sandbox}:{path} is a directory; name the file to write")
            return f"{info.path.rstrip('/')}/{name}"
        if path.endswith(("/", "/.")):
            raise CliError(f"{self.sandbox}:{path}: no such directory")
        return path if info is None else info.path

    def tree_target(self, path: str, name: str) -> str:
        """Return where a tree goes: into the directory at a path, or to that path."""
        info = self.find(path)
        if info is None:
            return path.removesuffix("/.").rstrip("/") or "/"
        if info.type != _DIRECTORY:
            raise CliError(f"{self.sandbox}:{path} is a file, and SRC is a directory")
        return f"{info.path.rstrip('/')}/{name}" if name else info.path

    def make_directory(self, path: str, mode: int) -> None:
        """Make a directory, whose parent must exist; one that exists is success."""
        parent = self.find(path.rstrip("/").rpartition("/")[0] or "/")
        if parent is None:
            raise _missing(self.sandbox, path)
        self.add_directory(path, mode)

    def add_directory(self, path: str, mode: int) -> None:
        """Make a directory in one that exists; one that exists is success."""
        request = pb.MakeDirectoryRequest(
            sandbox=self.sandbox, path=path, parents=True, mode=mode & _MODE_BITS | 0o700
        )
        self._client.call(lambda stubs: stubs.sandboxes.MakeDirectory, request)

    def list(self, path: str) -> list[pb.FileInfo]:
        """Return what is in a directory."""
        request = pb.ListFilesRequest(sandbox=self.sandbox, path=path)
        return list(self._client.call(lambda stubs: stubs.sandboxes.ListFiles, request).files)


def _missing(sandbox: str, path: str) -> CliError:
    return CliError(f"{sandbox}:{path}: the directory that it would be in is missing")


# ── Trees ────────────────────────────────────────────────────────────────────────────────────


def _upload_tree(transfers: Transfers, remote: Remote, source: str, target: str) -> None:
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        directory = os.path.join(source, *parts)
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    below = (*parts, entry.name)
                    try:
                        if _upload_entry(transfers, remote, entry, "/".join((target, *below))):
                            waiting.append(below)
                    except (PrismError, OSError, UnicodeError) as error:
                        transfers.fail(entry.path, error)
        except OSError as error:
            transfers.fail(directory, error)


def _upload_entry(
    transfers: Transfers, remote: Remote, entry: "os.DirEntry[str]", target: str
) -> bool:
    """Copy what is in a directory; True: it is one itself, to be walked."""
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        remote.add_directory(target, stat.S_IMODE(status.st_mode))
        return True
    if stat.S_ISLNK(status.st_mode):
        transfers.add(MakeLink(remote.sandbox, target, os.readlink(entry.path), entry.path))
    elif stat.S_ISREG(status.st_mode):
        transfers.add(_upload(remote.sandbox, target, entry.path, status, followed=False))
    else:
        raise CliError("not a regular file, a directory or a link; it is left out")
    return False


def _local_target(info: pb.FileInfo, name: str, destination: str) -> tuple[str, tuple[str, ...]]:
    """Return a directory that exists, and where below it the copy goes."""
    if os.path.isdir(destination):
        return destination, (name,) if name else ()
    if os.path.islink(destination):
        # The user named it: what it leads to is meant.
        destination = os.path.realpath(destination)
    if info.type == _DIRECTORY and os.path.exists(destination):
        raise CliError(f"{destination} is a file, and SRC is a directory")
    if info.type == _FILE and destination.endswith(("/", "/.")):
        raise CliError(f"{destination}: no such directory")
    parent, name = os.path.split(destination.removesuffix("/.").rstrip("/"))
    return parent or ".", (name,)


def _download_tree(
    transfers: Transfers,
    remote: Remote,
    top: pb.FileInfo,
    tree: LocalTree,
    prefix: tuple[str, ...],
) -> None:
    try:
        tree.make_directory(prefix, top.mode)
    except OSError as error:
        raise CliError(f"{'/'.join(prefix)}: {error.strerror}") from None
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        directory = "/".join((top.path.rstrip("/"), *parts)) or "/"
        try:
            entries = remote.list(directory)
        except (PrismError, UnicodeError) as error:
            transfers.fail(f"{remote.sandbox}:{directory}", error)
            continue
        for info in entries:
            name = info.path.rpartition("/")[2]
            info.path = f"{directory.rstrip('/')}/{name}"
            try:
                check_name(name)
                if _download_entry(transfers, remote, info, tree, prefix, (*parts, name)):
                    waiting.append((*parts, name))
            except (PrismError, OSError, UnicodeError) as error:
                transfers.fail(f"{remote.sandbox}:{info.path}", error)


def _download_entry(
    transfers: Transfers,
    remote: Remote,
    info: pb.FileInfo,
    tree: LocalTree,
    prefix: tuple[str, ...],
    parts: tuple[str, ...],
) -> bool:
    """Copy what is in a directory; True: it is one itself, to be walked."""
    if info.type == _DIRECTORY:
        tree.make_directory(prefix + parts, info.mode)
        return True
    if info.type == _FILE:
        transfers.add(Download(remote.sandbox, info, tree, prefix + parts))
    elif info.type == _LINK:
        unclear = {"\ufffd", "\0"} & set(info.link_target)
        if unclear or leads_out(parts[:-1], info.link_target):
            raise CliError(
                f"a link to {printable(info.link_target)}, which leads outside of what is copied; "
                "it is left out"
            )
        tree.make_link(prefix + parts, info.link_target)
        transfers.files += 1
    else:
        raise CliError("not a regular file, a directory or a link; it is left out")
    return False


# ── Jobs ─────────────────────────────────────────────────────────────────────────────────────


def _open_stdin() -> Source:
    return Source(0)


def _upload(
    sandbox: str, target: str, path: str, status: os.stat_result, *, followed: bool
) -> "Upload":
    def open_file() -> Source:
        # It may be another by now: nothing is followed that was not, and no pipe is waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if followed else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CliError("not a regular file any more")
        return Source(descriptor)

    moment = Timestamp()
    moment.FromNanoseconds(status.st_mtime_ns)
    # 0 would ask for the default, which lets others read it.
    mode = status.st_mode & _MODE_BITS or stat.S_IRUSR
    return Upload(sandbox, target, open_file, mode, moment, path)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to be written in a sandbox."""

    sandbox: str
    target: str
    open_source: Callable[[], Source]
    mode: int
    modify_time: Timestamp | None
    name: str
    attempts: int = 5

    def run(self, flight: Flight) -> None:
        """Send it."""
        first = pb.WriteFileRequest(
            sandbox=self.sandbox,
            path=self.target,
            mode=self.mode,
            modify_time=self.modify_time,
        )
        try:
            flight.remote(
                lambda stubs: send(flight, stubs, first, self.open_source()), self.attempts
            )
        except RemoteError as error:
            if error.code == "FILE_NOT_FOUND":
                raise _missing(self.sandbox, self.target) from None
            raise


@dataclass(frozen=True, slots=True)
class MakeLink:
    """A link to be made in a sandbox."""

    sandbox: str
    path: str
    target: str
    name: str

    def run(self, flight: Flight) -> None:
        """Make it."""
        request = pb.MakeLinkRequest(sandbox=self.sandbox, path=self.path, target=self.target)
        flight.client.call(lambda stubs: stubs.sandboxes.MakeLink, request)


def _nanoseconds_of(moment: Timestamp) -> int:
    """Return a time that a file can have, whatever a node says."""
    seconds = min(max(moment.seconds, _TIME_MIN_S), _TIME_MAX_S)
    return seconds * 10**9 + min(max(moment.nanos, 0), 10**9 - 1)


@dataclass(frozen=True, slots=True)
class Download:
    """A file to be written on this machine."""

    sandbox: str
    info: pb.FileInfo
    tree: LocalTree
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """What failures are said of."""
        return f"{self.sandbox}:{self.info.path}"

    def run(self, flight: Flight) -> None:
        """Read it."""
        request = pb.ReadFileRequest(sandbox=self.sandbox, path=self.info.path)
        modified_ns = _nanoseconds_of(self.info.modify_time)

        def attempt(stubs: Stubs) -> None:
            with self.tree.draft(self.parts, self.info.mode, modified_ns) as file:
                receive(flight, stubs, request, lambda data: write_all(file, data))

        flight.remote(attempt)


@dataclass(frozen=True, slots=True)
class Print:
    """A file to be written to standard output."""

    sandbox: str
    path: str

    @property
    def name(self) -> str:
        """What failures are said of."""
        return f"{self.sandbox}:{self.path}"

    def run(self, flight: Flight) -> None:
        """Read it. What has gone out cannot be taken back, so it is not begun anew."""
        request = pb.ReadFileRequest(sandbox=self.sandbox, path=self.path)
        flight.remote(
            lambda stubs: receive(flight, stubs, request, lambda data: write_all(1, data)),
            attempts=1,
        )
