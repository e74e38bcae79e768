"""The OCI bundle of a gVisor sandbox: what its own kernel shows to it. Pure, but for the tree."""

import json
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from prism_agent.runtime import image
from prism_agent.runtime.shape import HOSTNAME, HOSTS, write_names

#: Where the launcher shows runsc what of ours it needs; the sandbox's user reaches nothing else.
STAGE: Final = "/tmp"  # noqa: S108
#: Inside: the directory that the supervisor shares with the agent.
SHARED: Final = "/.prism"
SUPERVISOR: Final = "/.prism-supervisor"
#: Of PID 1 alone: to become the sandbox's user for each exec, and to signal what has become it.
_CAPABILITIES: Final = ("CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP")
_NAMESPACES: Final = ("pid", "mount", "ipc", "uts", "user")
_EMPTY: Final = ("dev", "etc", "proc", "run", "sys", "tmp", "var", "workspace", ".prism")
_OOM_SCORE: Final = 500


@dataclass(frozen=True, slots=True)
class Contents:
    """What tells one bundle from another."""

    hostname: str
    #: Users of the host: of the sandbox's kernel and supervisor, and of all else in it.
    kernel_uid: int
    user_uid: int
    small_bytes: int
    arguments: tuple[str, ...]
    resolver: bytes
    #: It was given a network: its kernel is started in that one, and makes none.
    networked: bool


def build_root(parent: Path, supervisor: Path) -> Path:
    """Return a root directory without contents but for the supervisor; shared and never written.

    Its name holds a digest of what it was made from: a new supervisor gets a new one, and sandboxes
    of an earlier agent keep theirs.
    """
    program = supervisor.read_bytes()
    links = {name: path.readlink() for name in image.SYSTEM_DIRECTORIES
             if (path := Path(name)).is_symlink()}  # fmt: skip
    places = [name for name in image.SYSTEM_DIRECTORIES if _is_mounted(name)]
    digest = sha256(program + repr((sorted(links.items()), places, _EMPTY)).encode())
    target = parent / f"gvisor-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    parent.mkdir(mode=0o700, exist_ok=True)
    draft = parent / ".gvisor.new"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in (*_EMPTY, *(place.lstrip("/") for place in places)):
        (draft / name).mkdir()
    for name, aim in links.items():
        (draft / name.lstrip("/")).symlink_to(aim)
    (draft / "var/tmp").symlink_to("/tmp")  # noqa: S108
    inside = draft / SUPERVISOR.lstrip("/")
    inside.write_bytes(program)
    for path in (draft, *(path for path in draft.iterdir() if not path.is_symlink())):
        path.chmod(0o755)
    draft.rename(target)
    return target


def _is_mounted(name: str) -> bool:
    return Path(name).is_dir() and not Path(name).is_symlink()


def write_bundle(directory: Path, contents: Contents) -> None:
    """Write what `runsc run --bundle` reads, and what of /etc is the sandbox's own."""
    # The file server is the sandbox's kernel's user, and mounts two of these.
    directory.chmod(0o755)
    write_names(directory, contents.hostname)
    (directory / "resolv.conf").write_bytes(contents.resolver)
    (directory / "config.json").write_text(json.dumps(config(contents)), encoding="utf-8")
    for each in directory.iterdir():
        each.chmod(0o644)


def arguments_in(directory: Path) -> tuple[str, ...]:
    """Return what a bundle's supervisor was started with."""
    content = json.loads((directory / "config.json").read_bytes())
    return tuple(content["process"]["args"])


def config(contents: Contents) -> dict[str, Any]:
    """Return the bundle's config.json."""
    mapping = [
        {"containerID": 0, "hostID": contents.kernel_uid, "size": 1},
        {"containerID": image.USER_ID, "hostID": contents.user_uid, "size": 1},
    ]
    capabilities = list(_CAPABILITIES)
    namespaces = _NAMESPACES if contents.networked else (*_NAMESPACES, "network")
    return {
        "ociVersion": "1.0.0",
        "hostname": contents.hostname,
        "root": {"path": f"{STAGE}/root", "readonly": True},
        "process": {
            "args": list(contents.arguments),
            "cwd": "/",
            "env": [],
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": True,
            "oomScoreAdj": _OOM_SCORE,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "mounts": _mounts(contents),
        "linux": {
            "namespaces": [{"type": each} for each in namespaces],
            "uidMappings": mapping,
            "gidMappings": mapping,
        },
    }


def _mounts(contents: Contents) -> list[dict[str, Any]]:
    small = [f"size={contents.small_bytes}", "mode=1777", "nosuid", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": small},  # noqa: S108
        *(_bind(name, name, "ro") for name in image.SYSTEM_DIRECTORIES if _is_mounted(name)),
        _bind(f"{STAGE}/etc", "/etc", "ro"),
        _bind(f"{STAGE}/bundle/{HOSTS}", "/etc/hosts", "ro"),
        _bind(f"{STAGE}/bundle/{HOSTNAME}", "/etc/hostname", "ro"),
        _bind(f"{STAGE}/bundle/resolv.conf", "/etc/resolv.conf", "ro"),
        _bind(f"{STAGE}/workspace", "/workspace", "rw"),
        _bind(f"{STAGE}/small", "/tmp", "rw"),  # noqa: S108
        _bind(f"{STAGE}/shared", SHARED, "rw"),
    ]


def _bind(source: str, target: str, mode: str) -> dict[str, Any]:
    options = ["bind", mode, "nosuid", "nodev"]
    return {"destination": target, "type": "bind", "source": source, "options": options}
