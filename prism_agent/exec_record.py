"""One exec: its record on disk, and how it is now."""

import asyncio
import contextlib
import hashlib
import logging
import os
from pathlib import Path

import msgspec
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.data_directory import write_all
from prism_agent.exec_input import ExecInput
from prism_agent.output_room import OutputRoom
from prism_agent.supervisor.protocol import (
    RING_HEADER_BYTES,
    ProtocolError,
    Reason,
    RingHeader,
    State,
)
from prism_agent.supervisor.ring import Ring

logger = logging.getLogger(__name__)

VERSION = 1


class ExecRecord(msgspec.Struct, kw_only=True):
    """What a restarted agent must know of an exec beside its ring. Written before it runs."""

    version: int = VERSION
    exec_id: str
    #: Its number in the sandbox: names its files, and the exec to the supervisor.
    number: int
    request_id: str
    #: Of what was asked for: the same request id with another content is refused.
    digest: str
    argv: list[str]
    start_time_s: float
    #: Processes that the kernel had killed for memory when it started.
    oom_kills: int
    stdin: bool
    #: It has a terminal, and only one stream of output.
    terminal: bool = False
    #: Its end was looked at, and why it ended is settled.
    settled: bool = False
    #: It ran out of memory. The rest of how it ended is in the ring's header.
    out_of_memory: bool = False


def digest_of(start: sandbox_pb2.ExecStart) -> str:
    """Return a digest of what is to be run; the same for the same request."""
    copy = sandbox_pb2.ExecStart()
    copy.CopyFrom(start)
    copy.request_id = ""
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


class Exec:
    """One exec as the agent sees it."""

    def __init__(self, room: OutputRoom, record: ExecRecord) -> None:
        self.record = record
        self._room = room
        #: Its output.
        self.ring_path = room.ring(record.number)
        #: Its record.
        self.record_path = room.records / f"{record.number}.json"
        #: How much output is kept of it while it runs; 0: its file says it.
        self._ring_bytes = 0
        #: The last that was read of its ring; refreshed when the supervisor says so.
        self.header: RingHeader | None = None
        #: Set, and replaced by a new one, at each change.
        self.changed = asyncio.Event()
        #: Its sandbox ended before it did, or with it: there is no exit status.
        self.lost = False
        #: It has ended, nothing holds its pipes, and the supervisor has dropped it.
        self.forgotten = False
        #: Why the supervisor could not start it: an errno.
        self.refused = 0
        #: Clients that must miss nothing, and the offset up to which each has read.
        self.readers: dict[object, int] = {}
        #: Clients that read its logs just now: they may miss something, but not read another's.
        self.log_readers = 0
        #: The window that the supervisor was told last.
        self.window = 0
        self.release: asyncio.TimerHandle | None = None
        self.input = ExecInput()
        self._unreadable = False

    @property
    def ring_bytes(self) -> int:
        """How much output is kept of it while it runs."""
        if not self._ring_bytes:
            try:
                self._ring_bytes = self.ring_path.stat().st_size - RING_HEADER_BYTES
            except FileNotFoundError:
                return limits.RING_BYTES
        return self._ring_bytes

    @ring_bytes.setter
    def ring_bytes(self, size: int) -> None:
        self._ring_bytes = size

    @property
    def running(self) -> bool:
        """It has not ended, as far as is known."""
        ended = self.header is not None and self.header.state >= State.EXITED
        return not self.lost and not self.refused and not ended

    def save(self) -> None:
        """Write the record: a line of its file, of which the last whole one counts.

        A file that is made or replaced costs several times as much, and each exec has two writes.
        """
        line = b"\n" + msgspec.json.encode(self.record) + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.record_path, flags, 0o600)
        try:
            write_all(descriptor, line)
        finally:
            os.close(descriptor)

    def notify(self) -> None:
        """Wake all who wait for a change."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def refresh(self) -> RingHeader | None:
        """Read the ring's header again; None: its output was given up."""
        if self.header is not None and self.header.state is State.DRAINED:
            # Only background children add to it now, and how it ended is final.
            return self.header
        ring = self.open_ring()
        if ring is None:
            return self.header
        try:
            header = ring.header()
            # What has ended does not run again, whatever its supervisor says now.
            if self.header is None or header.state >= self.header.state:
                self.header = header
        except ProtocolError as error:
            # A failing disk: what is not known is not made up. Told once, for it is read at each
            # word of a supervisor, which may be anybody's.
            if not self._unreadable:
                self._unreadable = True
                logger.error(
                    "unreadable output", extra={"path": str(self.ring_path), "why": str(error)}
                )
        finally:
            ring.close()
        return self.header

    def open_ring(self) -> Ring | None:
        """Open its output, wherever that is by now; None: it was given up."""
        with contextlib.suppress(FileNotFoundError):
            return Ring.open(self.ring_path)
        # Another thread takes it out of memory just now, or has done so.
        self.ring_path = self._room.ring(self.record.number)
        with contextlib.suppress(FileNotFoundError):
            return Ring.open(self.ring_path)
        return None

    def disk_bytes(self) -> int:
        """Return what its output takes on disk; 0: it was given up."""
        try:
            return os.stat(self.ring_path).st_blocks * 512
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Remove its files."""
        for path in (self.ring_path, self.record_path, self.ring_path.with_suffix(".in")):
            path.unlink(missing_ok=True)

    def exit(self) -> sandbox_pb2.ExecExit | None:
        """Return how it ended, as the kernel said it; None: it runs, or its end is not known."""
        header = self.header
        if header is None or header.state < State.EXITED:
            return None
        reason = "" if header.reason is Reason.NONE else header.reason.name
        if self.record.out_of_memory:
            reason = "OUT_OF_MEMORY"
        return sandbox_pb2.ExecExit(exit_code=header.exit_code, signal=header.signal, reason=reason)

    def result(self) -> str:
        """Return how it ended, as a metric calls it."""
        header = self.header
        if header is None:
            return "lost"
        if self.record.out_of_memory:
            return "out_of_memory"
        if header.reason is Reason.TIMEOUT:
            return "timeout"
        if header.reason is not Reason.NONE:
            return "not_started"
        return "signaled" if header.signal else "exited"

    def info(self) -> sandbox_pb2.ExecInfo:
        """Return it as the API shows it."""
        if self.running:
            self.refresh()
        info = sandbox_pb2.ExecInfo(
            exec_id=self.record.exec_id,
            argv=self.record.argv,
            running=self.running,
            exit=self.exit(),
            sequence=self.header.sequence if self.header else 0,
        )
        info.start_time.FromNanoseconds(int(self.record.start_time_s * 1e9))
        if self.header is not None and self.header.state >= State.EXITED:
            info.end_time.FromNanoseconds(int(self.header.exit_s * 1e9))
        return info


def load_execs(room: OutputRoom) -> list[Exec]:
    """Return the execs that have records, in order of their start."""
    execs: list[Exec] = []
    if not room.records.is_dir():
        return execs
    for path in room.records.glob("*.json"):
        record = _read_record(path)
        if record is not None and record.version == VERSION:
            execs.append(Exec(room, record))
    return sorted(execs, key=lambda each: each.record.number)


def _read_record(path: Path) -> ExecRecord | None:
    """Return the last record that a file has whole; None: it has none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(line, type=ExecRecord)
    return None


def sweep_rings(room: OutputRoom) -> int:
    """Remove the rings of execs that never started, and return the highest number in use.

    A ring is made before its record, and the record before the supervisor hears of the exec: a
    ring without one belongs to an exec that an earlier agent died in the middle of. The number of
    a record that cannot be read stays in use, as its exec may run.
    """
    highest = 0
    if not room.records.is_dir():
        return highest
    for ring in room.directory.glob("*.ring"):
        if not (room.records / f"{ring.stem}.json").exists():
            ring.unlink()
        elif ring.stem.isdecimal():
            highest = max(highest, int(ring.stem))
    return highest
