"""How nodes come together, and how they refuse to."""

import itertools
import shutil
import signal
from pathlib import Path

import pytest

from tests.integration.harness import Cluster, ControlNode, cluster, logs_on_failure, wait_for


def test_a_single_node_bootstraps_and_keeps_its_state(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as one:
        (node,) = one.nodes
        created = node.create("first")
        before = node.cluster()
        assert node.stop() == 0
        node.start()
        node.wait_ready()
        assert node.cluster().id == before.id
        assert node.cluster().member_id == before.member_id
        assert [row.id for row in node.list_all()] == [created.id]
        assert node.stop() == 0


def test_three_nodes_started_at_once_form_one_cluster(three: Cluster) -> None:
    ids = {node.cluster().id for node in three.nodes}
    assert len(ids) == 1
    assert ids != {""}
    for node in three.nodes:
        assert [peer.name for peer in node.cluster().peers] == ["n1", "n2", "n3"]
    assert len([node for node in three.nodes if node.leads]) == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1::4])
def test_started_one_after_another_in_any_order_they_form_one_cluster(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    with cluster(tmp_path, 3, start=False) as made:
        for number, position in enumerate(order, 1):
            node = made.nodes[position].start()
            if number < 3:
                node.wait_readyz(503, f"no cluster yet: {number} of 3 members have been met")
        made.wait_ready()
        assert len({node.cluster().id for node in made.nodes}) == 1


def test_a_node_killed_while_the_cluster_forms_comes_back_into_it(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, start=False) as made:
        first, second, third = made.nodes
        first.start()
        second.start()
        second.wait_readyz(503, "2 of 3")
        second.kill()
        third.start()
        third.wait_readyz(503, "2 of 3")
        second.start()
        made.wait_ready()
        assert len({node.cluster().id for node in made.nodes}) == 1


def test_a_follower_whose_data_was_wiped_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as made:
        leader = made.leader()
        wiped = made.followers()[0]
        leader.create("before")
        wiped.kill()
        shutil.rmtree(wiped.data)
        wiped.start()
        text = wiped.wait_readyz(503, "formed without this member")
        assert "remove the old member" in text
        assert wiped.cluster().id == ""
        assert wiped.cluster().warnings
        leader.create("after")
        wait_for(
            "the leader says that it is away",
            lambda: [p for p in leader.cluster().peers if p.name == wiped.name and not p.reachable],
        )


def test_a_member_of_another_cluster_is_refused_by_its_id(tmp_path: Path) -> None:
    with cluster(tmp_path / "one", 3) as one, cluster(tmp_path / "two", 1) as two:
        stranger = two.nodes[0]
        victim = one.followers()[0]
        leader = one.leader()
        stranger.stop()
        victim.stop()
        # The other cluster's data comes up at the victim's address.
        impostor = ControlNode(tmp_path / "impostor", stranger.name)
        impostor.data, impostor.raft = stranger.data, victim.raft
        with logs_on_failure(impostor):
            impostor.start()
            impostor.wait_readyz(200, "leads")
            wait_for(
                "the leader says so",
                lambda: [w for w in leader.cluster().warnings if "is not this member's" in w],
            )
            assert "refuses this member" in leader.log
            leader.create("still-works")
            assert impostor.list_all() == []


def test_sigterm_while_waiting_for_others_exits_0(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, start=False) as made:
        node = made.nodes[0].start()
        node.wait_readyz(503, "1 of 3")
        assert node.stop(30.0) == 0
        assert "Traceback" not in node.log


def test_strict_join_says_what_it_waits_for(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, "--strict-join", start=False) as made:
        node = made.nodes[0].start()
        node.wait_readyz(503, "1 of 3")
        node.signal(signal.SIGINT)
        assert node.wait(30.0) == 0
