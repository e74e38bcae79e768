"""What the agent has started, on disk before it runs: a record for each sandbox, in one file.

`journal` beside the sandboxes' directories holds them, and is only ever added to, until it is
replaced by a shorter one that says the same. A record holds what a restarted agent needs to find
the sandbox's processes again, or to remove every trace of it. All that changes in a turn of the
loop is one write; all that must survive a crash of the machine at a time is one fsync.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import threading
from pathlib import Path
from typing import Final

import msgspec

from prism_agent.data_directory import sync_directory, write_all
from prism_agent.journal_log import MARKER_BYTES, Damage, JournalFormatError, JournalLog
from prism_agent.record import VERSION, Record
from prism_agent.removals import remove_tree
from prism_common.errors import StartupError

logger = logging.getLogger(__name__)

FILE: Final = "journal"
_NEW_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
#: Sandboxes named in one line of the log.
_NAMES_MAX: Final = 100
_SAFE_ID: Final = re.compile("[-_]*[A-Za-z0-9][A-Za-z0-9_-]*")
#: Of earlier versions, in each sandbox's directory: taken over into the journal.
_OLD_RECORD: Final = "record"


def _new_log() -> JournalLog:
    return JournalLog(os.urandom(MARKER_BYTES))


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Record)


def append(descriptor: int, data: bytes) -> None:
    """Write to the end of the journal. Every byte that it ever says passes here, or `replace`.

    Raises:
        OSError: A part of it may be written.
    """
    write_all(descriptor, data)


def replace(new: Path, old: Path) -> None:
    """Put a new journal in the place of the old one."""
    os.replace(new, old)


class Journal:
    """The records of all sandboxes. `save` and `sync` may be called by any thread.

    Args:
        path: The sandboxes' directories; the journal is beside it. Ids are the control plane's,
            and are checked before one becomes the name of a directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.with_name(FILE)
        #: What is to take its place; one that a death has left is not looked at.
        self._new_file = path.with_name(f"{FILE}.new")
        self._log = _new_log()
        self._descriptor = -1
        #: What is to be written with the next write; None: it is to be forgotten.
        self._unwritten: dict[str, Record | None] = {}
        #: Why the last attempt to write what is to be said of these has failed.
        self._failures: dict[str, OSError] = {}
        #: Bytes written, and how many of them survive a crash of the machine, over all files.
        self._written = 0
        self.synced = 0
        #: An fsync or a cut has failed: nothing is believed to be on disk before a new file is.
        self._doubtful = False
        #: While a new file is made: what is added to the old one meanwhile.
        self._meanwhile: list[tuple[str, bytes | None]] | None = None
        #: What was found broken when the file was read, in words; empty: nothing was.
        self.problem = ""
        #: Guards all of the above; never held while the disk is waited for.
        self._lock = threading.Lock()
        #: Held by the one thread that syncs or replaces the file.
        self._sync_lock = threading.Lock()

    def directory(self, sandbox_id: str) -> Path:
        """Return the directory of a sandbox. It is there once a runtime has used `save`."""
        if not is_safe_id(sandbox_id):
            raise ValueError(f"not a sandbox id: {sandbox_id!r}")
        return self.path / sandbox_id

    # ── writing ──

    def put(self, record: Record) -> None:
        """Have a record written with the next `flush`, as it is then."""
        with self._lock:
            self._unwritten[record.sandbox_id] = record

    def forget(self, sandbox_id: str) -> None:
        """Remove a sandbox's directory with all in it, and its record with the next `flush`.

        Nothing may be mounted there.
        """
        # Most have none, and to make a Path of each costs more than to look.
        if os.path.lexists(f"{self.path}/{sandbox_id}"):
            remove_tree(self.directory(sandbox_id))
        with self._lock:
            self._unwritten[sandbox_id] = None

    def flush(self) -> None:
        """Write all that was put and forgotten: it survives this process.

        Raises:
            OSError: Nothing of it is written. It is written with the next flush that succeeds.
        """
        if not self._unwritten:
            return
        with self._lock:
            self._open()
            self._write(list(self._unwritten))

    def save(self, record: Record) -> None:
        """Write one record at once, and make the sandbox's directory: for a runtime that needs one.

        Raises:
            OSError: There is no directory, or the record is not written yet.
        """
        self.directory(record.sandbox_id).mkdir(mode=0o700, exist_ok=True)
        with self._lock:
            self._open()
            self._unwritten[record.sandbox_id] = record
            self._write([record.sandbox_id])

    def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox at once, as far as the disk has room to say so."""
        self.forget(sandbox_id)
        with contextlib.suppress(OSError):
            self.flush()

    def failure(self, sandbox_id: str) -> OSError | None:
        """Return why what was last to be written of a sandbox is not; None: it is."""
        return self._failures.get(sandbox_id)

    def _write(self, keys: list[str]) -> None:
        """Append what is to be said of some sandboxes, in one write. Under the lock."""
        said: list[tuple[str, bytes | None, bytes]] = []
        for key in keys:
            record = self._unwritten[key]
            if record is not None:
                content = _encoder.encode(record)
                said.append((key, content, self._log.frame(key, content)))
            elif key in self._log:
                said.append((key, None, self._log.frame(key, None)))
        if said:
            try:
                self._append(b"".join(frame for _, _, frame in said))
            except OSError as error:
                self._failures.update(dict.fromkeys(keys, error))
                raise
        for key, content_or_none, frame in said:
            self._log.wrote(key, content_or_none, len(frame))
            if self._meanwhile is not None:
                self._meanwhile.append((key, content_or_none))
        for key in keys:
            del self._unwritten[key]
            self._failures.pop(key, None)

    def _append(self, data: bytes) -> None:
        try:
            if self._doubtful:
                raise OSError(errno.EIO, "the journal is being replaced after an error of the disk")
            append(self._descriptor, data)
        except OSError:
            self._cut()
            raise
        self._written += len(data)

    def _cut(self) -> None:
        """Leave nothing behind of a write that failed: what follows it would not be believed."""
        try:
            os.ftruncate(self._descriptor, self._log.file_bytes)
        except OSError as error:
            self._doubtful = True
            logger.error("cannot cut the journal", extra={"error": str(error)})

    # ── surviving the machine ──

    @property
    def position(self) -> int:
        """What is written so far; `synced` comes to be as much."""
        return self._written

    @property
    def wants_sync(self) -> bool:
        """It is to be replaced by a shorter file, or by one that can be trusted: `sync` does so."""
        return self._log.wants_rewrite or self._doubtful

    def sync(self, sandbox_id: str = "") -> None:
        """Make all that is written survive a crash of the machine; this may take long.

        Needed before a sandbox is reported as READY: a sandbox that the leader knows to run, and
        that this node does not know after a crash, would be made again, empty, under its name.

        Args:
            sandbox_id: One whose record must be written.

        Raises:
            OSError: It may not survive.
        """
        failure = self.failure(sandbox_id) if sandbox_id else None
        if failure is not None:
            raise failure
        target = self._written
        with self._sync_lock:
            if self.wants_sync:
                self._replace()
            elif self.synced < target:
                self._sync()

    def _sync(self) -> None:
        """Fsync the file. Under the sync lock, so it is not replaced meanwhile."""
        with self._lock:
            self._open()
            descriptor, written = self._descriptor, self._written
            log, sequence = self._log, self._log.sequence
        try:
            os.fdatasync(descriptor)
        except OSError:
            # What was not written back may count as clean now: only a new file can be trusted.
            self._doubtful = True
            raise
        self.synced, log.synced = written, sequence

    def _replace(self) -> None:
        """Write a new file that says the same, and sync it. Under the sync lock."""
        with self._lock:
            self._open()
            records, self._meanwhile = list(self._log.records()), []
        descriptor = -1
        try:
            descriptor = os.open(self._new_file, _NEW_FLAGS, 0o600)
            log, whole = JournalLog.of(os.urandom(MARKER_BYTES), records)
            append(descriptor, whole)
            os.fsync(descriptor)
            with self._lock:
                rest = [(*each, log.frame(*each)) for each in self._meanwhile]
                append(descriptor, b"".join(frame for _, _, frame in rest))
                replace(self._new_file, self._file)
                for key, content, frame in rest:
                    log.wrote(key, content, len(frame))
                descriptor, self._descriptor = self._descriptor, descriptor
                self._log, self._meanwhile, self._doubtful = log, None, False
        except OSError:
            with self._lock:
                self._meanwhile = None
                self._log.postpone_rewrite()
            with contextlib.suppress(OSError):
                self._new_file.unlink()
            if self._doubtful:
                raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        # What was added meanwhile, and the name.
        self._sync()
        sync_directory(self._file.parent)

    # ── starting ──

    def load(self) -> tuple[dict[str, Record], list[str]]:
        """Return the records, and the names of directories that have none that can be read."""
        with self._lock:
            self._open()
            forgotten = {key for key, record in self._unwritten.items() if record is None}
            said = [each for each in self._log.records() if each[0] not in forgotten]
        records: dict[str, Record] = {}
        for key, content in said:
            try:
                record = _decoder.decode(content)
            except msgspec.MsgspecError as error:
                logger.warning("no usable record", extra={"sandbox": key, "error": str(error)})
                continue
            if record.version == VERSION and record.sandbox_id == key:
                records[key] = record
        names = sorted(entry.name for entry in os.scandir(self.path))
        return records, [name for name in names if name not in records]

    def close(self) -> None:
        """Close the file; the journal is opened again when it is used."""
        with self._sync_lock, self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                self._log = _new_log()

    def _open(self) -> None:
        """Read the file, cut off what is not whole, and take over what an earlier version wrote.

        Raises:
            StartupError: It cannot be read, or not be made.
        """
        if self._descriptor >= 0:
            return
        try:
            self._descriptor = self._open_file()
        except (OSError, JournalFormatError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise StartupError(f"--data-dir: {self._file}: {why}") from None

    def _open_file(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self._file, flags, 0o600)
        try:
            data = self._file.read_bytes()
            valid = self._log.replay(data)
            if valid < len(data):
                logger.warning(
                    "the end of the journal is not whole",
                    extra={"path": str(self._file), "bytes": len(data) - valid},
                )
                os.ftruncate(descriptor, valid)
            old = self._read_old()
            if self._log.damage.regions or not self._log.file_bytes:
                descriptor = self._begin_anew(descriptor)
            for key, record in old.items():
                content = _encoder.encode(record)
                frame = self._log.frame(key, content)
                append(descriptor, frame)
                self._log.wrote(key, content, len(frame))
            self._new_file.unlink(missing_ok=True)
            os.fdatasync(descriptor)
            self._log.synced = self._log.sequence
            sync_directory(self._file.parent)
            for key in old:
                (self.path / key / _OLD_RECORD).unlink()
        except BaseException:
            os.close(descriptor)
            self._log = _new_log()
            raise
        self._written = self.synced = self._log.file_bytes
        return descriptor

    def _begin_anew(self, descriptor: int) -> int:
        """Put a new file in the place of one that is damaged, or has no begin yet; return it.

        That a record is not the newest one is in the new file: the next process knows it too.
        """
        self._tell_damage(self._log.damage)
        said: list[tuple[str, bytes]] = []
        for key, content in self._log.records():
            if key in self._log.damage.doubtful:
                with contextlib.suppress(msgspec.MsgspecError):
                    record = _decoder.decode(content)
                    record.uncertain = True
                    said.append((key, _encoder.encode(record)))
            else:
                said.append((key, content))
        log, whole = JournalLog.of(os.urandom(MARKER_BYTES), said)
        new = os.open(self._new_file, _NEW_FLAGS, 0o600)
        try:
            append(new, whole)
            os.fsync(new)
            replace(self._new_file, self._file)
        except BaseException:
            os.close(new)
            raise
        os.close(descriptor)
        self._log = log
        return new

    def _tell_damage(self, damage: Damage) -> None:
        if not damage.regions:
            return
        names = sorted(damage.doubtful)
        self.problem = (
            f"{damage.size_bytes} damaged bytes in {damage.regions} places were found when the "
            f"agent started: {damage.frames} records are lost, with the newest of {len(names)} "
            f"sandboxes that were known; check the disk"
        )
        logger.error(
            "the journal is damaged",
            extra={
                "path": str(self._file),
                "bytes": damage.size_bytes,
                "places": damage.regions,
                "records": damage.frames,
                "sandboxes": ",".join(names[:_NAMES_MAX]),
            },
        )

    def _read_old(self) -> dict[str, Record]:
        """Return the records that an earlier version wrote, each to its sandbox's directory."""
        found: dict[str, Record] = {}
        for entry in sorted(os.scandir(self.path), key=lambda each: each.name):
            path = Path(entry.path) / _OLD_RECORD
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, msgspec.MsgspecError) as error:
                logger.warning("no usable record", extra={"path": str(path), "error": str(error)})
                continue
            if record.version == VERSION and record.sandbox_id == entry.name:
                found[entry.name] = record
        return found


@functools.cache
def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def is_safe_id(sandbox_id: str) -> bool:
    """True if an id can be used as the name of a directory and of a cgroup."""
    return len(sandbox_id) <= 128 and _SAFE_ID.fullmatch(sandbox_id) is not None
