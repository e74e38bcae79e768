"""What the agent has started, on disk before it runs: one record a sandbox.

`sandboxes/<id>/record` is replaced atomically at each step. It holds what a restarted agent needs
to find the sandbox's processes again, or to remove every trace of it.
"""

import logging
import os
import shutil
from pathlib import Path

import msgspec

from prism_agent.data_directory import sync_directory, write_atomically
from prism_agent.reconcile import Assignment, Desired, Phase, Sandbox

logger = logging.getLogger(__name__)

VERSION = 1


class Record(msgspec.Struct, kw_only=True):
    """One sandbox as the journal holds it."""

    version: int = VERSION
    sandbox_id: str
    name: str
    generation: int
    start_count: int
    phase: Phase
    desired: Desired
    wanted_start_count: int
    #: Serialized prism.sandbox.v1.SandboxSpec.
    spec: bytes
    expire_time_s: float
    grace_s: float
    reschedules: bool
    runtime: str = ""
    reason: str = ""
    message: str = ""
    #: When it came to its phase, wall clock.
    phase_time_s: float = 0.0

    # ── what runs ──
    #: The boot of the machine that it was started in: nothing of it outlives that.
    boot_id: str = ""
    #: The host uid that its processes run as; 0: none was given.
    uid: int = 0
    #: Its supervisor, as the host sees it; 0: none runs.
    pid: int = 0
    #: Start time of that process in clock ticks since boot: tells it from a later one of that pid.
    pid_start_ticks: int = 0
    #: Name of its cgroup below the agent's; empty: it has none.
    cgroup: str = ""
    #: Something is mounted in its directory.
    mounted: bool = False

    def to_sandbox(self) -> Sandbox:
        """Return it as the reconciler sees it."""
        wanted = Assignment(
            sandbox_id=self.sandbox_id,
            generation=self.generation,
            desired=self.desired,
            start_count=self.wanted_start_count,
            name=self.name,
            spec=self.spec,
            expire_time_s=self.expire_time_s,
            grace_s=self.grace_s,
            reschedules=self.reschedules,
        )
        return Sandbox(
            wanted, self.phase, self.start_count, self.runtime, self.reason, self.message
        )

    def take(self, sandbox: Sandbox) -> None:
        """Bring it up to what the reconciler holds; what runs stays as it is."""
        wanted = sandbox.wanted
        self.name, self.generation = wanted.name, wanted.generation
        self.desired, self.wanted_start_count = wanted.desired, wanted.start_count
        self.spec, self.expire_time_s = wanted.spec, wanted.expire_time_s
        self.grace_s, self.reschedules = wanted.grace_s, wanted.reschedules
        self.phase, self.start_count = sandbox.phase, sandbox.start_count
        self.runtime = sandbox.runtime or self.runtime
        self.reason, self.message = sandbox.reason, sandbox.message


def record_of(sandbox: Sandbox) -> Record:
    """Return a new record: nothing runs yet."""
    wanted = sandbox.wanted
    return Record(
        sandbox_id=wanted.sandbox_id,
        name=wanted.name,
        generation=wanted.generation,
        start_count=sandbox.start_count,
        phase=sandbox.phase,
        desired=wanted.desired,
        wanted_start_count=wanted.start_count,
        spec=wanted.spec,
        expire_time_s=wanted.expire_time_s,
        grace_s=wanted.grace_s,
        reschedules=wanted.reschedules,
        reason=sandbox.reason,
        message=sandbox.message,
    )


class Journal:
    """The records below one directory. Ids are the control plane's, and are checked here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def directory(self, sandbox_id: str) -> Path:
        """Return the directory of a sandbox."""
        if not is_safe_id(sandbox_id):
            raise ValueError(f"not a sandbox id: {sandbox_id!r}")
        return self.path / sandbox_id

    def save(self, record: Record) -> None:
        """Write a record. It survives this process at once, and the machine after `sync`."""
        directory = self.directory(record.sandbox_id)
        directory.mkdir(mode=0o700, exist_ok=True)
        write_atomically(directory / "record", msgspec.json.encode(record), durable=False)

    def sync(self, sandbox_id: str) -> None:
        """Make a record survive a crash of the machine.

        Needed once before a sandbox is reported as READY: a sandbox that the leader knows to run,
        and that this node does not know after a crash, would be made again, empty, under its name.
        """
        directory = self.directory(sandbox_id)
        descriptor = os.open(directory / "record", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(directory)
        sync_directory(self.path)

    def load(self) -> tuple[dict[str, Record], list[str]]:
        """Return the records, and the names of directories that have none that can be read."""
        records: dict[str, Record] = {}
        strays: list[str] = []
        for entry in sorted(os.scandir(self.path), key=lambda each: each.name):
            record = self._read(Path(entry.path))
            if record is None or record.sandbox_id != entry.name:
                strays.append(entry.name)
            else:
                records[record.sandbox_id] = record
        return records, strays

    def _read(self, directory: Path) -> Record | None:
        try:
            record = msgspec.json.decode((directory / "record").read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("no usable record", extra={"path": str(directory), "error": str(error)})
            return None
        return record if record.version == VERSION else None

    def remove(self, sandbox_id: str) -> None:
        """Remove a sandbox's directory with all in it. Nothing may be mounted there."""
        directory = self.directory(sandbox_id)
        if directory.exists():
            shutil.rmtree(directory)


def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def is_safe_id(sandbox_id: str) -> bool:
    """True if an id can be used as the name of a directory and of a cgroup."""
    allowed = sandbox_id.replace("-", "").replace("_", "")
    return 0 < len(sandbox_id) <= 128 and allowed.isascii() and allowed.isalnum()
