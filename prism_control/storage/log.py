"""Raft's log and hard state in LMDB, and what is newest in a tail beside it.

LMDB is copy-on-write: a crash leaves the state before or after a transaction, never a part of
it. Each entry and each record carries its own CRC-32C besides, because LMDB has no checksums.
A transaction takes two flushes of the disk, one after the other; a small write goes into the tail,
with one, and into LMDB together with many others (docs/adr/0029).
"""

import errno
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import google_crc32c
import lmdb
import msgspec

from prism_control.raft import entry_codec
from prism_control.raft.errors import CorruptEntryError
from prism_control.raft.types import Entry, HardState, MemberId, SnapshotMeta
from prism_control.storage import tail
from prism_control.storage.errors import CorruptStoreError, DiskFullError, StorageError
from prism_control.storage.tail import Tail

logger = logging.getLogger(__name__)

#: Address space, not disk: the file grows with the log, which compaction bounds far below this.
MAP_BYTES: Final = 64 * 2**30
#: All is in LMDB, as it is after a clean end: releases that know of no tail go on from there.
SCHEMA_VERSION: Final = 1
#: There is a tail beside it.
_SCHEMA_WITH_TAIL: Final = 2

_KEY: Final = struct.Struct(">Q")
_CRC: Final = struct.Struct(">I")
#: With less than this free, LMDB's "input/output error" is a write that was cut short by the end of
#: the disk. Nothing was committed, and what it had written has taken up the rest.
_FULL_BYTES: Final = 1 * 2**20
#: More than a transaction takes for all but the entries that are new: what the tail holds, and
#: LMDB's own pages.
_HEADROOM_BYTES: Final = 8 * 2**20
#: LMDB's size for 126 readers.
_LOCK_FILE_BYTES: Final = 8192
T = TypeVar("T")


class Identity(msgspec.Struct, frozen=True):
    """Who this member is. Made at first start; the cluster is added when it is formed."""

    member_id: MemberId
    name: str
    cluster_id: str = ""


class Formation(msgspec.Struct, frozen=True):
    """A first configuration that this member has accepted and that is not yet agreed by all."""

    cluster_id: str
    configuration: bytes


class _Write(msgspec.Struct, frozen=True, array_like=True):
    """What a record of the tail holds: the entries, encoded, replace all from `first` on."""

    hard_state: HardState | None
    first: int
    entries: list[bytes]


@dataclass(frozen=True, slots=True)
class StoredLog:
    """What a member starts from."""

    hard_state: HardState
    snapshot: SnapshotMeta
    entries: tuple[Entry, ...]


class LogStore:
    """The durable half of a Raft member.

    A failed commit or fsync poisons the store: whatever the disk then holds is unknown, and every
    later call fails (the "fsyncgate" lesson: after EIO a second fsync may lie). A full disk does
    not: the transaction did not happen.

    Args:
        path: Directory for the database.
        observe_fsync: Told the seconds that each commit took.
    """

    def __init__(self, path: Path, observe_fsync: Callable[[float], None]) -> None:
        self._path = path
        self._database = path / "data.mdb"
        self._observe_fsync = observe_fsync
        self._poison: str | None = None
        self._tail: Tail | None = None
        #: Whether a change of the database should come first: a crash may have left its newest page
        #: where it can be read and is not durable, and the tail's generation is in there.
        self._must_fold = False
        #: What is in the tail and not in LMDB.
        self._pending: list[_Write] = []
        try:
            _reserve_lock_file(path)
            self._env = lmdb.open(
                str(path), map_size=MAP_BYTES, max_dbs=2, sync=True, metasync=True, mode=0o600
            )
            self._check_size()
            self._database_bytes = self._database.stat().st_size
            self._meta = self._env.open_db(b"meta")
            self._entries = self._env.open_db(b"entries")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError from None
            raise CorruptStoreError(f"--data-dir: {path}: {error.strerror}") from None
        except lmdb.Error as error:
            if self._is_disk_full(error):
                raise DiskFullError from None
            raise CorruptStoreError(f"--data-dir: {path} is not a readable log: {error}") from None
        version = self._get(b"schema", int)
        if version is None:
            self._write(lambda txn: self._put(txn, b"schema", SCHEMA_VERSION))
        elif version == _SCHEMA_WITH_TAIL:
            self._open_tail()
        elif version != SCHEMA_VERSION:
            raise CorruptStoreError(
                f"--data-dir: {path} has schema {version}; this version reads {SCHEMA_VERSION}"
            )

    @property
    def identity(self) -> Identity | None:
        """Who this member is; None on a new disk."""
        return self._get(b"identity", Identity)

    @property
    def formation(self) -> Formation | None:
        """The accepted first configuration, until it is agreed."""
        return self._get(b"formation", Formation)

    def set_identity(self, identity: Identity) -> None:
        """Write who this member is."""
        self._write(lambda txn: self._put(txn, b"identity", identity))

    def set_formation(self, formation: Formation) -> None:
        """Write the promise to start with this configuration and no other."""
        self._write(lambda txn: self._put(txn, b"formation", formation))

    def bootstrap(self, cluster_id: str, hard_state: HardState, entry: Entry) -> None:
        """Write the first configuration and the cluster's id in one transaction."""
        identity = self.identity
        if identity is None or identity.cluster_id:
            raise StorageError("a member is bootstrapped once, after it has an identity")

        def write(txn: Any) -> None:
            self._put(txn, b"identity", msgspec.structs.replace(identity, cluster_id=cluster_id))
            self._put(txn, b"hard_state", hard_state)
            txn.put(_KEY.pack(entry.index), entry_codec.encode(entry), db=self._entries)
            txn.delete(b"formation", db=self._meta)

        self._write(write)

    def join(self, cluster_id: str) -> None:
        """Write that this member, whose log is empty, belongs to a running cluster."""
        identity = self.identity
        if identity is None or identity.cluster_id:
            raise StorageError("a member joins once, after it has an identity")
        joined = msgspec.structs.replace(identity, cluster_id=cluster_id)
        self._write(lambda txn: self._put(txn, b"identity", joined))

    def restore(self, identity: Identity, hard_state: HardState, snapshot: SnapshotMeta) -> None:
        """Write that this member, whose log is empty, begins with a snapshot that is on disk."""

        def write(txn: Any) -> None:
            self._put(txn, b"identity", identity)
            self._put(txn, b"hard_state", hard_state)
            self._put(txn, b"snapshot", snapshot)

        self._write(write)

    def load(self) -> StoredLog:
        """Read everything, checking each entry's CRC and that no index is missing.

        Raises:
            CorruptStoreError: Something is not as it was written; it names the index. Nothing is
                written any more.
        """
        try:
            return self._load()
        except CorruptStoreError as error:
            self._poison = str(error)
            raise

    def _load(self) -> StoredLog:
        hard_state = self._get(b"hard_state", HardState) or HardState()
        snapshot = self._get(b"snapshot", SnapshotMeta) or SnapshotMeta()
        try:
            entries = self._read_entries()
        except lmdb.Error as error:
            raise CorruptStoreError(f"the log cannot be read: {error}") from None
        for write in self._pending:
            hard_state = write.hard_state or hard_state
            while write.entries and entries and entries[-1].index >= write.first:
                entries.pop()
            for index, value in enumerate(write.entries, write.first):
                _add(entries, index, value)
        first, last = (
            (entries[0].index, entries[-1].index)
            if entries
            else (snapshot.index + 1, snapshot.index)
        )
        if first > snapshot.index + 1 or last < max(hard_state.commit, snapshot.index):
            raise CorruptStoreError(
                f"the log holds {first} to {last}, but the snapshot ends at {snapshot.index} and "
                f"{hard_state.commit} was committed: entries are missing"
            )
        return StoredLog(hard_state, snapshot, tuple(entries))

    def _read_entries(self) -> list[Entry]:
        entries: list[Entry] = []
        with self._env.begin(db=self._entries) as txn:
            for key, value in txn.cursor():
                _add(entries, _KEY.unpack(key)[0], bytes(value))
        return entries

    def persist(
        self, hard_state: HardState | None, snapshot: SnapshotMeta | None, entries: Sequence[Entry]
    ) -> None:
        """Write one turn's changes durably: a received snapshot, the log's new end, hard state.

        Entries replace whatever the log has at their first index and after.

        Raises:
            DiskFullError: Nothing happened; try again when there is room.
            StorageError: The store is poisoned; the member must stop.
        """
        first = entries[0].index if entries else 0
        new = _Write(hard_state, first, [entry_codec.encode(entry) for entry in entries])
        if snapshot is None and self._append(new):
            return

        def write(txn: Any) -> None:
            if snapshot is not None:
                self._put(txn, b"snapshot", snapshot)
                self._cut(txn, 0)
            self._put_write(txn, new)

        self._write(write, sum(map(len, new.entries)))

    def compact(self, snapshot: SnapshotMeta, first_kept: int) -> None:
        """Record a snapshot that is on disk, and drop the entries before `first_kept`."""

        def write(txn: Any) -> None:
            self._put(txn, b"snapshot", snapshot)
            cursor = txn.cursor(db=self._entries)
            while cursor.first() and _KEY.unpack(cursor.key())[0] < first_kept:
                cursor.delete()

        self._write(write)

    def close(self) -> None:
        """Move all into the database, if it can still be written, and close it."""
        if self._tail is not None:
            try:
                self._write(lambda txn: self._put(txn, b"schema", SCHEMA_VERSION))
            except (DiskFullError, StorageError) as error:
                logger.warning("the log's tail stays beside it, as after a crash: %s", error)
            self._tail.close()
            self._tail = None
        self._env.close()

    # ── The tail ─────────────────────────────────────────────────────────────────────────────

    def _open_tail(self) -> None:
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise CorruptStoreError(
                f"--data-dir: {self._path} cannot be flushed: {error}"
            ) from None
        generation = self._get(b"tail", bytes)
        if generation is None:
            raise CorruptStoreError(f"--data-dir: {self._path}: the tail's generation is missing")
        try:
            self._tail, payloads = Tail.reopen(self._path / "tail", generation)
        except OSError as error:
            raise CorruptStoreError(f"the log's tail cannot be read: {error}") from None
        self._must_fold = True
        try:
            self._pending = [msgspec.msgpack.decode(payload, type=_Write) for payload in payloads]
        except msgspec.MsgspecError as error:
            self._tail.close()
            raise CorruptStoreError(f"the log's tail cannot be read: {error}") from None

    def _append(self, new: _Write) -> bool:
        """Write to the tail; return whether there was room."""
        if sum(map(len, new.entries)) > tail.PAYLOAD_BYTES_MAX:
            return False
        if self._must_fold:
            # On a full disk the tail alone lets this member vote, and lead: its page was flushed.
            with suppress(DiskFullError):
                self._write(lambda txn: None)
        payload = msgspec.msgpack.encode(new)
        with self._failures():
            into = self._tail or self._begin_tail()
            if into is None or not into.has_room(payload):
                return False
            started = time.perf_counter()
            into.append(payload)
        self._pending.append(new)
        self._observe_fsync(time.perf_counter() - started)
        return True

    def _begin_tail(self) -> Tail | None:
        """Return a tail; None if there is no room for one."""
        generation = tail.new_generation()
        try:
            begun = Tail.begin(self._path / "tail", generation)
        except DiskFullError:
            return None

        def write(txn: Any) -> None:
            self._put(txn, b"tail", generation)
            self._put(txn, b"schema", _SCHEMA_WITH_TAIL)

        try:
            self._write(write)
        except BaseException:
            begun.close()
            raise
        self._tail = begun
        return begun

    def _fold(self, txn: Any) -> bytes | None:
        """Move what the tail holds; return the generation that then begins, if one must."""
        if not (self._pending or self._must_fold):
            return None
        for write in self._pending:
            self._put_write(txn, write)
        generation = tail.new_generation()
        self._put(txn, b"tail", generation)
        return generation

    # ── The database ─────────────────────────────────────────────────────────────────────────

    def _check_size(self) -> None:
        """Refuse a database file that was cut: touching a page past its end kills the process."""
        needed = self._used_bytes()
        size = self._database.stat().st_size
        # A new database has no pages yet.
        if size < needed > 2 * int(self._env.stat()["psize"]):
            raise CorruptStoreError(
                f"--data-dir: {self._path} was truncated: it has {size} bytes of {needed}"
            )

    def _used_bytes(self) -> int:
        pages: int = self._env.info()["last_pgno"] + 1
        return pages * int(self._env.stat()["psize"])

    def _extend(self, new_bytes: int) -> None:
        """Let the file reach past all that a transaction may use. What is not written is a hole.

        A transaction may take pages at the end and give them back unwritten: the file would be
        shorter than LMDB says, as if it had been cut.
        """
        wanted = self._used_bytes() + 2 * new_bytes + _HEADROOM_BYTES
        if wanted > self._database_bytes:
            try:
                os.truncate(self._database, wanted + _HEADROOM_BYTES)
            except OSError as error:
                tail.raise_if_full(error)
                raise
            self._database_bytes = wanted + _HEADROOM_BYTES

    def _put_write(self, txn: Any, write: _Write) -> None:
        if write.entries:
            self._cut(txn, write.first)
            items = [(_KEY.pack(i), entry) for i, entry in enumerate(write.entries, write.first)]
            txn.cursor(db=self._entries).putmulti(items, append=True)
        if write.hard_state is not None:
            self._put(txn, b"hard_state", write.hard_state)

    def _cut(self, txn: Any, index: int) -> None:
        cursor = txn.cursor(db=self._entries)
        while cursor.set_range(_KEY.pack(index)):
            cursor.delete()

    def _get(self, key: bytes, kind: type[T]) -> T | None:
        try:
            with self._env.begin(db=self._meta) as txn:
                record = txn.get(key)
        except lmdb.Error as error:
            raise self._corrupt(f"{key.decode()} cannot be read: {error}") from None
        if record is None:
            return None
        value = record[_CRC.size :]
        if record[: _CRC.size] != _CRC.pack(google_crc32c.value(value)):
            raise self._corrupt(f"{key.decode()} on disk is corrupt: CRC-32C differs")
        try:
            return msgspec.msgpack.decode(value, type=kind)
        except msgspec.MsgspecError as error:
            raise self._corrupt(f"{key.decode()} on disk is corrupt: {error}") from None

    def _corrupt(self, message: str) -> CorruptStoreError:
        """Return what to raise; from now on nothing is written, also not at the end."""
        self._poison = message
        return CorruptStoreError(message)

    def _put(self, txn: Any, key: bytes, value: object) -> None:
        encoded = msgspec.msgpack.encode(value)
        record = _CRC.pack(google_crc32c.value(encoded)) + encoded
        txn.put(key, record, db=self._meta)

    def _write(self, write: Callable[[Any], object], new_bytes: int = 0) -> None:
        """Change the database, in one transaction with all that the tail holds."""
        with self._failures():
            started = time.perf_counter()
            self._extend(new_bytes)
            with self._env.begin(write=True) as txn:
                generation = self._fold(txn)
                write(txn)
            if self._tail is not None and generation is not None:
                self._pending.clear()
                self._tail.restart(generation)
                self._must_fold = False
        self._observe_fsync(time.perf_counter() - started)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Say what a failed write means: nothing happened, or nobody knows what did.

        Raises:
            DiskFullError, StorageError: As `persist` says.
        """
        if self._poison is not None:
            raise StorageError(self._poison)
        try:
            yield
        except (lmdb.Error, OSError) as error:
            if isinstance(error, lmdb.Error) and self._is_disk_full(error) and self._is_sound():
                raise DiskFullError from None
            self._poison = f"the log could not be written: {error}"
            raise StorageError(self._poison) from error

    def _is_disk_full(self, error: lmdb.Error) -> bool:
        if isinstance(error, lmdb.MapFullError):
            return True
        text = str(error)
        if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
            return True
        if os.strerror(errno.EIO) not in text:
            return False
        try:
            status = os.statvfs(self._path)
        except OSError:
            return False
        return status.f_bavail * status.f_frsize < _FULL_BYTES

    def _is_sound(self) -> bool:
        """Whether LMDB would go on: not where the write of the page failed that commits all."""
        try:
            with self._env.begin():
                return True
        except lmdb.Error:
            return False


def _add(entries: list[Entry], index: int, value: bytes) -> None:
    """Decode what was stored under an index, and add it to those before it."""
    try:
        entry = entry_codec.decode(value)
    except CorruptEntryError as error:
        raise CorruptStoreError(f"log entry {index} is corrupt: {error}") from None
    expected = entries[-1].index + 1 if entries else index
    if entry.index != index or index != expected:
        raise CorruptStoreError(
            f"log entry {expected} is missing: found {entry.index} under {index}"
        )
    entries.append(entry)


def _reserve_lock_file(path: Path) -> None:
    """Give LMDB's lock file its room: it is mapped, and without room a write kills the process."""
    path.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(descriptor)
