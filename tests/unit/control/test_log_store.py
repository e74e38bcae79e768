"""What the log keeps, and what it never gives back as if it were whole."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from prism_control.raft import entry_codec
from prism_control.raft.types import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Member,
    SnapshotMeta,
)
from prism_control.storage.errors import CorruptStoreError, DiskFullError, StorageError
from prism_control.storage.log import Formation, Identity, LogStore

ME = Member(7, "n1", "127.0.0.1:1", "127.0.0.1:2")
CONFIGURATION = Configuration(voters=(7,), members=(ME,))


def entries(first: int, last: int, term: int = 1, size: int = 10) -> tuple[Entry, ...]:
    return tuple(
        Entry(index, term, EntryKind.NORMAL, bytes([index % 251]) * size)
        for index in range(first, last + 1)
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LogStore]:
    made = LogStore(tmp_path / "log", lambda seconds: None)
    yield made
    made.close()


def reopened(store: LogStore) -> LogStore:
    path = store._path
    store.close()
    return LogStore(path, lambda seconds: None)


def test_what_was_persisted_is_loaded(store: LogStore) -> None:
    state = HardState(term=3, vote=7, commit=2)
    store.persist(state, None, entries(1, 5, term=2))
    store.persist(None, None, entries(6, 6, term=3))
    stored = reopened(store).load()
    assert stored.hard_state == state
    assert stored.entries == entries(1, 5, term=2) + entries(6, 6, term=3)
    assert stored.snapshot == SnapshotMeta()


def test_a_new_store_is_empty(store: LogStore) -> None:
    assert store.identity is None
    assert store.formation is None
    stored = store.load()
    assert (stored.hard_state, stored.snapshot, stored.entries) == (
        HardState(), SnapshotMeta(), (),
    )  # fmt: skip


def test_entries_replace_a_conflicting_tail(store: LogStore) -> None:
    store.persist(HardState(1, 7, 2), None, entries(1, 9))
    store.persist(HardState(2, 0, 3), None, entries(4, 5, term=2))
    assert store.load().entries == entries(1, 3) + entries(4, 5, term=2)


def test_compaction_keeps_the_margin_and_loads_it(store: LogStore) -> None:
    store.persist(HardState(1, 7, 90), None, entries(1, 100))
    meta = SnapshotMeta(80, 1, CONFIGURATION)
    store.compact(meta, 71)
    stored = reopened(store).load()
    assert stored.snapshot == meta
    assert stored.entries == entries(71, 100)


def test_a_received_snapshot_replaces_the_log(store: LogStore) -> None:
    store.persist(HardState(1, 7, 9), None, entries(1, 9))
    meta = SnapshotMeta(50, 3, CONFIGURATION)
    store.persist(HardState(3, 0, 50), meta, entries(51, 52, term=3))
    stored = store.load()
    assert (stored.snapshot, stored.entries) == (meta, entries(51, 52, term=3))


def test_a_member_is_bootstrapped_once(store: LogStore) -> None:
    entry = Entry(1, 1, EntryKind.CONFIGURATION, entry_codec.encode_configuration(CONFIGURATION))
    with pytest.raises(StorageError):
        store.bootstrap("cl-1", HardState(1, 0, 1), entry)
    store.set_identity(Identity(7, "n1"))
    store.set_formation(Formation("cl-1", b"x"))
    store.bootstrap("cl-1", HardState(1, 0, 1), entry)
    with pytest.raises(StorageError):
        store.bootstrap("cl-2", HardState(1, 0, 1), entry)
    again = reopened(store)
    assert again.identity == Identity(7, "n1", "cl-1")
    assert again.formation is None
    assert again.load().entries == (entry,)
    again.close()


# ── Damage ───────────────────────────────────────────────────────────────────────────────────────


def tamper(store: LogStore, change: Callable[[Any, object, object], None]) -> LogStore:
    """Change the database behind the store's back; return the store opened again."""
    path = store._path
    store.close()
    with lmdb.open(str(path), map_size=1 << 30, max_dbs=2) as environment:
        meta = environment.open_db(b"meta")
        log = environment.open_db(b"entries")
        with environment.begin(write=True) as txn:
            change(txn, meta, log)
    return LogStore(path, lambda seconds: None)


def key(index: int) -> bytes:
    return index.to_bytes(8, "big")


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_named_and_never_loaded(store: LogStore, seed: int) -> None:
    store.persist(HardState(1, 7, 5), None, entries(1, 5, size=30))
    chosen = random.Random(seed)
    index = chosen.randint(1, 5)

    def flip(txn: Any, meta: object, log: object) -> None:
        value = bytearray(txn.get(key(index), db=log))
        bit = chosen.randrange(len(value) * 8)
        value[bit // 8] ^= 1 << bit % 8
        txn.put(key(index), bytes(value), db=log)

    damaged = tamper(store, flip)
    with pytest.raises(CorruptStoreError, match=f"log entry {index} is corrupt"):
        damaged.load()
    damaged.close()


@pytest.mark.parametrize("name", [b"hard_state", b"snapshot"])
@pytest.mark.parametrize("seed", range(15))
def test_a_flipped_bit_in_a_record_is_named(store: LogStore, name: bytes, seed: int) -> None:
    """A vote or a term that is off by a bit is as good as a second vote."""
    store.persist(HardState(5, 7, 5), None, entries(1, 5))
    store.compact(SnapshotMeta(3, 1, CONFIGURATION), 2)
    chosen = random.Random(seed)

    def flip(txn: Any, meta: object, log: object) -> None:
        value = bytearray(txn.get(name, db=meta))
        value[chosen.randrange(len(value))] ^= 1 << chosen.randrange(8)
        txn.put(name, bytes(value), db=meta)

    damaged = tamper(store, flip)
    with pytest.raises(CorruptStoreError, match=name.decode()):
        damaged.load()
    damaged.close()


@pytest.mark.parametrize(
    ("gone", "words"),
    [([3], "entry 3 is missing"), ([5], "entries are missing"), ([1], "entries are missing"),
     ([1, 2, 3, 4, 5], "entries are missing")],
)  # fmt: skip
def test_a_missing_entry_is_named(store: LogStore, gone: list[int], words: str) -> None:
    store.persist(HardState(1, 7, 5), None, entries(1, 5))

    def delete(txn: Any, meta: object, log: object) -> None:
        for index in gone:
            txn.delete(key(index), db=log)

    damaged = tamper(store, delete)
    with pytest.raises(CorruptStoreError, match=words):
        damaged.load()
    damaged.close()


def test_a_log_that_ends_before_its_snapshot_is_refused(store: LogStore) -> None:
    store.persist(HardState(1, 7, 5), None, entries(1, 20))
    store.compact(SnapshotMeta(18, 1, CONFIGURATION), 10)

    def cut(txn: Any, meta: object, log: object) -> None:
        for index in range(15, 21):
            txn.delete(key(index), db=log)

    damaged = tamper(store, cut)
    with pytest.raises(CorruptStoreError, match="entries are missing"):
        damaged.load()
    damaged.close()


def test_an_entry_under_another_index_is_refused(store: LogStore) -> None:
    store.persist(HardState(1, 7, 5), None, entries(1, 5))

    def swap(txn: Any, meta: object, log: object) -> None:
        second, third = txn.get(key(2), db=log), txn.get(key(3), db=log)
        txn.put(key(2), third, db=log)
        txn.put(key(3), second, db=log)

    damaged = tamper(store, swap)
    with pytest.raises(CorruptStoreError):
        damaged.load()
    damaged.close()


@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_truncated_database_is_refused_and_kills_nobody(store: LogStore, tenths: int) -> None:
    for first in range(1, 200, 10):
        store.persist(HardState(1, 7, first), None, entries(first, first + 9, size=2000))
    path = store._path
    store.close()
    database = path / "data.mdb"
    os.truncate(database, database.stat().st_size * tenths // 10 // 4096 * 4096)
    with pytest.raises(CorruptStoreError, match=r"was truncated: it has \d+ bytes of \d+"):
        LogStore(path, lambda seconds: None)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir()
    (path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptStoreError, match="not a readable log"):
        LogStore(path, lambda seconds: None)


def test_another_schema_is_refused(store: LogStore) -> None:
    store._write(lambda txn: store._put(txn, b"schema", 99))
    path = store._path
    store.close()
    with pytest.raises(CorruptStoreError, match="schema 99"):
        LogStore(path, lambda seconds: None)


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────


def failing(store: LogStore, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(txn: object, index: int) -> None:
        raise error

    monkeypatch.setattr(store, "_cut", fail)


def test_a_failed_write_poisons_the_store(store: LogStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    with monkeypatch.context() as patch:
        failing(store, patch, lmdb.Error("mdb_txn_commit: Input/output error"))
        with pytest.raises(StorageError, match="Input/output error"):
            store.persist(HardState(2, 7, 0), None, entries(4, 4))
    # The disk may work again: what it holds is unknown all the same.
    with pytest.raises(StorageError, match="Input/output error"):
        store.persist(HardState(2, 7, 0), None, ())
    again = reopened(store)
    assert again.load().entries == entries(1, 3)
    again.close()


@pytest.mark.parametrize(
    "error",
    [
        lmdb.MapFullError("MDB_MAP_FULL"),
        lmdb.DiskError("mdb_txn_commit: No space left on device"),
        lmdb.Error("mdb_txn_commit: Disk quota exceeded"),
    ],
)
def test_a_full_disk_does_not(
    store: LogStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    with monkeypatch.context() as patch:
        failing(store, patch, error)
        with pytest.raises(DiskFullError):
            store.persist(HardState(2, 7, 0), None, entries(3, 4, term=2))
    assert store.load().entries == entries(1, 3)
    store.persist(HardState(2, 7, 0), None, entries(3, 4, term=2))
    assert store.load().entries == entries(1, 2) + entries(3, 4, term=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("size", [100, 5000, 70_000])
def test_a_disk_that_is_really_full_loses_nothing_and_goes_on(small_disk: Path, size: int) -> None:
    """LMDB says "input/output error" where the disk ends within a write."""
    store = LogStore(small_disk / "log", lambda seconds: None)
    last = 0
    refused = 0
    while refused < 20:
        wanted = entries(last + 1, last + 1 + refused, size=size)
        try:
            store.persist(HardState(1, 7, last), None, wanted)
            last = wanted[-1].index
        except DiskFullError:
            refused += 1
    assert store.load().entries == entries(1, last, size=size)
    grow = ["mount", "-o", "remount,size=8m", str(small_disk)]
    subprocess.run(grow, check=True)
    store.persist(HardState(1, 7, last), None, entries(last + 1, last + 3, size=size))
    again = reopened(store)
    assert again.load().entries == entries(1, last + 3, size=size)
    again.close()


def test_a_new_store_on_a_full_disk_is_refused_and_kills_nobody(small_disk: Path) -> None:
    with (small_disk / "ballast").open("wb") as file:
        status = os.statvfs(small_disk)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
    with pytest.raises(DiskFullError):
        LogStore(small_disk / "log", lambda seconds: None)


def test_each_commit_is_measured(tmp_path: Path) -> None:
    seen: list[float] = []
    store = LogStore(tmp_path / "log", seen.append)
    seen.clear()
    store.persist(HardState(1, 7, 0), None, entries(1, 1))
    assert len(seen) == 1
    store.close()
