"""What the log keeps, and what it never gives back as if it were whole."""

import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from prism_control.storage.tail import PAYLOAD_BYTES_MAX

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


def after_a_crash(store: LogStore) -> LogStore:
    """Open what a store that goes on has on disk at this moment."""
    path = Path(tempfile.mkdtemp(dir=store._path.parent))
    subprocess.run(["cp", "-r", "--sparse=always", f"{store._path}/.", str(path)], check=True)
    return LogStore(path, lambda seconds: None)


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


# ── The tail ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Model:
    """What a store should hold."""

    hard_state: HardState = field(default_factory=HardState)
    snapshot: SnapshotMeta = field(default_factory=SnapshotMeta)
    entries: list[Entry] = field(default_factory=list)

    def persist(
        self, state: HardState | None, snapshot: SnapshotMeta | None, new: Sequence[Entry]
    ) -> None:
        self.hard_state = state or self.hard_state
        if snapshot is not None:
            self.snapshot, self.entries = snapshot, []
        if new:
            self.entries = [e for e in self.entries if e.index < new[0].index] + list(new)

    def held(self) -> tuple[HardState, SnapshotMeta, tuple[Entry, ...]]:
        return self.hard_state, self.snapshot, tuple(self.entries)


def held(store: LogStore) -> tuple[HardState, SnapshotMeta, tuple[Entry, ...]]:
    stored = store.load()
    return stored.hard_state, stored.snapshot, stored.entries


@pytest.mark.parametrize("seed", range(30))
def test_a_crash_at_any_moment_keeps_all_that_was_written(tmp_path: Path, seed: int) -> None:
    """Writes of all sizes, cuts, votes, snapshots, compaction; crashes, and clean ends between."""
    chosen = random.Random(seed)
    store, model, term = LogStore(tmp_path / "log", lambda seconds: None), Model(), 1
    for _ in range(60):
        last = model.entries[-1].index if model.entries else model.snapshot.index
        match chosen.choices(("append", "cut", "vote", "install", "compact"), (12, 3, 2, 1, 1))[0]:
            case "append":
                size = chosen.choice((10, 10, 400, 5000, 40_000, LARGE))
                new = entries(last + 1, last + chosen.randint(1, 8), term, size)
                state = chosen.choice((None, HardState(term, 7, last)))
                store.persist(state, None, new)
                model.persist(state, None, new)
            case "cut":
                term += 1
                first = chosen.randint(max(model.hard_state.commit, model.snapshot.index), last) + 1
                new = entries(first, first + chosen.randint(0, 3), term)
                state = HardState(term, 0, model.hard_state.commit)
                store.persist(state, None, new)
                model.persist(state, None, new)
            case "vote":
                term += 1
                state = HardState(term, chosen.randint(1, 3), model.hard_state.commit)
                store.persist(state, None, ())
                model.persist(state, None, ())
            case "install":
                meta = SnapshotMeta(last + chosen.randint(1, 50), term, CONFIGURATION)
                state = HardState(term, 0, meta.index)
                new = entries(meta.index + 1, meta.index + chosen.randint(0, 2), term)
                store.persist(state, meta, new)
                model.persist(state, meta, new)
            case "compact" if model.entries:
                index = chosen.choice(model.entries).index
                meta = SnapshotMeta(index, term, CONFIGURATION)
                first_kept = chosen.randint(model.entries[0].index, index + 1)
                store.compact(meta, first_kept)
                model.snapshot = meta
                model.entries = [e for e in model.entries if e.index >= first_kept]
        match chosen.random():
            case x if x < 0.1:
                left, store = store, after_a_crash(store)
                left.close()
                shutil.rmtree(left._path)
            case x if x < 0.15:
                store = reopened(store)
        assert held(store) == model.held()
    crashed = after_a_crash(store)
    assert held(crashed) == model.held()
    assert held(reopened(crashed)) == model.held()


@pytest.mark.parametrize("size", [100, 6000])
def test_a_write_that_power_loss_cut_short_is_left_out(store: LogStore, size: int) -> None:
    """Whole sectors of it are as they were before, any of them."""
    path = store._path / "tail"
    for index in range(1, 4):
        store.persist(HardState(1, 7, 0), None, entries(index, index, size=size))
    before = path.read_bytes()
    store.persist(HardState(2, 7, 0), None, entries(4, 4, term=2, size=size))
    after = path.read_bytes()
    changed = [
        at for at in range(0, len(after), 512) if after[at : at + 512] != before[at : at + 512]
    ]
    assert changed
    for lost in changed:
        torn = after[:lost] + before[lost : lost + 512] + after[lost + 512 :]
        path.write_bytes(torn)
        crashed = after_a_crash(store)
        assert held(crashed)[::2] == (HardState(1, 7, 0), entries(1, 3, size=size))
        crashed.persist(HardState(3, 7, 0), None, entries(4, 4, term=3, size=size))
        again = after_a_crash(crashed)
        assert again.load().entries[-1].term == 3
    path.write_bytes(after)
    assert after_a_crash(store).load().entries[-1].term == 2


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_the_tail_is_named(store: LogStore, seed: int) -> None:
    for index in range(1, 9):
        store.persist(HardState(1, 7, 0), None, entries(index, index, size=700 * index))
    path, chosen = store._path / "tail", random.Random(seed)
    data = bytearray(path.read_bytes())
    # Of the first seven; what comes after the last cannot tell whether that was promised.
    blocks = [1, 1, 1, 1, 1, 2, 2]
    number = chosen.randrange(len(blocks))
    start = sum(blocks[:number]) * 4096
    bit = chosen.randrange((44 + 700 * (number + 1)) * 8)
    data[start + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=f"record {number} is corrupt"):
        after_a_crash(store)


def test_what_a_user_sends_cannot_pass_for_a_record(store: LogStore) -> None:
    """Blocks of the tail, in an entry, from an earlier generation and from this one."""
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    record = (store._path / "tail").read_bytes()[:4096]
    sent = Entry(4, 1, EntryKind.NORMAL, b"".join(record[i:] + record[:i] for i in range(8)))
    store.persist(None, None, [sent])
    assert after_a_crash(store).load().entries == (*entries(1, 3), sent)
    store.compact(SnapshotMeta(3, 1, CONFIGURATION), 1)
    store.persist(None, None, entries(5, 5))
    assert after_a_crash(store).load().entries == (*entries(1, 3), sent, *entries(5, 5))


@pytest.mark.parametrize("size", [0, 4096, (1 << 20) - 1])
def test_a_tail_that_is_cut_or_gone_is_refused(store: LogStore, size: int) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    os.truncate(store._path / "tail", size)
    with pytest.raises(CorruptStoreError, match="tail was truncated"):
        after_a_crash(store)
    (store._path / "tail").unlink()
    with pytest.raises(CorruptStoreError, match="tail was truncated: it has 0 bytes"):
        after_a_crash(store)


def test_after_a_crash_nothing_is_told_that_is_not_durable(
    store: LogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be read may never have reached the disk; what is written again is flushed."""
    store.persist(HardState(1, 7, 0), None, entries(1, 1))
    store.persist(None, None, entries(2, 2))
    done: list[tuple[str, int]] = []
    write, flush = os.pwrite, os.fdatasync

    def note_write(file: int, data: bytes, offset: int) -> int:
        done.append(("write", offset))
        return write(file, data, offset)

    def note_flush(file: int) -> None:
        done.append(("flush", 0))
        flush(file)

    before = (store._path / "tail").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("prism_control.storage.tail.os.pwrite", note_write)
        patch.setattr("prism_control.storage.tail.os.fdatasync", note_flush)
        crashed = after_a_crash(store)
        assert done == [("write", 4096), ("flush", 0)]
        assert (crashed._path / "tail").read_bytes() == before
        # And the page of the database that names the generation may be such a page.
        crashed.persist(None, None, entries(3, 3))
        assert done[2:] == [("write", 0), ("flush", 0)]
        crashed.persist(None, None, entries(4, 4))
        assert done[4:] == [("write", 4096), ("flush", 0)]
    assert after_a_crash(crashed).load().entries == entries(1, 4)


def test_where_no_tail_can_be_made_the_database_does_without(
    store: LogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, flags: int, mode: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("prism_control.storage.tail.os.open", fail)
        store.persist(HardState(1, 7, 0), None, entries(1, 3))
    assert not (store._path / "tail").exists()
    assert after_a_crash(store).load().entries == entries(1, 3)
    store.persist(None, None, entries(4, 4))
    assert (store._path / "tail").exists()
    assert after_a_crash(store).load().entries == entries(1, 4)


@pytest.mark.parametrize("size", [1, 4096 * 256, 4096 * 300])
def test_a_tail_is_whole_before_it_is_used(store: LogStore, size: int) -> None:
    """Whatever is there: of who was killed while making it, or of another release."""
    path = store._path / "tail"
    path.touch()
    os.truncate(path, size)
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    assert path.stat().st_size == 4096 * 256
    assert after_a_crash(store).load().entries == entries(1, 3)
    if size != 4096 * 256:
        assert path.stat().st_blocks * 512 >= 4096 * 256


def test_after_a_clean_end_all_is_in_the_database(store: LogStore) -> None:
    """So that a release that knows of no tail can go on from there."""
    store.persist(HardState(1, 7, 2), None, entries(1, 3))
    path = store._path
    store.close()
    (path / "tail").unlink()
    again = LogStore(path, lambda seconds: None)
    assert held(again)[::2] == (HardState(1, 7, 2), entries(1, 3))
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
    with lmdb.open(str(path), max_dbs=2, readonly=True) as environment:
        used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    os.truncate(path / "data.mdb", used * tenths // 10 // 4096 * 4096)
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


#: Of entries that are too large for the tail, and go into the database at once.
LARGE = PAYLOAD_BYTES_MAX + 1


def failing(store: LogStore, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(txn: object, index: int) -> None:
        raise error

    monkeypatch.setattr(store, "_cut", fail)


def test_a_failed_write_poisons_the_store(store: LogStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    with monkeypatch.context() as patch:
        failing(store, patch, lmdb.Error("mdb_txn_commit: Input/output error"))
        with pytest.raises(StorageError, match="Input/output error"):
            store.persist(HardState(2, 7, 0), None, entries(4, 4, size=LARGE))
    # The disk may work again: what it holds is unknown all the same.
    with pytest.raises(StorageError, match="Input/output error"):
        store.persist(HardState(2, 7, 0), None, ())
    again = reopened(store)
    assert again.load().entries == entries(1, 3)
    again.close()


def test_a_full_disk_at_the_page_that_commits_poisons_the_store(
    store: LogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there or not; and LMDB itself would not go on."""
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    with monkeypatch.context() as patch:
        failing(store, patch, lmdb.DiskError("mdb_txn_commit: No space left on device"))
        patch.setattr(store, "_is_sound", lambda: False)
        with pytest.raises(StorageError, match="No space left"):
            store.persist(HardState(2, 7, 0), None, entries(4, 4, size=LARGE))
    with pytest.raises(StorageError, match="No space left"):
        store.persist(HardState(2, 7, 0), None, entries(4, 4))


def test_what_was_refused_is_not_written_to(store: LogStore) -> None:
    store.persist(HardState(1, 7, 5), None, entries(1, 5))
    store.compact(SnapshotMeta(2, 1, CONFIGURATION), 1)
    store.persist(HardState(1, 7, 9), None, entries(6, 6))
    crashed = after_a_crash(store)
    with pytest.raises(CorruptStoreError, match="9 was committed: entries are missing"):
        crashed.load()
    before = {path.name: path.read_bytes() for path in crashed._path.iterdir()}
    crashed.close()
    assert {path.name: path.read_bytes() for path in crashed._path.iterdir()} == before


def test_where_the_identity_was_refused_nothing_is_written(store: LogStore) -> None:
    store.set_identity(Identity(7, "n1", "cl-1"))

    def flip(txn: Any, meta: object, log: object) -> None:
        value = bytearray(txn.get(b"identity", db=meta))
        value[-1] ^= 1
        txn.put(b"identity", bytes(value), db=meta)

    damaged = tamper(store, flip)
    damaged.persist(HardState(1, 7, 0), None, entries(1, 1))
    with pytest.raises(CorruptStoreError, match="identity"):
        _ = damaged.identity
    before = {path.name: path.read_bytes() for path in damaged._path.iterdir()}
    damaged.close()
    assert {path.name: path.read_bytes() for path in damaged._path.iterdir()} == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_flush_of_the_tail_poisons_the_store(
    store: LogStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))

    def fail(file: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("prism_control.storage.tail.os.fdatasync", fail)
        with pytest.raises(StorageError, match=os.strerror(code)):
            store.persist(HardState(2, 7, 0), None, entries(4, 4))
    with pytest.raises(StorageError, match=os.strerror(code)):
        store.persist(HardState(2, 7, 0), None, entries(4, 4, size=LARGE))
    again = reopened(store)
    # It was not promised, and is there all the same: another disk might have lost it.
    assert again.load().entries in (entries(1, 3), entries(1, 4))
    again.close()


def test_a_filesystem_that_has_no_room_for_what_is_in_place_loses_nothing(
    store: LogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.persist(HardState(1, 7, 0), None, entries(1, 3))
    write = os.pwrite

    def write_a_part(file: int, data: bytes, offset: int) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:10], offset)

    with monkeypatch.context() as patch:
        patch.setattr("prism_control.storage.tail.os.pwrite", write_a_part)
        with pytest.raises(DiskFullError):
            store.persist(HardState(2, 7, 0), None, entries(4, 4, term=2))
    crashed = after_a_crash(store).load()
    assert (crashed.hard_state, crashed.entries) == (HardState(1, 7, 0), entries(1, 3))
    store.persist(HardState(3, 7, 0), None, entries(4, 5, term=3))
    assert after_a_crash(store).load().entries == entries(1, 3) + entries(4, 5, term=3)


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
            store.persist(HardState(2, 7, 0), None, entries(3, 4, term=2, size=LARGE))
    assert store.load().entries == after_a_crash(store).load().entries == entries(1, 3)
    store.persist(HardState(2, 7, 0), None, entries(3, 4, term=2, size=LARGE))
    assert store.load().entries == entries(1, 2) + entries(3, 4, term=2, size=LARGE)


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


def test_after_a_crash_on_a_full_disk_a_vote_can_be_kept(small_disk: Path) -> None:
    def crash(store: LogStore) -> LogStore:
        assert store._tail is not None
        store._tail.close()
        store._env.close()
        return LogStore(small_disk / "log", lambda seconds: None)

    store = LogStore(small_disk / "log", lambda seconds: None)
    store.persist(HardState(1, 7, 0), None, entries(1, 9, size=3000))
    fill(small_disk)
    again = crash(store)
    again.persist(HardState(2, 8, 0), None, ())
    again.persist(None, None, entries(10, 10))
    assert held(again)[::2] == (HardState(2, 8, 0), entries(1, 9, size=3000) + entries(10, 10))
    (small_disk / "ballast").unlink()
    again.persist(HardState(3, 8, 0), None, ())
    last = crash(again)
    assert held(last)[::2] == (HardState(3, 8, 0), entries(1, 9, size=3000) + entries(10, 10))
    last.close()


def fill(disk: Path) -> None:
    """Leave no room on it."""
    with (disk / "ballast").open("wb") as file:
        status = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)


def test_a_new_store_on_a_full_disk_is_refused_and_kills_nobody(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(DiskFullError):
        LogStore(small_disk / "log", lambda seconds: None)


def test_each_commit_is_measured(tmp_path: Path) -> None:
    seen: list[float] = []
    store = LogStore(tmp_path / "log", seen.append)
    store.persist(HardState(1, 7, 0), None, entries(1, 1))
    for index, size in ((2, 10), (3, LARGE)):
        seen.clear()
        store.persist(None, None, entries(index, index, size=size))
        assert len(seen) == 1
    store.close()
