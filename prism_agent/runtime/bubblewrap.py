"""Sandboxes of Linux namespaces, made by bubblewrap: works with root and without it.

As root, bwrap would keep every capability, so it is run as an unprivileged user of the sandbox's
own. It never dies with the agent: no --die-with-parent, a session of its own, no inherited pipes.
"""

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits as agent_limits
from prism_agent import seccomp
from prism_agent.cgroups import PROCESSES_OWN, Cgroups
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal, boot_id
from prism_agent.network.egress import namespace_arguments, resolver_configuration
from prism_agent.record import Record
from prism_agent.runtime import host, image
from prism_agent.runtime.base import Probe, Process, Running, StartError, Usage
from prism_agent.runtime.contained import START_LOG, Contained
from prism_agent.runtime.mount_namespace import MountNamespace
from prism_agent.runtime.shape import (
    cgroup_limits,
    limits_of,
    names,
    small_bytes,
    workspace_bytes,
    write_names,
)
from prism_agent.runtime.spawn import Child, Descriptors, spawn
from prism_agent.runtime.trial import try_one
from prism_common.errors import PrismError

SUPERVISOR: Final = Path(__file__).parent.parent / "supervisor" / "prism-supervisor"
_INSIDE: Final = "/.prism-supervisor"
SOCKET: Final = "control"
#: Each exec takes five, and the supervisor a few.
_SUPERVISOR_FILES: Final = 8192
_BACKLOG: Final = 4
#: Where the launcher shows what the sandbox's user may not reach by its own path.
_STAGE: Final = Path("/tmp")  # noqa: S108


class BubblewrapRuntime(Contained):
    """See the module."""

    name = "bubblewrap"

    def __init__(self, data: DataDirectory, journal: Journal, cgroups: Cgroups | None) -> None:
        super().__init__(journal, cgroups)
        self._node_id = data.state.node_id
        self._image = data.path / "image"
        self._root = os.geteuid() == 0
        self._uids = host.uid_range(self._node_id) if self._root else range(0)
        self._uids_used = {record.uid for record in journal.load()[0].values()}
        self._filters = (b"", b"")
        self._etc = Path()
        self._bwrap = shutil.which("bwrap") or ""
        #: What starts copy; None without root, where bwrap copies the agent's own.
        self._namespace: MountNamespace | None = None
        #: The bwraps that we have started, by tag; those of an earlier process are no children.
        self._children: dict[str, Child] = {}

    # ── probe ──

    async def probe(self) -> Probe:
        """Start one sandbox, run something in it, remove it."""
        problem = self._missing()
        if problem:
            return Probe(ready=False, message=problem)
        try:
            version = await asyncio.to_thread(self._prepare)
            await try_one(self, self._journal)
        except (
            seccomp.SeccompError,
            OSError,
            subprocess.SubprocessError,
            StartError,
            PrismError,
        ) as error:
            return Probe(ready=False, message=str(error))
        message = "" if self._root else "without root: /workspace is lost when a sandbox is stopped"
        return Probe(ready=True, message=message, version=version)

    def _missing(self) -> str:
        if not self._bwrap:
            return "bwrap is not installed (Debian: apt install bubblewrap)"
        if not os.access(SUPERVISOR, os.X_OK):
            return f"{SUPERVISOR} is missing: install the package again, with a C compiler"
        if self._root and not self._uids:
            return "too few uids are mapped in this user namespace"
        return ""

    def _prepare(self) -> str:
        self._filters = seccomp.build_filters()
        self._etc = image.build_etc(self._image)
        done = subprocess.run(  # noqa: S603
            [self._bwrap, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        match = re.search(r"(\d+)\.(\d+)(\.\d+)?", done.stdout)
        if match is None or (int(match[1]), int(match[2])) < (0, 8):
            raise OSError(0, f"bwrap {done.stdout.strip()} is too old: 0.8 is needed")
        if self._root and self._namespace is None:
            self._namespace = MountNamespace(SUPERVISOR, Path(self._bwrap))
        return match[0]

    # ── start ──

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Make it, or start it again with its files."""
        if spec.image not in ("", "host"):
            raise StartError(f"image {spec.image!r} is not known here; use host")
        asked = limits_of(spec)
        self._plan(record)
        return await self._start(record, asked, renamable=False)

    async def prepare(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Start one that the journal does not know: an agent that is killed leaves it to a sweep.

        What its files in /etc say of its name can be written afterwards (`write_names`).

        Raises:
            StartError: It does not run; something of it may be left.
        """
        self._plan(record)
        return await self._start(record, limits_of(spec), renamable=True)

    def _plan(self, record: Record) -> None:
        if self._root and not record.uid:
            record.uid = self._allocate_uid()
        record.cgroup = (record.prepared_as or record.sandbox_id) if self._cgroups else ""
        record.mounted = self._root
        record.boot_id = boot_id()

    async def _start(self, record: Record, asked: sandbox_pb2.Limits, renamable: bool) -> Running:
        loop = asyncio.get_running_loop()
        making = loop.run_in_executor(None, self._make, record, asked, renamable)
        try:
            info, child = await asyncio.shield(making)
        except OSError as error:
            raise StartError(str(error)) from None
        except asyncio.CancelledError:
            # Its thread goes on: whoever removes what it makes must not come before it.
            await asyncio.wait({making})
            if making.exception() is None:
                info, self._children[self._tag(record)] = making.result()
                os.close(info)
            raise
        self._children[self._tag(record)] = child
        pid = await self._read_pid(info, record)
        try:
            process = Process(pid)
        except ProcessLookupError:
            raise StartError(f"it ended at once: {self.explain(record)}") from None
        record.pid, record.pid_start_ticks = pid, process.start_ticks
        return Running(process, self._journal.directory(record.sandbox_id) / SOCKET)

    def _allocate_uid(self) -> int:
        for uid in self._uids:
            if uid not in self._uids_used:
                self._uids_used.add(uid)
                return uid
        raise StartError(f"all {len(self._uids)} uids for sandboxes are in use")

    def _make(
        self, record: Record, asked: sandbox_pb2.Limits, renamable: bool
    ) -> tuple[int, Child]:
        directory = self._journal.directory(record.sandbox_id)
        if renamable:
            directory.mkdir(mode=0o700, exist_ok=True)
            # Made now, and not by the start that takes it.
            (directory / "execs").mkdir(mode=0o700)
            write_names(directory, record.name)
        else:
            # What is made from here on can be found again by this record.
            self._journal.save(record)
        if self._cgroups is not None:
            self._cgroups.create(record.cgroup, cgroup_limits(asked))
        if self._root:
            workspace = directory / "workspace"
            workspace.mkdir(mode=0o700, exist_ok=True)
            host.hold_tmpfs(workspace, workspace_bytes(asked), record.uid)
        descriptors = Descriptors()
        try:
            return self._spawn(record, asked, descriptors, renamable)
        finally:
            descriptors.close()

    def _spawn(
        self,
        record: Record,
        asked: sandbox_pb2.Limits,
        descriptors: Descriptors,
        renamable: bool,
    ) -> tuple[int, Child]:
        """Start bwrap; return the pipe that it tells its child's pid on."""
        directory = self._journal.directory(record.sandbox_id)
        listener = descriptors.add(_listen(directory / SOCKET))
        info_read, info_write = os.pipe2(os.O_CLOEXEC)
        descriptors.add(info_write)
        procs = [str(path) for path in self._procs_files(record)]
        bwrap = [
            *(self._bwrap, "--info-fd", str(info_write)),
            *self._isolation(record, descriptors),
            *self._names(record, descriptors, renamable),
            *self._files(record, asked, descriptors),
            *("--", _INSIDE, "supervise", str(listener), str(asked.open_files_max)),
            "0" if self._cgroups else str(asked.processes_max),
            self._tag(record),
        ]
        namespace = self._namespace.descriptor if self._namespace else -1
        arguments = [
            *namespace_arguments(record, directory),
            *(str(SUPERVISOR), "launch-in", str(namespace)),
            *(",".join(map(str, sorted(descriptors.numbers))), str(record.uid)),
            *(str(_SUPERVISOR_FILES), str(len(procs)), *procs, *self._binds(record, renamable)),
            *("--", *bwrap),
        ]
        passed = [*descriptors.numbers, *([namespace] if namespace >= 0 else [])]
        try:
            with (directory / START_LOG).open("wb") as log:
                child = spawn(arguments, log.fileno(), passed)
        except OSError:
            os.close(info_read)
            raise
        return info_read, child

    def _tag(self, record: Record) -> str:
        return f"{self._node_id}/{record.prepared_as or record.sandbox_id}"

    def _sources(self, record: Record, renamable: bool) -> dict[str, Path]:
        """Return what of ours bwrap mounts, by name."""
        directory = self._journal.directory(record.sandbox_id)
        sources = {"etc": self._etc, "supervisor": SUPERVISOR}
        if renamable:
            sources |= {name: directory / name for name in names("")}
        if self._root:
            sources["workspace"] = directory / "workspace"
        return sources

    def _staged(self, record: Record, name: str) -> str:
        """Return where bwrap finds one of them."""
        return str(_STAGE / name if self._root else self._sources(record, False)[name])

    def _binds(self, record: Record, renamable: bool) -> list[str]:
        """Return what the launcher is to show: nothing where bwrap runs as ourselves."""
        if not self._root:
            return ["0"]
        sources = self._sources(record, renamable)
        pairs = [text for name, path in sources.items() for text in (str(path), name)]
        return [str(len(sources)), *pairs]

    def _isolation(self, record: Record, descriptors: Descriptors) -> Iterator[str]:
        yield from (
            "--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL",
            *(("--share-net",) if record.device else ()),
            "--new-session", "--clearenv", "--as-pid-1",
            "--uid", str(image.USER_ID), "--gid", str(image.USER_ID),
            "--hostname", record.name or record.sandbox_id,
        )  # fmt: skip
        for program in self._filters:
            yield from ("--add-seccomp-fd", str(descriptors.add_data(program)))

    def _names(self, record: Record, descriptors: Descriptors, renamable: bool) -> Iterator[str]:
        """Yield its /etc, and what is of its own there."""
        yield from ("--ro-bind", self._staged(record, "etc"), "/etc")
        texts = {"resolv.conf": resolver_configuration(record)}
        for file, text in names(record.name or record.sandbox_id).items():
            if renamable:
                yield from ("--ro-bind", self._staged(record, file), f"/etc/{file}")
            else:
                texts[file] = text.encode()
        for file, content in texts.items():
            yield from ("--ro-bind-data", str(descriptors.add_data(content)), f"/etc/{file}")

    def _files(
        self, record: Record, asked: sandbox_pb2.Limits, descriptors: Descriptors
    ) -> Iterator[str]:
        """Yield what the sandbox sees."""
        yield from image.system_arguments()
        yield from ("--proc", "/proc", "--dev", "/dev")
        small = str(small_bytes(asked))
        yield from ("--perms", "1777", "--size", small, "--tmpfs", "/dev/shm")  # noqa: S108
        yield from ("--remount-ro", "/dev")
        yield from ("--perms", "1777", "--size", small, "--tmpfs", "/tmp")  # noqa: S108
        if self._root:
            yield from ("--bind", self._staged(record, "workspace"), "/workspace")
        else:
            size = str(workspace_bytes(asked))
            yield from ("--perms", "0755", "--size", size, "--tmpfs", "/workspace")
        yield from ("--dir", "/run", "--dir", "/var", "--symlink", "/tmp", "/var/tmp")  # noqa: S108
        yield from ("--ro-bind", self._staged(record, "supervisor"), _INSIDE)
        yield from ("--remount-ro", "/", "--chdir", "/workspace")

    async def _read_pid(self, info: int, record: Record) -> int:
        """Read the pid of the sandbox's first process, as the host sees it."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(info, "rb", 0)
        )
        try:
            async with asyncio.timeout(agent_limits.START_TIMEOUT_S):
                text = await reader.read()
            return int(json.loads(text)["child-pid"])
        except (ValueError, KeyError, TypeError, TimeoutError):
            raise StartError(f"bwrap did not start it: {self.explain(record)}") from None
        finally:
            transport.close()

    # ── end ──

    async def adopt(self, record: Record) -> Running | None:
        """Find it again by its pid and that process's start time."""
        if not record.pid:
            return None
        try:
            process = Process(record.pid, record.pid_start_ticks)
        except (ProcessLookupError, OSError):
            return None
        return Running(process, self._journal.directory(record.sandbox_id) / SOCKET)

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """Set the limits of its cgroup, and the size of its files."""
        await asyncio.to_thread(self._resize, record, limits_of(spec))

    def _resize(self, record: Record, asked: sandbox_pb2.Limits) -> None:
        if self._cgroups is None or not record.cgroup:
            text = "without cgroups other limits hold only when the sandbox is started again"
            raise OSError(errno.EOPNOTSUPP, text)
        self._cgroups.limit(record.cgroup, cgroup_limits(asked))
        if record.mounted:
            workspace = self._journal.directory(record.sandbox_id) / "workspace"
            host.resize_tmpfs(workspace, workspace_bytes(asked))

    async def kill(self, record: Record) -> None:
        """Kill every process of it, and return once none is left."""
        await asyncio.to_thread(self._kill, record)
        self._reap(self._tag(record))

    def _kill(self, record: Record) -> None:
        if self._cgroups is not None and record.cgroup:
            self._cgroups.kill(record.cgroup)
        else:
            host.kill_supervised(self._tag(record), exact=True)

    def _reap(self, tag: str) -> None:
        child = self._children.get(tag)
        if child is not None and child.has_ended():
            del self._children[tag]

    async def delete(self, record: Record) -> None:
        """Remove its mounts, cgroups and files except for the record; kills it first."""
        tag = self._tag(record)
        await asyncio.to_thread(self._delete, record)
        self._reap(tag)

    def _delete(self, record: Record) -> None:
        self._kill(record)
        if self._cgroups is not None and record.cgroup:
            self._cgroups.remove(record.cgroup)
        if record.mounted:
            host.unmount(self._journal.directory(record.sandbox_id) / "workspace")
        self._remove_files(record)
        record.mounted, record.cgroup, record.prepared_as = False, "", ""
        self._uids_used.discard(record.uid)
        record.uid = 0

    def usage(self, record: Record) -> Usage:
        """Measure it now; without cgroups nothing is known."""
        if self._cgroups is None or not record.cgroup:
            return Usage()
        measured = self._cgroups.usage(record.cgroup)
        return Usage(
            measured.memory_bytes,
            max(0, measured.processes - PROCESSES_OWN),
            measured.oom_kills,
            measured.cpu_ns,
            measured.memory_limit_bytes,
        )

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`."""
        return await asyncio.to_thread(self._sweep, keep)

    def _sweep(self, keep: set[str]) -> list[str]:
        found: list[str] = []
        # What was taken from the pool is called as it was there.
        records = self._journal.load()[0]
        known = keep | {records[name].prepared_as for name in keep if name in records}
        for pid, tag in host.supervised(f"{self._node_id}/"):
            if tag.partition("/")[2] not in known:
                found.append(f"process {pid} of {tag}")
                host.kill_supervised(tag, exact=True)
        for name in sorted(self._cgroups.names() - known) if self._cgroups else []:
            found.append(f"cgroup {name}")
            if self._cgroups is not None:
                self._cgroups.remove(name)
        for path in host.mounts_below(self._journal.path):
            if path.relative_to(self._journal.path).parts[0] not in keep:
                found.append(f"mount {path}")
                host.unmount(path)
        return found

    async def close(self) -> None:
        """Remove the image if no sandbox is left that may use it."""
        for tag in list(self._children):
            self._reap(tag)
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
        if not any(self._journal.path.iterdir()):
            await asyncio.to_thread(shutil.rmtree, self._image, ignore_errors=True)


def _listen(path: Path) -> int:
    """Return a listening socket at a path, which may be longer than an address can be."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(_BACKLOG)
        return listener.detach()
    finally:
        listener.close()
        os.close(directory)
