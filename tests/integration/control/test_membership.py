"""Members come, go and hand over while the cluster serves; backups and recovery."""

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc

from tests.integration.harness import (
    WAIT_S,
    Cluster,
    ControlNode,
    cluster,
    logs_on_failure,
    reason_of,
    run_prismd,
    wait_for,
)
from tests.integration.load import Load


def service(node: ControlNode) -> cluster_pb2_grpc.ClusterServiceStub:
    return cluster_pb2_grpc.ClusterServiceStub(node.channel)


def voters(node: ControlNode) -> set[str]:
    """Return the names of the members that vote, as a node sees them."""
    return {
        peer.name for peer in node.cluster().peers if peer.role != cluster_pb2.PEER_ROLE_LEARNER
    }


def join(made: Cluster, directory: Path, name: str) -> ControlNode:
    """Start a node that joins; return it once it votes."""
    node = ControlNode(directory / name, name, [f"--join={made.nodes[0].raft}"])
    made.nodes.append(node)
    node.start().wait_ready()
    leader = made.leader()
    wait_for(f"{name} votes", lambda: name in voters(leader))
    return node


def remove(node: ControlNode, name: str) -> None:
    service(node).RemovePeer(cluster_pb2.RemovePeerRequest(peer=name), timeout=WAIT_S)


def leave(made: Cluster, node: ControlNode) -> None:
    """Remove a node through another, and stop it."""
    stays = next(n for n in made.running if n is not node)
    made.nodes.remove(node)
    remove(stays, node.name)
    assert node.stop() == 0


def test_three_become_seven_and_three_again_while_serving(tmp_path: Path) -> None:
    left: list[ControlNode] = []
    with cluster(tmp_path, 3) as made, Load(made, clients=2, pause_s=0.01) as load:
        made.nodes[0].create("before")
        for name in ("n4", "n5", "n6", "n7"):
            node = join(made, tmp_path, name)
            node.create(f"by-{name}")
            assert {s.name for s in node.list_all()} >= {"before", f"by-{name}"}
        assert voters(made.leader()) == {f"n{number}" for number in range(1, 8)}
        # The leader itself, twice, and two others.
        for _ in range(2):
            left += [made.leader(), made.followers()[0]]
            leader = left[-2]
            stays = next(n for n in made.running if n is not leader)
            made.nodes.remove(leader)
            remove(stays, leader.name)
            leader.wait_readyz(503, "removed from the cluster")
            assert leader.stop() == 0
            leave(made, left[-1])
        assert voters(made.leader()) == {node.name for node in made.nodes}
        assert len(made.nodes) == 3
        load.stop()
        made.nodes[0].create("after")
        for node in made.nodes:
            assert load.lost_and_duplicated(node) == (0, 0)
            assert {"before", "by-n7", "after"} <= {s.name for s in node.list_all()}
        # No change of members holds anybody up for as long as an election.
        assert load.longest_gap_s() < 9.0
        assert len(load.acknowledged) > 50
        for node in left:
            node.close()


def test_a_lost_member_is_replaced_under_its_name(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as made:
        made.nodes[0].create("kept")
        lost = made.followers()[0]
        lost.kill()
        made.nodes.remove(lost)
        again = ControlNode(tmp_path / "again", lost.name, [f"--join={made.nodes[0].raft}"])
        with logs_on_failure(again):
            refused = run_prismd(*again.address_flags, *again.flags)
            assert refused.returncode == 1
            assert f"prismctl peer rm {lost.name}" in refused.stderr
            remove(made.leader(), lost.name)
            again.start().wait_ready()
            wait_for("it votes", lambda: lost.name in voters(made.leader()))
            assert [s.name for s in again.list_all()] == ["kept"]
        lost.close()


def test_leadership_is_handed_over_within_an_election_timeout(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as made:
        follower = made.followers()[0]
        answer = service(follower).TransferLeadership(
            cluster_pb2.TransferLeadershipRequest(peer=follower.name), timeout=WAIT_S
        )
        assert answer.leader_id == follower.cluster().member_id
        assert made.leader() is follower
        follower.create("under-the-new-leader")
        with pytest.raises(grpc.RpcError) as refused:
            service(follower).TransferLeadership(
                cluster_pb2.TransferLeadershipRequest(peer="nobody"), timeout=WAIT_S
            )
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_what_cannot_be_done_to_members_is_said(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as made:
        node = made.nodes[0]
        with pytest.raises(grpc.RpcError) as refused:
            remove(node, node.name)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no voter would be left" in refused.value.details()
        with pytest.raises(grpc.RpcError) as refused:
            service(node).AddPeer(
                cluster_pb2.AddPeerRequest(raft_address="127.0.0.1:1"), timeout=WAIT_S
            )
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "prismd --join" in refused.value.details()
        assert reason_of(refused.value)[0] == "WRONG_STATE"


def test_a_backup_makes_a_new_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as made:
        node = made.nodes[0]
        made_ids = {node.create().id for _ in range(20)}
        stream = service(node).Backup(cluster_pb2.BackupRequest(), timeout=WAIT_S)
        backup = tmp_path / "backup"
        backup.write_bytes(b"".join(part.data for part in stream))
        old = node.cluster().id
    fresh = ControlNode(tmp_path / "fresh", "fresh")
    flags = [f"--name={fresh.name}", f"--data-dir={fresh.data}", f"--raft={fresh.raft}",
             f"--api={fresh.api}"]  # fmt: skip
    restored = run_prismd("restore", f"--from={backup}", *flags)
    assert restored.returncode == 0, restored.stderr
    assert "20 sandboxes" in restored.stdout
    again = run_prismd("restore", f"--from={backup}", *flags)
    assert again.returncode == 1
    assert "is not new" in again.stderr
    with logs_on_failure(fresh):
        fresh.start().wait_ready()
        assert {s.id for s in fresh.list_all()} == made_ids
        assert fresh.cluster().id != old
    torn = tmp_path / "torn"
    torn.write_bytes(backup.read_bytes()[:-5])
    refused = run_prismd("restore", f"--from={torn}", *flags[:1], f"--data-dir={tmp_path / 'x'}")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_survivor_becomes_the_whole_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as made:
        for number in range(5):
            made.nodes[0].create(f"s{number}")
        for node in made.nodes:
            node.kill()
        survivor = made.nodes[0]
        asked = run_prismd("recover", "--member=n1", f"--data-dir={survivor.data}")
        assert asked.returncode == 1
        assert "--yes" in asked.stderr
        other = run_prismd("recover", "--member=n2", f"--data-dir={survivor.data}", "--yes")
        assert other.returncode == 1
        assert "'n1'" in other.stderr
        done = run_prismd("recover", "--member=n1", f"--data-dir={survivor.data}", "--yes")
        assert done.returncode == 0, done.stderr
        survivor.start().wait_ready()
        assert {s.name for s in survivor.list_all()} == {f"s{n}" for n in range(5)}
        survivor.create("alone")


def test_prismctl_shows_and_changes_members(tmp_path: Path) -> None:
    prismctl = Path(sys.executable).parent / "prismctl"

    def ctl(node: ControlNode, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(prismctl), f"--api={node.api}", *arguments],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    with cluster(tmp_path, 1) as made:
        node = made.nodes[0]
        second = ControlNode(tmp_path / "n2", "n2", [f"--join={node.raft}"])
        made.nodes.append(second)
        second.start().wait_ready()
        added = ctl(node, "-o", "name", "peer", "add", second.raft)
        assert (added.returncode, added.stdout.strip()) == (0, "n2"), added.stderr
        wait_for("it votes", lambda: "n2" in voters(node))
        moved = ctl(node, "peer", "transfer-leader", "n2")
        assert (moved.returncode, moved.stdout.strip()) == (0, "n2"), moved.stderr
        kept = tmp_path / "kept"
        assert ctl(second, "backup", str(kept)).returncode == 0
        assert kept.stat().st_size > 0
        removed = ctl(second, "peer", "rm", "n1")
        assert (removed.returncode, removed.stdout.strip()) == (0, "n1"), removed.stderr
