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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits as agent_limits
from prism_agent import seccomp
from prism_agent.cgroups import CgroupLimits, Cgroups
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal, Record, boot_id
from prism_agent.reconcile import Desired, Phase
from prism_agent.runtime import host, image
from prism_agent.runtime.base import Probe, Process, Running, StartError, Usage
from prism_agent.supervisor.client import SupervisorClient
from prism_common import limits
from prism_common.errors import PrismError, SandboxGoneError
from prism_common.limits import MIB
from prism_common.names import generate_id

SUPERVISOR: Final = Path(__file__).parent.parent / "supervisor" / "prism-supervisor"
_INSIDE: Final = "/.prism-supervisor"
_SOCKET: Final = "control"
_LOG: Final = "start.log"
_LOG_BYTES_MAX: Final = 2000
#: Each exec takes five, and the supervisor a few.
_SUPERVISOR_FILES: Final = 8192
_BACKLOG: Final = 4
#: Where the launcher shows what the sandbox's user may not reach by its own path.
_STAGE: Final = Path("/tmp")  # noqa: S108


def limits_of(spec: sandbox_pb2.SandboxSpec) -> sandbox_pb2.Limits:
    """Return a sandbox's limits with the defaults filled in."""
    asked = spec.limits
    return sandbox_pb2.Limits(
        cpu_millicores=asked.cpu_millicores or limits.CPU_MILLICORES_DEFAULT,
        memory_bytes=asked.memory_bytes or limits.MEMORY_BYTES_DEFAULT,
        disk_bytes=asked.disk_bytes or limits.DISK_BYTES_DEFAULT,
        processes_max=asked.processes_max or limits.PROCESSES_DEFAULT,
        open_files_max=asked.open_files_max or limits.OPEN_FILES_DEFAULT,
    )


def workspace_bytes(asked: sandbox_pb2.Limits) -> int:
    """Return the size of /workspace: its pages are memory of the sandbox, so never all of it."""
    return min(asked.disk_bytes, asked.memory_bytes // 2)


@dataclass(slots=True)
class _Descriptors:
    """What bwrap inherits. They are closed here once it runs."""

    numbers: list[int] = field(default_factory=list)

    def add(self, number: int) -> int:
        self.numbers.append(number)
        return number

    def add_data(self, content: bytes) -> int:
        number = self.add(os.memfd_create("data", os.MFD_CLOEXEC))
        os.write(number, content)
        os.lseek(number, 0, os.SEEK_SET)
        return number

    def close(self) -> None:
        for number in self.numbers:
            os.close(number)
        self.numbers.clear()


class BubblewrapRuntime:
    """See the module."""

    name = "bubblewrap"

    def __init__(self, data: DataDirectory, journal: Journal, cgroups: Cgroups | None) -> None:
        self._node_id = data.state.node_id
        self._image = data.path / "image"
        self._journal = journal
        self._cgroups = cgroups
        self._root = os.geteuid() == 0
        self._uids = host.uid_range(self._node_id) if self._root else range(0)
        self._uids_used = {record.uid for record in journal.load()[0].values()}
        self._filters = (b"", b"")
        self._etc = Path()
        self._bwrap = shutil.which("bwrap") or ""
        self._children: list[subprocess.Popen[bytes]] = []

    # ── probe ──

    async def probe(self) -> Probe:
        """Start one sandbox, run something in it, remove it."""
        problem = self._missing()
        if problem:
            return Probe(ready=False, message=problem)
        try:
            version = await asyncio.to_thread(self._prepare)
            await self._try_one()
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

    async def _try_one(self) -> None:
        """Start a sandbox, have its supervisor answer, and remove it.

        Raises:
            StartError: It does not work here.
        """
        sandbox_id = generate_id("probe")
        record = Record(
            sandbox_id=sandbox_id,
            name="probe",
            generation=0,
            start_count=0,
            phase=Phase.DELETING,
            desired=Desired.DELETED,
            wanted_start_count=0,
            spec=b"",
            expire_time_s=0.0,
            grace_s=0.0,
            reschedules=False,
            runtime=self.name,
        )
        running: Running | None = None
        client = SupervisorClient(lambda _: None, lambda: None)
        try:
            running = await self.start(record, sandbox_pb2.SandboxSpec())
            await client.connect(self._journal.directory(sandbox_id) / _SOCKET)
        except SandboxGoneError:
            raise StartError(f"bwrap did not start it: {self.explain(record)}") from None
        finally:
            client.close()
            if running is not None:
                running.close()
            await self.delete(record)
            self._journal.remove(sandbox_id)

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
        return match[0]

    # ── start ──

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Make it, or start it again with its files."""
        if spec.image not in ("", "host"):
            raise StartError(f"image {spec.image!r} is not known here; use host")
        asked = limits_of(spec)
        if self._root and not record.uid:
            record.uid = self._allocate_uid()
        record.cgroup = record.sandbox_id if self._cgroups else ""
        record.mounted = self._root
        # What is made from here on can be found again by this record.
        await asyncio.to_thread(self._make, record, asked)
        try:
            async with asyncio.TaskGroup() as group:
                # The record is on disk before the sandbox is called READY.
                group.create_task(asyncio.to_thread(self._journal.sync, record.sandbox_id))
                starting = group.create_task(self._start_first(record, asked))
        except* (StartError, OSError) as failed:
            raise StartError("; ".join(str(each) for each in failed.exceptions)) from None
        pid = starting.result()
        try:
            process = Process(pid)
        except ProcessLookupError:
            raise StartError(f"it ended at once: {self.explain(record)}") from None
        record.pid, record.pid_start_ticks = pid, process.start_ticks
        return Running(process, self._journal.directory(record.sandbox_id) / _SOCKET)

    async def _start_first(self, record: Record, asked: sandbox_pb2.Limits) -> int:
        """Start its first process; return the pid."""
        descriptors = _Descriptors()
        try:
            info, child = self._spawn(record, asked, descriptors)
        finally:
            descriptors.close()
        self._children.append(child)
        return await self._read_pid(info, record)

    def _allocate_uid(self) -> int:
        for uid in self._uids:
            if uid not in self._uids_used:
                self._uids_used.add(uid)
                return uid
        raise StartError(f"all {len(self._uids)} uids for sandboxes are in use")

    def _make(self, record: Record, asked: sandbox_pb2.Limits) -> None:
        record.boot_id = boot_id()
        self._journal.save(record)
        directory = self._journal.directory(record.sandbox_id)
        if self._cgroups is not None:
            self._cgroups.create(
                record.cgroup,
                CgroupLimits(asked.memory_bytes, asked.processes_max, asked.cpu_millicores),
            )
        if self._root:
            workspace = directory / "workspace"
            workspace.mkdir(mode=0o700, exist_ok=True)
            if not os.path.ismount(workspace):
                host.mount_tmpfs(workspace, workspace_bytes(asked), record.uid)

    def _spawn(
        self, record: Record, asked: sandbox_pb2.Limits, descriptors: _Descriptors
    ) -> tuple[int, "subprocess.Popen[bytes]"]:
        """Start bwrap; return the pipe that it tells its child's pid on."""
        directory = self._journal.directory(record.sandbox_id)
        listener = descriptors.add(_listen(directory / _SOCKET))
        info_read, info_write = os.pipe2(os.O_CLOEXEC)
        descriptors.add(info_write)
        procs = [str(path) for path in self._procs_files(record)]
        arguments = [
            *(str(SUPERVISOR), "launch", str(record.uid), str(_SUPERVISOR_FILES)),
            *(str(len(procs)), *procs, *self._binds(record), "--"),
            *(self._bwrap, "--info-fd", str(info_write)),
            *self._isolation(record, descriptors),
            *self._files(record, asked, descriptors),
            *("--", _INSIDE, "supervise", str(listener), str(asked.open_files_max)),
            "0" if self._cgroups else str(asked.processes_max),
            f"{self._node_id}/{record.sandbox_id}",
        ]
        self._reap()
        try:
            with (directory / _LOG).open("wb") as log:
                child = subprocess.Popen(  # noqa: S603
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors.numbers,
                    env={},
                    cwd="/",
                )
        except OSError:
            os.close(info_read)
            raise
        return info_read, child

    def _procs_files(self, record: Record) -> list[Path]:
        return list(self._cgroups.procs_files(record.cgroup)) if self._cgroups else []

    def _sources(self, record: Record) -> dict[str, Path]:
        """Return what of ours bwrap mounts, by name."""
        sources = {"etc": self._etc, "supervisor": SUPERVISOR}
        if self._root:
            sources["workspace"] = self._journal.directory(record.sandbox_id) / "workspace"
        return sources

    def _staged(self, record: Record, name: str) -> str:
        """Return where bwrap finds one of them."""
        return str(_STAGE / name if self._root else self._sources(record)[name])

    def _binds(self, record: Record) -> list[str]:
        """Return what the launcher is to show: nothing where bwrap runs as ourselves."""
        if not self._root:
            return ["0"]
        sources = self._sources(record)
        pairs = [text for name, path in sources.items() for text in (str(path), name)]
        return [str(len(sources)), *pairs]

    def _isolation(self, record: Record, descriptors: _Descriptors) -> Iterator[str]:
        yield from (
            "--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL",
            "--new-session", "--clearenv", "--as-pid-1",
            "--uid", str(image.USER_ID), "--gid", str(image.USER_ID),
            "--hostname", record.name or record.sandbox_id,
        )  # fmt: skip
        for program in self._filters:
            yield from ("--add-seccomp-fd", str(descriptors.add_data(program)))

    def _files(
        self, record: Record, asked: sandbox_pb2.Limits, descriptors: _Descriptors
    ) -> Iterator[str]:
        """Yield what the sandbox sees."""
        name = record.name or record.sandbox_id
        hosts = f"127.0.0.1 localhost {name}\n::1 localhost\n".encode()
        yield from image.system_arguments()
        yield from ("--ro-bind", self._staged(record, "etc"), "/etc")
        yield from ("--ro-bind-data", str(descriptors.add_data(hosts)), "/etc/hosts")
        yield from (
            "--ro-bind-data",
            str(descriptors.add_data(f"{name}\n".encode())),
            "/etc/hostname",
        )
        yield from ("--proc", "/proc", "--dev", "/dev")
        small = str(min(asked.disk_bytes, max(MIB, asked.memory_bytes // 4)))
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

    def explain(self, record: Record) -> str:
        """Return what bwrap said last."""
        path = self._journal.directory(record.sandbox_id) / _LOG
        try:
            text = path.read_bytes()[-_LOG_BYTES_MAX:].decode("utf-8", "replace").strip()
        except OSError:
            text = ""
        return text or "it said nothing"

    # ── end ──

    async def adopt(self, record: Record) -> Running | None:
        """Find it again by its pid and that process's start time."""
        if not record.pid:
            return None
        try:
            process = Process(record.pid, record.pid_start_ticks)
        except (ProcessLookupError, OSError):
            return None
        return Running(process, self._journal.directory(record.sandbox_id) / _SOCKET)

    async def pause(self, record: Record) -> None:
        """Freeze its cgroup."""
        if self._cgroups is None or not record.cgroup:
            raise OSError(errno.EOPNOTSUPP, "it runs without a cgroup, so it cannot be frozen")
        await asyncio.to_thread(self._cgroups.freeze, record.cgroup)

    async def resume(self, record: Record) -> None:
        """Thaw its cgroup."""
        if self._cgroups is not None and record.cgroup:
            await asyncio.to_thread(self._cgroups.thaw, record.cgroup)

    async def kill(self, record: Record) -> None:
        """Kill every process of it, and return once none is left."""
        await asyncio.to_thread(self._kill, record)
        self._reap()

    def _kill(self, record: Record) -> None:
        if self._cgroups is not None and record.cgroup:
            self._cgroups.kill(record.cgroup)
        else:
            host.kill_supervised(f"{self._node_id}/{record.sandbox_id}", exact=True)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    async def delete(self, record: Record) -> None:
        """Remove its mounts, cgroups and files except for the record; kills it first."""
        await asyncio.to_thread(self._delete, record)
        self._reap()

    def _delete(self, record: Record) -> None:
        self._kill(record)
        if self._cgroups is not None and record.cgroup:
            self._cgroups.remove(record.cgroup)
        directory = self._journal.directory(record.sandbox_id)
        if record.mounted:
            host.unmount(directory / "workspace")
        for entry in list(directory.iterdir()) if directory.is_dir() else []:
            if entry.name == "record":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        record.mounted, record.cgroup = False, ""
        self._uids_used.discard(record.uid)
        record.uid = 0

    def usage(self, record: Record) -> Usage:
        """Measure it now; without cgroups nothing is known."""
        if self._cgroups is None or not record.cgroup:
            return Usage()
        measured = self._cgroups.usage(record.cgroup)
        return Usage(measured.memory_bytes, measured.processes, measured.oom_kills)

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`."""
        return await asyncio.to_thread(self._sweep, keep)

    def _sweep(self, keep: set[str]) -> list[str]:
        found: list[str] = []
        for pid, tag in host.supervised(f"{self._node_id}/"):
            if tag.partition("/")[2] not in keep:
                found.append(f"process {pid} of {tag}")
                host.kill_supervised(tag, exact=True)
        for name in sorted(self._cgroups.names() - keep) if self._cgroups else []:
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
        self._reap()
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
