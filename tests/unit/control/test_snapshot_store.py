"""Snapshots on disk: whole, or recognised as not."""

import random
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest

from prism_common.errors import StartupError
from prism_control.storage.directory import DataDirectory
from prism_control.storage.errors import CorruptStoreError
from prism_control.storage.incoming import OutOfOrderError, SnapshotIdentity
from prism_control.storage.snapshots import SnapshotStore

CHUNKS = [b"header", b"x" * 5000, bytes(range(256)), b"end"]


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")


def test_what_was_written_is_read(store: SnapshotStore) -> None:
    size = store.write(5, CHUNKS)
    assert size == store.file(5).stat().st_size
    assert list(store.read(5)) == CHUNKS


def test_empty_chunks_do_not_end_it(store: SnapshotStore) -> None:
    store.write(5, [b"a", b"", b"b"])
    assert list(store.read(5)) == [b"a", b"b"]


def test_a_missing_one_is_named(store: SnapshotStore) -> None:
    with pytest.raises(CorruptStoreError, match=r"00000000000000000005.snapshot"):
        list(store.read(5))


def test_every_truncation_is_recognised(store: SnapshotStore) -> None:
    store.write(5, [b"abc", b"defgh"])
    whole = store.file(5).read_bytes()
    for length in range(len(whole)):
        store.file(5).write_bytes(whole[:length])
        with pytest.raises(CorruptStoreError):
            list(store.read(5))
    store.file(5).write_bytes(whole + b"x")
    with pytest.raises(CorruptStoreError):
        list(store.read(5))


def test_every_flipped_bit_is_recognised(store: SnapshotStore) -> None:
    store.write(5, [b"abc", b"defgh"])
    whole = store.file(5).read_bytes()
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        store.file(5).write_bytes(damaged)
        with pytest.raises(CorruptStoreError):
            list(store.read(5))


def test_a_write_that_fails_leaves_nothing(store: SnapshotStore, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write(5, chunks())
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "snapshots"
    path.mkdir()
    (path / "00000000000000000009-1.partial").write_bytes(b"half")
    store = SnapshotStore(path)
    store.write(5, CHUNKS)
    assert [found.name for found in path.iterdir()] == ["00000000000000000005.snapshot"]


def test_the_one_in_force_outlives_newer_ones_that_nobody_took(store: SnapshotStore) -> None:
    """A received one is published before the core takes it, which it may never do."""
    for index in (5, 7, 9, 11):
        store.write(index, CHUNKS)
    store.prune(7)
    assert [store.file(index).exists() for index in (5, 7, 9, 11)] == [False, True, True, True]
    store.prune(7, newer=True)
    assert [store.file(index).exists() for index in (5, 7, 9, 11)] == [False, True, False, False]


def identity_of(whole: bytes, index: int = 5) -> SnapshotIdentity:
    return SnapshotIdentity(index, 2, len(whole), google_crc32c.value(whole))


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    other = SnapshotStore(tmp_path / "other")
    other.write(5, CHUNKS)
    return other.file(5).read_bytes()


def test_one_arrives_in_pieces(store: SnapshotStore, whole: bytes) -> None:
    incoming = store.incoming(identity_of(whole))
    for begin in range(0, len(whole), 100):
        assert store.arrived(identity_of(whole)) == begin
        incoming.write(begin, whole[begin : begin + 100])
    store.finish(incoming)
    assert list(store.read(5)) == CHUNKS
    assert store.arrived(identity_of(whole)) == 0


@pytest.mark.parametrize("known", [True, False])
def test_what_arrives_damaged_is_not_published(
    store: SnapshotStore, whole: bytes, tmp_path: Path, known: bool
) -> None:
    """Whether it was damaged on its way, or on the sender's disk, whose checksum then fits."""
    damaged = bytearray(whole)
    damaged[random.Random(1).randrange(len(damaged))] ^= 4
    incoming = store.incoming(identity_of(bytes(damaged) if known else whole))
    incoming.write(0, bytes(damaged))
    with pytest.raises(CorruptStoreError):
        store.finish(incoming)
    store.drop(incoming)
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_one_of_our_own_and_one_that_arrives_do_not_write_into_each_other(
    store: SnapshotStore, whole: bytes
) -> None:
    incoming = store.incoming(identity_of(whole))
    incoming.write(0, whole[:50])
    store.write(5, CHUNKS)
    incoming.write(50, whole[50:])
    store.finish(incoming)
    assert list(store.read(5)) == CHUNKS


def test_two_streams_of_one_snapshot_go_on_from_what_has_arrived(
    store: SnapshotStore, whole: bytes
) -> None:
    """A sender that reconnects, while its first stream is still open here."""
    first = store.incoming(identity_of(whole))
    first.write(0, whole[:50])
    second = store.incoming(identity_of(whole))
    assert second.offset == 50
    second.write(50, whole[50:80])
    with pytest.raises(OutOfOrderError):
        first.write(50, whole[50:90])
    second.write(80, whole[80:])
    store.finish(second)
    with pytest.raises(OutOfOrderError):
        first.write(len(whole), b"x")
    assert list(store.read(5)) == CHUNKS


def test_a_sender_may_begin_anew(store: SnapshotStore, whole: bytes) -> None:
    incoming = store.incoming(identity_of(whole))
    incoming.write(0, whole[:50])
    incoming.write(0, whole[:20])
    assert incoming.offset == 20
    incoming.write(20, whole[20:])
    store.finish(incoming)
    assert list(store.read(5)) == CHUNKS


def test_another_snapshot_takes_the_place_of_one_in_part(
    store: SnapshotStore, whole: bytes, tmp_path: Path
) -> None:
    first = store.incoming(identity_of(whole, 5))
    first.write(0, whole[:50])
    second = store.incoming(identity_of(whole, 6))
    assert store.arrived(identity_of(whole, 5)) == second.offset == 0
    with pytest.raises(OutOfOrderError):
        first.write(50, whole[50:])
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


def test_one_of_a_sender_that_announces_no_checksum_is_still_checked_by_its_records(
    store: SnapshotStore, whole: bytes
) -> None:
    identity = SnapshotIdentity(5, 2, len(whole), 0)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    incoming = store.incoming(identity)
    incoming.write(0, bytes(damaged))
    with pytest.raises(CorruptStoreError):
        store.finish(incoming)
    store.drop(incoming)
    incoming = store.incoming(identity)
    incoming.write(0, whole)
    store.finish(incoming)
    assert store.file(5).read_bytes() == whole


def test_no_more_is_taken_than_was_announced(store: SnapshotStore, whole: bytes) -> None:
    incoming = store.incoming(SnapshotIdentity(5, 2, 60, 0))
    incoming.write(0, whole[:50])
    with pytest.raises(CorruptStoreError, match="more than 60"):
        incoming.write(50, whole[50:])


def test_a_data_directory_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    first = DataDirectory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StartupError, match="in use by another process"):
        DataDirectory(path)
    first.close()
    DataDirectory(path).close()


def test_a_data_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="--data-dir"):
        DataDirectory(tmp_path / "file")


def test_room_is_what_is_above_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_control.storage.directory._LOOK_INTERVAL_S", 0)
    directory = DataDirectory(tmp_path / "d")
    assert directory.has_room()
    monkeypatch.setattr("prism_control.storage.directory.RESERVE_BYTES", 2**60)
    assert not directory.has_room()
    directory.close()
