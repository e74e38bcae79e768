"""The embedded image `host`: the node's system directories, and an /etc with nothing to hide."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Final

#: User and group of everything in a sandbox, as seen inside.
USER_ID: Final = 1000

_USERS: Final = """root:x:0:0:root:/root:/usr/sbin/nologin
sandbox:x:1000:1000:sandbox:/workspace:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP: Final = "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n"
_NSSWITCH: Final = """passwd: files
group: files
hosts: files dns
networks: files
protocols: files
services: files
"""
_WRITTEN: Final = {
    "passwd": _USERS,
    "group": _GROUP,
    "nsswitch.conf": _NSSWITCH,
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "hostname": "sandbox\n",
    "resolv.conf": "",
    "gitconfig": "[safe]\n\tdirectory = *\n",
}
#: What programs need of the host's /etc. Nothing here holds secrets; /etc/ssl/private is not in it.
_COPIED: Final = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl/certs", "ssl/openssl.cnf",
    "ca-certificates.conf", "os-release", "debian_version", "localtime", "timezone", "mime.types",
    "protocols", "services", "networks", "bash.bashrc", "profile", "inputrc", "python3",
    "python3.11", "python3.12", "python3.13", "perl", "terminfo", "fonts", "locale.alias",
    "magic", "magic.mime", "shells",
)  # fmt: skip
#: Read-only inside; a link stays a link (Debian's /bin is one to usr/bin).
SYSTEM_DIRECTORIES: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")


def build_etc(parent: Path) -> Path:
    """Return a directory for /etc; one that is there is used again, for sandboxes hold it.

    Its name holds a digest of what it was made from, so that an update of the host makes a new one.
    """
    target = parent / f"etc-{_fingerprint()}"
    if target.is_dir():
        return target
    parent.mkdir(mode=0o700, exist_ok=True)
    draft = parent / ".etc.new"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in _COPIED:
        _copy(Path("/etc") / name, draft / name)
    for name, content in _WRITTEN.items():
        (draft / name).write_text(content, encoding="utf-8")
    (draft / "mtab").symlink_to("/proc/mounts")
    for directory, _, files in os.walk(draft):
        Path(directory).chmod(0o755)
        for name in files:
            path = Path(directory) / name
            if not path.is_symlink():
                path.chmod(0o644)
    draft.rename(target)
    return target


def _fingerprint() -> str:
    digest = hashlib.sha256(repr(sorted(_WRITTEN.items())).encode())
    for name in _COPIED:
        try:
            status = (Path("/etc") / name).stat()
        except OSError:
            continue
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a tree; links stay links, and what cannot be read is left out."""
    if source.is_symlink() and source.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=_unreadable, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)


def _unreadable(directory: str, names: list[str]) -> list[str]:
    """Leave out what is not a file for everybody: others may not read it on the host either."""
    left_out = []
    for name in names:
        path = Path(directory) / name
        if path.is_symlink():
            continue
        try:
            mode = path.stat().st_mode
        except OSError:
            left_out.append(name)
            continue
        if not mode & 0o004 or not (path.is_file() or path.is_dir()):
            left_out.append(name)
    return left_out


def system_arguments() -> list[str]:
    """Return bwrap's arguments for the system directories."""
    arguments: list[str] = []
    for name in SYSTEM_DIRECTORIES:
        path = Path(name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), name]
        elif path.is_dir():
            arguments += ["--ro-bind", name, name]
    return arguments
