"""Sandboxes with a kernel of their own in user space: gVisor's, by its program `runsc`.

What runs inside makes system calls of that kernel, which is a process of the host without rights: a
user of its own, in a user namespace that knows two users, with an empty root and a filter. No other
command of runsc is used than `run`: the agent speaks to the supervisor inside, the cgroup ends and
freezes a sandbox, and what runsc keeps lies in the sandbox's directory.
"""

import asyncio
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits as agent_limits
from prism_agent.cgroups import CgroupLimits, Cgroups
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal, boot_id
from prism_agent.network.egress import namespace_arguments, resolver_configuration
from prism_agent.output_room import MEMORY, memory_bytes
from prism_agent.record import Record
from prism_agent.runtime import gvisor_bundle, gvisor_release, host, image
from prism_agent.runtime.base import Probe, Process, Running, Shared, StartError, Usage
from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.runtime.contained import START_LOG, Contained
from prism_agent.runtime.shape import limits_of, small_bytes, workspace_bytes
from prism_agent.runtime.trial import try_one
from prism_common.errors import PrismError
from prism_common.limits import MIB

#: Of runsc, for what the sandbox has open on the host; each exec has the sandbox's own limit.
_FILES_MAX: Final = 65_536
#: Threads of the host for one process of the sandbox, at most some four: those that run it, and
#: those of its kernel that trace them. Without one its kernel gives up, and all ends.
_THREADS_FOR_ONE: Final = 6
#: Threads of the sandbox's kernel, of runsc and of its file server.
_THREADS_OWN: Final = 128
#: Its kernel idles with 14 MiB; with 16 it does not start.
_MEMORY_BYTES_MIN: Final = 32 * MIB
#: Which way the code's system calls come to its kernel. It needs no device and burns nothing while
#: the sandbox idles; systrap does, kvm may hang.
PLATFORM: Final = "ptrace"
_FLAGS: Final = (
    # The supervisor's socket, and standard input; both lie in a directory that only it can enter.
    "--host-uds=all",
    "--host-fifo=open",
    # The agent reads and writes the same files meanwhile.
    "--file-access-mounts=shared",
    "--overlay2=none",
    # The launcher has entered them.
    "--ignore-cgroups",
    "--net-raw=false",
)
_CONTAINER: Final = "sandbox"
_SHARED: Final = "shared"
#: Between two looks whether the supervisor listens.
_LOOK_S: Final = 0.002


def _cgroup_limits(asked: sandbox_pb2.Limits) -> CgroupLimits:
    return CgroupLimits(
        asked.memory_bytes,
        asked.processes_max * _THREADS_FOR_ONE + _THREADS_OWN,
        asked.cpu_millicores,
    )


class GvisorRuntime(Contained):
    """See the module."""

    name = "gvisor"

    def __init__(self, data: DataDirectory, journal: Journal, cgroups: Cgroups | None) -> None:
        super().__init__(journal, cgroups)
        self._node_id = data.state.node_id
        self._image = data.path / "image"
        self._uids = host.uid_range(self._node_id, region=1) if os.geteuid() == 0 else range(0)
        self._uids_used = {
            record.uid for record in journal.load()[0].values() if record.runtime == self.name
        }
        self._runsc = ""
        self._root = Path()
        self._etc = Path()
        self._children: list[subprocess.Popen[bytes]] = []

    # ── probe ──

    async def probe(self) -> Probe:
        """Start one sandbox, have its supervisor answer, and remove it."""
        problem = self._missing()
        if problem:
            return Probe(ready=False, message=problem)
        try:
            runsc = await asyncio.to_thread(gvisor_release.find_runsc)
            self._runsc = runsc.path
            await asyncio.to_thread(self._prepare)
            await try_one(self, self._journal)
        except (gvisor_release.NoRunscError, OSError, StartError, PrismError) as error:
            return Probe(ready=False, message=str(error))
        return Probe(ready=True, version=runsc.version)

    def _missing(self) -> str:
        if os.geteuid() != 0:
            return "it needs root: only root can give each sandbox users of its own"
        if self._cgroups is None:
            return "it needs cgroups, for nothing else ends a sandbox surely; see the node's health"
        if not os.access(SUPERVISOR, os.X_OK):
            return f"{SUPERVISOR} is missing: install the package again, with a C compiler"
        if len(self._uids) < 2:
            return "too few uids are mapped in this user namespace"
        return ""

    def _prepare(self) -> None:
        self._etc = image.build_etc(self._image)
        self._root = gvisor_bundle.build_root(self._image, SUPERVISOR)

    # ── start ──

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Make it, or start it again with its files."""
        if spec.image not in ("", "host"):
            raise StartError(f"image {spec.image!r} is not known here; use host")
        asked = limits_of(spec)
        if asked.memory_bytes < _MEMORY_BYTES_MIN:
            raise StartError(
                f"limits.memory_bytes: gvisor needs {_MEMORY_BYTES_MIN // MIB} MiB at least, "
                "since the sandbox's own kernel is in it"
            )
        if not record.uid:
            record.uid = self._allocate_uid()
        record.cgroup, record.mounted, record.boot_id = record.sandbox_id, True, boot_id()
        # What is made from here on can be found again by this record.
        self._journal.save(record)
        try:
            await asyncio.to_thread(self._make, record, asked)
            running = await self._start_first(record)
        except OSError as error:
            raise StartError(str(error)) from None
        if running.process is not None:
            record.pid, record.pid_start_ticks = running.process.pid, running.process.start_ticks
        return running

    def _allocate_uid(self) -> int:
        """Return the user of the sandbox's code; the next one is its kernel's."""
        for uid in self._uids[: len(self._uids) // 2 * 2 : 2]:
            if uid not in self._uids_used:
                self._uids_used.add(uid)
                return uid
        raise StartError(f"all {len(self._uids)} uids for sandboxes are in use")

    def _make(self, record: Record, asked: sandbox_pb2.Limits) -> None:
        directory = self._journal.directory(record.sandbox_id)
        if self._cgroups is not None:
            self._cgroups.create(record.cgroup, _cgroup_limits(asked))
        small = small_bytes(asked)
        workspace = directory / "workspace"
        workspace.mkdir(mode=0o700, exist_ok=True)
        host.hold_tmpfs(workspace, workspace_bytes(asked), record.uid)
        # Each start begins with an empty /tmp.
        host.unmount(directory / "small")
        (directory / "small").mkdir(mode=0o700, exist_ok=True)
        host.mount_tmpfs(directory / "small", small, record.uid)
        (directory / "small").chmod(0o1777)
        output = self._output(record)
        # Each with its mode: `parents` would make the first one by the umask.
        output.parent.mkdir(mode=0o700, exist_ok=True)
        output.mkdir(mode=0o700, exist_ok=True)
        host.hold_tmpfs(output, memory_bytes(asked), 0)
        output.chmod(0o700)
        for path in (directory / "bundle", directory / "runsc", output / _SHARED):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o700)
        os.chown(output / _SHARED, record.uid + 1, record.uid + 1)
        gvisor_bundle.write_bundle(
            directory / "bundle",
            gvisor_bundle.Contents(
                hostname=record.name or record.sandbox_id,
                kernel_uid=record.uid + 1,
                user_uid=record.uid,
                small_bytes=small,
                arguments=self._arguments(record, asked),
                resolver=resolver_configuration(record),
                networked=bool(record.device),
            ),
        )

    def _arguments(self, record: Record, asked: sandbox_pb2.Limits) -> tuple[str, ...]:
        return (
            *(gvisor_bundle.SUPERVISOR, "supervise", gvisor_bundle.SHARED),
            # gVisor refuses the process after the one that is too many.
            *(str(asked.open_files_max), str(max(1, asked.processes_max - 1))),
            f"{self._node_id}/{record.sandbox_id}",
        )

    async def _start_first(self, record: Record) -> Running:
        """Start it, and return once its supervisor listens."""
        child = self._spawn(record)
        self._children.append(child)
        try:
            async with asyncio.timeout(agent_limits.START_TIMEOUT_S):
                await _ended(child)
                if child.returncode != 0:
                    raise StartError(f"runsc did not start it: {self.explain(record)}")
                running = self._find(record, self._read_pid(record))
                if running is None:
                    raise StartError(f"it ended at once: {self.explain(record)}")
                return await self._listening(record, running)
        except TimeoutError:
            raise StartError(f"runsc did not start it in time: {self.explain(record)}") from None

    def _spawn(self, record: Record) -> "subprocess.Popen[bytes]":
        procs = [str(path) for path in self._procs_files(record)]
        files = min(_FILES_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        arguments = [
            *namespace_arguments(record, self._journal.directory(record.sandbox_id)),
            *(str(SUPERVISOR), "launch", "0", str(files), str(len(procs)), *procs),
            *self._binds(record),
            *("--", self._runsc, f"--root={gvisor_bundle.STAGE}/runsc", f"--platform={PLATFORM}"),
            *(*_FLAGS, _network(record), "run", "--detach"),
            *(f"--bundle={gvisor_bundle.STAGE}/bundle",),
            *(f"--pid-file={gvisor_bundle.STAGE}/runsc/pid", _CONTAINER),
        ]
        self._reap()
        with self._start_log(record).open("wb") as log:
            return subprocess.Popen(  # noqa: S603
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={}, cwd="/"
            )

    def _binds(self, record: Record) -> Iterator[str]:
        """Yield what the launcher is to show to runsc, and under which names."""
        directory = self._journal.directory(record.sandbox_id)
        sources = {"root": self._root, "etc": self._etc}
        for name in ("workspace", "small", "bundle", "runsc"):
            sources[name] = directory / name
        sources["shared"] = self._shared(record)
        yield str(len(sources))
        for name, path in sources.items():
            yield from (str(path), name)

    def _read_pid(self, record: Record) -> int:
        path = self._journal.directory(record.sandbox_id) / "runsc" / "pid"
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            raise StartError(f"runsc did not say what it started: {self.explain(record)}") from None

    async def _listening(self, record: Record, running: Running) -> Running:
        """Return it once the supervisor's socket has its name: then it listens."""
        control = self._shared(record) / "control"
        try:
            while not control.exists():
                if running.process is None or running.process.ended():
                    raise StartError(f"it ended at once: {self.explain(record)}")
                await asyncio.sleep(_LOOK_S)
        except BaseException:
            running.close()
            raise
        return running

    def _output(self, record: Record) -> Path:
        """Return what of the host its kernel may write to beside its files; bounded like them."""
        return self._journal.directory(record.sandbox_id) / "execs" / MEMORY

    def _start_log(self, record: Record) -> Path:
        # Its kernel keeps it open, as its standard output.
        return self._output(record) / START_LOG

    def _shared(self, record: Record) -> Path:
        path = self._output(record) / _SHARED
        # An older agent has started it, and had it elsewhere.
        return path if path.is_dir() else self._journal.directory(record.sandbox_id) / _SHARED

    # ── finding it ──

    async def adopt(self, record: Record) -> Running | None:
        """Find it again by its pid and that process's start time."""
        if not record.pid:
            return None
        return self._find(record, record.pid, record.pid_start_ticks)

    def _find(self, record: Record, pid: int, start_ticks: int = 0) -> Running | None:
        """Return it by the pid of its kernel; None: it does not run."""
        try:
            process = Process(pid, start_ticks)
        except (ProcessLookupError, OSError):
            return None
        try:
            files = self._file_server(record)
        except (ProcessLookupError, OSError, ValueError, KeyError, TypeError):
            process.close()
            return None
        shared = self._shared(record)
        return Running(process, shared / "control", Shared(shared, record.uid + 1), files)

    def _file_server(self, record: Record) -> Process:
        """Return the process whose root is the sandbox's tree, as runsc has noted it."""
        directory = self._journal.directory(record.sandbox_id) / "runsc"
        (state,) = directory.glob("*.state")
        pid = int(json.loads(state.read_bytes())["goferPid"])
        # One that was given this pid later is in no cgroup of ours.
        if self._cgroups is None or pid not in self._cgroups.pids(record.cgroup):
            raise ProcessLookupError(pid)
        return Process(pid)

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """Set the limits of its cgroup, and the size of its files."""
        await asyncio.to_thread(self._resize, record, limits_of(spec))

    def _resize(self, record: Record, asked: sandbox_pb2.Limits) -> None:
        if self._cgroups is not None and record.cgroup:
            self._cgroups.limit(record.cgroup, _cgroup_limits(asked))
        directory = self._journal.directory(record.sandbox_id)
        host.resize_tmpfs(directory / "workspace", workspace_bytes(asked))
        if os.path.ismount(self._output(record)):
            host.resize_tmpfs(self._output(record), memory_bytes(asked), "execs' outputs")
        if gvisor_bundle.arguments_in(directory / "bundle") != self._arguments(record, asked):
            raise OSError(
                errno.EOPNOTSUPP,
                "gvisor takes another number of processes only when the sandbox is started again",
            )

    # ── end ──

    async def kill(self, record: Record) -> None:
        """Kill every process of it, and return once none is left."""
        await asyncio.to_thread(self._kill, record)
        self._reap()

    def _kill(self, record: Record) -> None:
        if self._cgroups is not None and record.cgroup:
            self._cgroups.kill(record.cgroup)
        # A stop keeps /workspace alone, as its next start does.
        host.unmount(self._journal.directory(record.sandbox_id) / "small")

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
        for path in (directory / "workspace", directory / "small", self._output(record)):
            host.unmount(path)
        self._remove_files(record)
        record.mounted, record.cgroup = False, ""
        self._uids_used.discard(record.uid)
        record.uid = 0

    def usage(self, record: Record) -> Usage:
        """Measure it now, with its kernel, which alone knows how many processes it has."""
        if self._cgroups is None or not record.cgroup:
            return Usage()
        measured = self._cgroups.usage(record.cgroup)
        return Usage(
            memory_bytes=measured.memory_bytes,
            oom_kills=measured.oom_kills,
            cpu_ns=measured.cpu_ns,
            memory_limit_bytes=measured.memory_limit_bytes,
        )

    async def sweep(self, keep: set[str]) -> list[str]:
        """Find nothing: bubblewrap's sweep removes cgroups and mounts, whose ever they were."""
        del keep
        return []

    async def close(self) -> None:
        """Bubblewrap removes the images."""
        self._reap()


def _network(record: Record) -> str:
    """Return the flag of its network: its own kernel's loopback, or the namespace made for it.

    gVisor's own stack cannot be given a device on kernels since 6.11, so the host's is used there.
    """
    return "--network=host" if record.device else "--network=none"


async def _ended(child: "subprocess.Popen[bytes]") -> None:
    """Return once a child has ended, and its status is known."""
    with contextlib.suppress(ProcessLookupError):
        process = Process(child.pid)
        try:
            await process.wait()
        finally:
            process.close()
    child.poll()
