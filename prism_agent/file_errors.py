"""What the kernel says of a path, as what a caller is told."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from prism_common.errors import (
    AlreadyExistsError,
    DiskFullError,
    InvalidArgumentError,
    NotFoundError,
    PrismError,
    WrongStateError,
)
from prism_common.names import shorten

_WRONG: Final = {
    errno.EACCES: "the sandbox's user may not do that",
    errno.EPERM: "the sandbox's user may not do that",
    errno.EROFS: "it is read-only",
    errno.ENOTDIR: "something in the path is not a directory",
    errno.EISDIR: "it is a directory",
    errno.ENOTEMPTY: "the directory is not empty",
    errno.ELOOP: "too many links, or one that may not be followed",
    errno.EXDEV: "source and target are on different file systems of the sandbox; copy it instead",
    errno.EBUSY: "something is mounted there",
    errno.EAGAIN: "the path changes all the time",
    errno.ETXTBSY: "it is being executed",
}
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM})


@contextlib.contextmanager
def explained(path: str, field: str = "path") -> Iterator[None]:
    """Turn what the kernel says of a path into what a caller is told."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path, field) from None


def _explain(error: OSError, path: str, field: str) -> PrismError:
    code = error.errno or 0
    where = shorten(path)
    if code == errno.ENOENT:
        return NotFoundError(f"{where}: no such file", field=field, reason="FILE_NOT_FOUND")
    if code == errno.EEXIST:
        return AlreadyExistsError(f"{where} exists already", field=field, reason="FILE_EXISTS")
    if code in (errno.ENAMETOOLONG, errno.EINVAL):
        text = "a name in it is too long" if code == errno.ENAMETOOLONG else "not possible with it"
        return InvalidArgumentError(f"{field}: {where}: {text}", field=field)
    if code in _FULL:
        return DiskFullError(f"{where}: no room is left in the sandbox")
    text = _WRONG.get(code, os.strerror(code))
    return WrongStateError(f"{where}: {text}", field=field, reason="FILE_" + _name(code))


def _name(code: int) -> str:
    return errno.errorcode.get(code, "ERROR")
