"""Snapshots to those that are far behind, and disks that are full or damaged."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import lmdb
import pytest
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc

from tests.integration.harness import (
    WAIT_S,
    ControlNode,
    cluster,
    logs_on_failure,
    reason_of,
    wait_for,
)


def test_a_follower_that_is_far_behind_gets_a_snapshot(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, "--snapshot-entries=50", "--batching-enabled=false") as made:
        behind = made.followers()[0]
        behind.kill()
        leader = made.leader()
        for number in range(150):
            leader.create(f"s{number}")
        wait_for("the leader compacts", lambda: "snapshot 1" in leader.log)
        behind.start().wait_ready()
        assert len(behind.list_all()) == 150
        assert "installing snapshot" in behind.log
        behind.create("through-it")

        # It restarts from what it was given, and follows on.
        assert behind.stop() == 0
        behind.start().wait_ready()
        assert len(behind.list_all()) == 151
        for node in made.nodes:
            snapshots = list((node.data / "snapshots").iterdir())
            assert len(snapshots) <= 2, snapshots
            assert not [path for path in snapshots if path.suffix == ".partial"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, large enough to begin with."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(path)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def _fill(path: Path, free_bytes: int) -> Path:
    """Fill the disk up to what shall be free; return the file that does."""
    ballast = path / "ballast"
    status = os.statvfs(path)
    size = status.f_bavail * status.f_frsize - free_bytes
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return ballast


def test_writes_are_refused_while_the_disk_is_full_and_go_on_afterwards(
    tmp_path: Path, small_disk: Path
) -> None:
    node = ControlNode(tmp_path / "node", "n1", ["--bootstrap"])
    node.data = small_disk / "data"
    with logs_on_failure(node):
        node.start().wait_ready()
        kept = [node.create(f"s{number}").id for number in range(5)]
        # Below the reserve: refused before it is proposed.
        ballast = _fill(small_disk, 8 * 2**20)
        node.wait_readyz(503, "the disk is full: writes are refused")
        with pytest.raises(grpc.RpcError) as caught:
            node.create("refused")
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, retry_after_s = reason_of(caught.value)
        assert reason == "DISK_FULL"
        assert retry_after_s
        assert [row.id for row in node.list_all()] == kept

        assert node.cluster().warnings

        # Nothing is left at all, and the process starts anew: it stays, and says what is wrong.
        ballast.unlink()
        ballast = _fill(small_disk, 0)
        node.kill()
        node.start()
        node.wait_readyz(503, "the disk is full")
        assert [row.id for row in node.list_all()] == kept
        ballast.unlink()
        node.wait_ready()
        assert [row.id for row in node.list_all()] == kept
        kept.append(node.create("again").id)
        assert node.stop() == 0
        assert "Traceback" not in node.log
        node.start().wait_ready()
        assert [row.id for row in node.list_all()] == kept


def test_a_new_node_on_a_full_disk_says_so_in_one_line(tmp_path: Path, small_disk: Path) -> None:
    _fill(small_disk, 0)
    node = ControlNode(tmp_path / "node", "n1", ["--bootstrap"])
    node.data = small_disk / "data"
    with logs_on_failure(node):
        assert node.start().wait() == 1
        assert "--data-dir" in node.log
        assert "No space left" in node.log or "no space left" in node.log
        assert "Traceback" not in node.log


def test_a_truncated_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        for number in range(30):
            node.create(f"s{number}")
        assert node.stop() == 0
        database = node.data / "log" / "data.mdb"
        with lmdb.open(str(database.parent), max_dbs=2, readonly=True) as environment:
            used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        os.truncate(database, used * 2 // 3 // 4096 * 4096)
        node.start()
        assert node.wait() == 1
        assert "was truncated" in node.log
        assert "Traceback" not in node.log


def test_a_snapshot_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, "--snapshot-entries=10", "--batching-enabled=false") as one:
        (node,) = one.nodes
        for number in range(30):
            node.create(f"s{number}")
        assert node.stop() == 0
        # Two, where it was stopped before it had compacted behind the newer one.
        snapshots = list((node.data / "snapshots").glob("*.snapshot"))
        assert 1 <= len(snapshots) <= 2
        for snapshot in snapshots:
            content = bytearray(snapshot.read_bytes())
            content[len(content) // 2] ^= 1
            snapshot.write_bytes(content)
        node.start()
        assert node.wait() == 1
        assert "is corrupt" in node.log
        assert "Traceback" not in node.log


def test_a_leader_whose_disk_is_full_makes_way_for_one_that_has_room(
    tmp_path: Path, small_disk: Path
) -> None:
    with cluster(tmp_path, 3, start=False) as made:
        small = made.nodes[0]
        small.data = small_disk / "data"
        made.start()
        if made.leader() is not small:
            cluster_pb2_grpc.ClusterServiceStub(small.channel).TransferLeadership(
                cluster_pb2.TransferLeadershipRequest(peer=small.name), timeout=WAIT_S
            )
        assert made.leader() is small
        kept = small.create("before").id
        _fill(small_disk, 8 * 2**20)
        other = wait_for(
            "another leads", lambda: next((n for n in made.nodes if n.leads and n != small), None)
        )
        assert "the disk is full: leadership is handed to" in small.log
        # Also through the one that is full: it forwards.
        later = small.create("after").id
        assert {row.id for row in other.list_all()} == {kept, later}
