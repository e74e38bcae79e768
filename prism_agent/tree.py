"""A sandbox's files, reached from outside with the rights of the sandbox's own user and no others.

Everything here blocks, and runs in a thread that has become that user for good (`become`). A path
is resolved by the kernel as if the sandbox's root were `/`, so no `..` and no link leads out; what
is made, renamed or removed is named by one component below an open directory, so nothing that the
sandbox changes meanwhile leads elsewhere. Nothing but regular files is ever opened for data.
"""

import contextlib
import ctypes
import errno
import os
import platform
import secrets
import stat
from collections.abc import Callable
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.file_errors import explained
from prism_common.errors import (
    InvalidArgumentError,
    NotServedError,
    SandboxGoneError,
    WrongStateError,
)
from prism_common.limits import PATH_LENGTH_MAX
from prism_common.names import shorten

_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_CLONE_FS: Final = 0x200
#: setgroups, setresgid, setresuid. The C library's functions would change every thread.
_BECOME_CALLS: Final = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}
#: A resolution is refused with EAGAIN when something moved meanwhile.
_RESOLVE_ATTEMPTS: Final = 64
#: Files that are the kernel's: /proc/1/mem is regular by its mode, and no file of the sandbox.
_KERNEL_FILE_SYSTEMS: Final = frozenset(
    {
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x1CD1,  # devpts
        0x19800202,  # mqueue
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xCAFE4A11,  # bpf
        0x42494E4D,  # binfmt_misc
        0x6165676C,  # pstore
        0x6E736673,  # nsfs
    }
)
#: Times that a Timestamp has room for, the years 1 to 9999; a sandbox's file may have any.
_TIME_MIN_NS, _TIME_MAX_NS = -62_135_596_800 * 10**9, 253_402_300_799 * 10**9

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def become(uid: int) -> None:
    """Make this thread, for good, one of a user without capabilities; 0: it is one already.

    Raises:
        NotServedError: It cannot be done on this machine; nothing was done with other rights.
    """
    if _libc.unshare(_CLONE_FS) != 0:
        raise NotServedError("files: this thread cannot have an umask of its own, so it")
    os.umask(0o022)
    if os.geteuid() != 0:
        return
    calls = _BECOME_CALLS.get(platform.machine())
    if calls is None or uid == 0:
        raise NotServedError(f"files of a sandbox as user {uid} on {platform.machine()}")
    user = ctypes.c_long(uid)
    _call(calls[0], ctypes.c_long(0), None)
    _call(calls[1], user, user, user)
    _call(calls[2], user, user, user)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (uid,) * 3 or os.getgroups():
        raise NotServedError("files: this thread did not become the sandbox's user, so it")


def parts_of(path: str, field: str) -> list[str]:
    """Return the components of an absolute path.

    Raises:
        InvalidArgumentError: It is none, or too long.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(f"{field}: {shorten(path)} is not an absolute path", field=field)
    if len(path.encode()) >= PATH_LENGTH_MAX:
        raise InvalidArgumentError(
            f"{field}: {shorten(path)} is longer than {PATH_LENGTH_MAX - 1} bytes", field=field
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if len(parts) > limits.PATH_PARTS_MAX:
        raise InvalidArgumentError(
            f"{field}: {shorten(path)} has more than {limits.PATH_PARTS_MAX} parts", field=field
        )
    return parts


def _join(parts: list[str]) -> str:
    return "/" + "/".join(parts)


def _text_of(name: str) -> str:
    """Return a name as a proto can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def info_of(
    path: str, status: os.stat_result, name: str = "", directory: int | None = None
) -> sandbox_pb2.FileInfo:
    """Return a path as the API shows it; a link is read as `name` in `directory`."""
    kind = sandbox_pb2.FILE_TYPE_OTHER
    if stat.S_ISREG(status.st_mode):
        kind = sandbox_pb2.FILE_TYPE_REGULAR
    elif stat.S_ISDIR(status.st_mode):
        kind = sandbox_pb2.FILE_TYPE_DIRECTORY
    elif stat.S_ISLNK(status.st_mode):
        kind = sandbox_pb2.FILE_TYPE_SYMLINK
    info = sandbox_pb2.FileInfo(
        path=_text_of(path),
        type=kind,
        size_bytes=status.st_size,
        mode=stat.S_IMODE(status.st_mode),
    )
    info.modify_time.FromNanoseconds(min(max(status.st_mtime_ns, _TIME_MIN_NS), _TIME_MAX_NS))
    if kind == sandbox_pb2.FILE_TYPE_SYMLINK and directory is not None:
        with contextlib.suppress(OSError):  # it is none any more
            info.link_target = _text_of(os.readlink(name, dir_fd=directory))
    return info


class Tree:
    """The files of one sandbox, for one call.

    Owns every descriptor that it opens, so that a caller that is cancelled leaves none.

    Args:
        root: Descriptor of the sandbox's root directory; closed with the tree.
        ended: True once the sandbox has ended: a long piece of work stops then.
    """

    def __init__(self, root: int, ended: Callable[[], bool]) -> None:
        self._root = root
        self._ended = ended
        self._open: list[int] = [root]
        #: A draft under a name of its own: directory and name.
        self._draft: tuple[int, str] | None = None

    def close(self) -> None:
        """Close all, and remove what was not finished."""
        if self._draft is not None:
            directory, name = self._draft
            self._draft = None
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
        while self._open:
            os.close(self._open.pop())

    # ── resolving ──

    def _keep(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor

    def _drop(self, descriptor: int) -> None:
        self._open.remove(descriptor)
        os.close(descriptor)

    def _resolve(self, path: str, flags: int, directory: int | None = None) -> int:
        """Return a descriptor that only names what is at a path, without opening it."""
        if self._ended():
            raise SandboxGoneError("the sandbox ended")
        how = _OpenHow(
            os.O_PATH | os.O_CLOEXEC | flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS
        )
        for attempt in range(_RESOLVE_ATTEMPTS):
            try:
                descriptor = _call(
                    _OPENAT2,
                    ctypes.c_long(self._root if directory is None else directory),
                    ctypes.c_char_p(os.fsencode(path)),
                    ctypes.byref(how),
                    ctypes.c_size_t(ctypes.sizeof(how)),
                )
                break
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    raise NotServedError("files on a kernel before 5.6") from None
                if error.errno != errno.EAGAIN or attempt == _RESOLVE_ATTEMPTS - 1:
                    raise
        self._keep(descriptor)
        buffer = ctypes.create_string_buffer(256)
        if _libc.fstatfs(ctypes.c_int(descriptor), buffer) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        kind = ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF
        if kind in _KERNEL_FILE_SYSTEMS:
            raise WrongStateError(
                f"{shorten(path)}: it is the kernel's, and not a file of the sandbox",
                field="path",
                reason="FILE_OF_THE_KERNEL",
            )
        return descriptor

    def _parent(self, path: str, field: str) -> tuple[int, str]:
        """Return the directory that holds a path's last name, and the name."""
        parts = parts_of(path, field)
        if not parts or parts[-1] == "..":
            raise InvalidArgumentError(f"{field}: {shorten(path)} has no name", field=field)
        return self._resolve(_join(parts[:-1]), os.O_DIRECTORY), parts[-1]

    def _reopen(self, descriptor: int, flags: int) -> int:
        """Open what a descriptor names: what was looked at is what is opened."""
        return self._keep(
            os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
        )

    # ── operations ──

    def describe(self, path: str) -> sandbox_pb2.FileInfo:
        """Describe a path; a link is described and not followed."""
        shown = _join(parts_of(path, "path"))
        with explained(path):
            named = self._resolve(shown, os.O_NOFOLLOW)
            return info_of(shown, os.fstat(named), "", named)

    def list_directory(self, path: str) -> list[sandbox_pb2.FileInfo]:
        """Return what is in a directory, in order of name."""
        parts = parts_of(path, "path")
        shown = _join(parts)
        found: list[sandbox_pb2.FileInfo] = []
        size = 0
        with explained(path):
            named = self._resolve(shown, os.O_DIRECTORY)
            directory = self._reopen(named, os.O_RDONLY | os.O_DIRECTORY)
            with os.scandir(directory) as entries:
                for entry in entries:
                    # Names that come and go faster than we look would keep us here for ever.
                    if self._ended():
                        raise SandboxGoneError("the sandbox ended")
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    info = info_of(_join([*parts, entry.name]), status, entry.name, directory)
                    size += info.ByteSize() + 8
                    if len(found) >= limits.LIST_ENTRIES_MAX or size > limits.LIST_BYTES_MAX:
                        raise WrongStateError(
                            f"{shorten(path)} has too many entries to list "
                            f"({limits.LIST_ENTRIES_MAX} at most); list it by an exec",
                            field="path",
                            reason="TOO_MANY_FILES",
                        )
                    found.append(info)
        return sorted(found, key=lambda each: each.path)

    def make_directory(self, path: str, parents: bool, mode: int) -> sandbox_pb2.FileInfo:
        """Make a directory, and with `parents` those above it too, each of the usual mode."""
        parts = parts_of(path, "path")
        with explained(path):
            for length in range(1, len(parts)) if parents else ():
                self._make_one(_join(parts[:length]), exist_ok=True)
            made = (parts or not parents) and self._make_one(path, exist_ok=parents)
            named = self._resolve(_join(parts), os.O_DIRECTORY)
            if made and mode:
                os.chmod(f"/proc/self/fd/{named}", mode)
            return info_of(_join(parts), os.fstat(named))

    def _make_one(self, path: str, exist_ok: bool) -> bool:
        """Make a directory; False: with `exist_ok`, there is one."""
        if exist_ok:
            try:
                self._drop(self._resolve(path, os.O_DIRECTORY))
            except FileNotFoundError:
                pass
            else:
                return False
        directory, name = self._parent(path, "path")
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
            made = True
        except FileExistsError:
            # Somebody was faster, or there is a link that leads nowhere: the next step tells.
            if not exist_ok:
                raise
            made = False
        self._drop(directory)
        return made

    def make_link(self, path: str, target: str) -> sandbox_pb2.FileInfo:
        """Make a symbolic link; what it holds is not looked at, since nothing follows it here."""
        with explained(path):
            directory, name = self._parent_of_file(path)
            draft = _draft_name()
            os.symlink(target, draft, dir_fd=directory)
            self._draft = (directory, draft)
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
            self._draft = None
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return info_of(_join(parts_of(path, "path")), status, name, directory)

    def move(self, source: str, target: str) -> sandbox_pb2.FileInfo:
        """Rename; a file that is at the target is replaced."""
        with explained(source, "source_path"):
            source_directory, source_name = self._parent(source, "source_path")
            os.stat(source_name, dir_fd=source_directory, follow_symlinks=False)
        with explained(target, "target_path"):
            directory, name = self._parent(target, "target_path")
            os.rename(source_name, name, src_dir_fd=source_directory, dst_dir_fd=directory)
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return info_of(_join(parts_of(target, "target_path")), status)

    def remove(self, path: str, recursive: bool) -> None:
        """Remove a file, a link, or a directory: with all in it, or an empty one."""
        with explained(path):
            directory, name = self._parent(path, "path")
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=directory)
                return
            if recursive:
                self._empty(directory, name, path, depth=1)
            os.rmdir(name, dir_fd=directory)

    def _empty(self, parent: int, name: str, path: str, depth: int) -> None:
        """Remove all that is in a directory. Each is looked at once: what is added stays."""
        if depth > limits.REMOVE_DEPTH_MAX:
            raise WrongStateError(
                f"{shorten(path)}: directories are nested deeper than {limits.REMOVE_DEPTH_MAX}",
                field="path",
                reason="TOO_DEEP",
            )
        named = self._resolve(name, os.O_DIRECTORY | os.O_NOFOLLOW, parent)
        directory = self._reopen(named, os.O_RDONLY | os.O_DIRECTORY)
        with os.scandir(directory) as entries:
            for entry in entries:
                if self._ended():
                    raise SandboxGoneError("the sandbox ended")
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        self._empty(directory, entry.name, path, depth + 1)
                        os.rmdir(entry.name, dir_fd=directory)
                    else:
                        os.unlink(entry.name, dir_fd=directory)
        self._drop(directory)
        self._drop(named)

    # ── contents ──

    def open_read(self, path: str) -> tuple[int, int]:
        """Open a regular file; return its descriptor and its size now."""
        shown = _join(parts_of(path, "path"))
        with explained(path):
            named = self._resolve(shown, 0)
            status = os.fstat(named)
            if not stat.S_ISREG(status.st_mode):
                raise _not_regular(path, status)
            return self._reopen(named, os.O_RDONLY | os.O_NOCTTY), status.st_size

    def begin_write(self, path: str) -> "Draft":
        """Begin a file that takes its place at `path` when it is complete."""
        with explained(path):
            directory, name = self._parent_of_file(path)
            try:
                # Without a name: whatever ends this process, nothing of it is left.
                descriptor = os.open(
                    ".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory
                )
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
                return Draft(self, path, directory, name, self._named_draft(directory), True)
            return Draft(self, path, directory, name, self._keep(descriptor), False)

    def _parent_of_file(self, path: str) -> tuple[int, str]:
        """Return the directory and the name of what may be replaced: a file, a link or nothing."""
        directory, name = self._parent(path, "path")
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
                raise _not_regular(path, status)
        return directory, name

    def _named_draft(self, directory: int) -> int:
        name = _draft_name()
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
        descriptor = self._keep(os.open(name, flags, 0o600, dir_fd=directory))
        self._draft = (directory, name)
        return descriptor

    def place(self, descriptor: int, directory: int, name: str, named: bool) -> None:
        """Give a complete draft its name, in place of what is there."""
        if not named:
            source = f"/proc/self/fd/{descriptor}"
            try:
                os.link(source, name, dst_dir_fd=directory, follow_symlinks=True)
            except FileExistsError:
                draft = _draft_name()
                os.link(source, draft, dst_dir_fd=directory, follow_symlinks=True)
                self._draft = (directory, draft)
            else:
                return
        if self._draft is not None:
            os.rename(self._draft[1], name, src_dir_fd=directory, dst_dir_fd=directory)
            self._draft = None


class Draft:
    """A file that is being written, and that nobody sees yet."""

    def __init__(
        self, tree: Tree, path: str, directory: int, name: str, descriptor: int, named: bool
    ) -> None:
        self._tree = tree
        self._path = path
        self._directory = directory
        self._name = name
        self._descriptor = descriptor
        self._named = named

    def write(self, data: bytes) -> None:
        """Add to it."""
        view = memoryview(data)
        with explained(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def finish(self, mode: int, modified_ns: int | None) -> sandbox_pb2.FileInfo:
        """Put it in its place, as of now or with a time of last change."""
        with explained(self._path):
            os.fchmod(self._descriptor, mode)
            if modified_ns is not None:
                os.utime(self._descriptor, ns=(modified_ns, modified_ns))
            self._tree.place(self._descriptor, self._directory, self._name, self._named)
            return info_of(_join(parts_of(self._path, "path")), os.fstat(self._descriptor))


def _draft_name() -> str:
    return f".prism-{secrets.token_hex(8)}"


def _not_regular(path: str, status: os.stat_result) -> WrongStateError:
    what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    return WrongStateError(
        f"{shorten(path)}: it is {what}", field="path", reason="FILE_NOT_REGULAR"
    )
