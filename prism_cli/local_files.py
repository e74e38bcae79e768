"""Files of this machine that are written by names from a sandbox, which may be hostile.

Everything is named by one component below an open directory, and no link is followed on the way:
whatever a sandbox calls its files, and whatever links are in the destination, nothing is written
outside of the directory that the user named.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from prism_cli.errors import CliError

#: A directory as a place only: it need not be readable.
_PLACE: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MODE_BITS: Final = 0o777
#: A directory that its owner may not write could not be filled.
_OWNER: Final = 0o700


def check_name(name: str) -> None:
    """Refuse what is not the name of a file in a directory.

    Raises:
        CliError: It is none.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise CliError("the node sent a name that no file can have; it is left out")
    if "\ufffd" in name:
        raise CliError("its name is not UTF-8, so it cannot be asked for")


def leads_out(directory: Sequence[str], target: str) -> bool:
    """Return whether a link in a directory of a tree may lead out of that tree.

    Only leading `..` can be counted: after a name, which may be of another link, they cannot.
    """
    if target.startswith("/"):
        return True
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    return ups > len(directory) or ".." in parts[ups:]


class LocalTree:
    """A directory of this machine to write below.

    Args:
        path: The user's own word for it: links in it are followed.
    """

    def __init__(self, path: str) -> None:
        self._root = os.open(path, _PLACE)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._root)

    @contextlib.contextmanager
    def directory(self, parts: Sequence[str]) -> Iterator[int]:
        """Yield a descriptor of a directory below.

        Raises:
            OSError: It is none, or there is a link on the way.
        """
        here = os.dup(self._root)
        try:
            for part in parts:
                below = os.open(part, _PLACE | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

    def make_directory(self, parts: Sequence[str], mode: int) -> None:
        """Make a directory; one that exists is success."""
        if not parts:
            return
        with self.directory(parts[:-1]) as parent:
            try:
                os.mkdir(parts[-1], _OWNER | mode & _MODE_BITS, dir_fd=parent)
            except FileExistsError:
                # A link to a directory is in the way as much as a file is.
                os.close(os.open(parts[-1], _PLACE | os.O_NOFOLLOW, dir_fd=parent))

    def make_link(self, parts: Sequence[str], target: str) -> None:
        """Make a symbolic link in place of a file or link that is there."""
        with self.directory(parts[:-1]) as parent:
            _check_replaceable(parent, parts[-1])
            temporary = _temporary_name()
            os.symlink(target, temporary, dir_fd=parent)
            try:
                os.rename(temporary, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                os.unlink(temporary, dir_fd=parent)
                raise

    @contextlib.contextmanager
    def draft(self, parts: Sequence[str], mode: int, modified_ns: int) -> Iterator[int]:
        """Yield a descriptor to write a file to, which takes its place when the block succeeds."""
        with self.directory(parts[:-1]) as parent:
            _check_replaceable(parent, parts[-1])
            temporary = _temporary_name()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
            try:
                yield descriptor
                os.fchmod(descriptor, mode & _MODE_BITS)
                os.utime(descriptor, ns=(modified_ns, modified_ns))
                os.rename(temporary, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                os.unlink(temporary, dir_fd=parent)
                raise
            finally:
                os.close(descriptor)


def _check_replaceable(parent: int, name: str) -> None:
    """Refuse to replace what is neither a file nor a link: a directory, a device, a pipe."""
    with contextlib.suppress(FileNotFoundError):
        kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind):
            raise CliError("there is a directory in its place")
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise CliError("what is in its place is no regular file; to write into it, copy to -")


def _temporary_name() -> str:
    return f".prism-cp-{secrets.token_hex(8)}"
