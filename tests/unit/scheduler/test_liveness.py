"""Nodes are suspected, lost and revived in time, and never for the leader's own faults."""

from __future__ import annotations

import pytest

from prism_control.scheduler.liveness import Liveness, LivenessConfig
from prism_control.state import commands as c
from tests.unit.state.builders import Driver, create, register

WALL = 1_700_000_000_000
LOSE_MS = 15_000 + 1500 + 2000


class Leader:
    """A leader with a machine and nodes n1…; time is monotonic milliseconds."""

    def __init__(self, nodes: int = 1) -> None:
        self.driver = Driver()
        self.driver.run(*(register(f"n{k + 1}") for k in range(nodes)))
        self.take_over(0)

    def take_over(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.liveness = Liveness(self.driver.machine.nodes(), now_ms)

    def commit(self, *commands: c.Command) -> None:
        self.driver.run(*commands)
        self.liveness.observe(self.driver.events, self.now_ms)

    def until(self, now_ms: int, *, heard: tuple[str, ...] = ()) -> list[c.Command]:
        """Tick each 500 ms and hear some nodes; commit what is decided; return it."""
        decided: list[c.Command] = []
        while self.now_ms < now_ms:
            self.now_ms += 500
            for node in heard:
                self.liveness.heard(node, "i1", self.now_ms)
            commands = self.liveness.tick(self.now_ms, WALL + self.now_ms)
            self.commit(*commands)
            decided += commands
        return decided


def test_silence_makes_suspect_then_lost():
    leader = Leader()
    assert leader.until(2500) == []
    assert leader.until(3000) == [c.SuspectNode("n1", "i1", WALL)]
    assert leader.until(LOSE_MS - 500) == []
    assert leader.until(LOSE_MS) == [c.LoseNode("n1", "i1", WALL)]
    assert leader.until(LOSE_MS + 60_000) == []
    assert leader.liveness.silence_ms("n1", leader.now_ms) is None


def test_a_node_that_is_heard_stays_ready():
    leader = Leader(2)
    decided = leader.until(60_000, heard=("n1",))
    assert {command.node_id for command in decided} == {"n2"}
    assert leader.liveness.silence_ms("n1", leader.now_ms + 7) == 7


def test_a_suspect_that_is_heard_is_revived():
    leader = Leader()
    leader.until(4000)
    assert leader.until(4500, heard=("n1",)) == [c.ReviveNode("n1", "i1", WALL + 4500)]
    assert leader.until(6000, heard=("n1",)) == []


def test_a_new_leader_waits_a_whole_lease_and_revives_nobody_unheard():
    leader = Leader(2)
    leader.until(3000, heard=("n2",))
    seen_ms = leader.driver.machine.node("n1").last_seen_ms
    leader.take_over(1_000_000)
    assert leader.until(1_000_000 + LOSE_MS - 500, heard=("n2",)) == []
    assert leader.until(1_000_000 + LOSE_MS, heard=("n2",)) == [c.LoseNode("n1", "i1", seen_ms)]


def test_a_stall_of_the_leader_is_no_silence_of_nodes():
    leader = Leader()
    leader.until(1000, heard=("n1",))
    leader.now_ms = 100_000  # the process was stopped; heartbeats wait in the socket
    assert leader.until(101_500) == []
    assert leader.until(130_000) != []


def test_heartbeats_of_another_process_or_an_unknown_node_do_not_count():
    leader = Leader()
    assert leader.liveness.heard("n1", "i1", 5)
    assert not leader.liveness.heard("n1", "i0", 5)
    assert not leader.liveness.heard("n9", "i1", 5)


def test_a_registration_counts_as_heard():
    leader = Leader()
    leader.until(2500)
    leader.commit(register(incarnation="i2"))
    assert leader.until(5000) == []
    assert not leader.liveness.heard("n1", "i1", 5000)


def test_a_lost_node_is_watched_again_once_it_registers():
    leader = Leader()
    leader.until(LOSE_MS)
    assert not leader.liveness.heard("n1", "i1", leader.now_ms)
    leader.commit(register())
    assert leader.liveness.heard("n1", "i1", leader.now_ms)


def test_a_forgotten_node_is_watched_no_more():
    leader = Leader()
    leader.commit(c.LoseNode("n1", "i1", 5))
    leader.commit(register("n2", name="name-n1"))
    assert leader.liveness.silence_ms("n1", 0) is None
    assert leader.until(2500, heard=("n2",)) == []


def test_a_lost_proposal_is_made_again_but_not_at_once():
    leader = Leader()
    first = leader.liveness.tick(1000, WALL)
    assert first == []
    leader.until(2500)
    assert len(leader.liveness.tick(3000, WALL)) == 1
    assert leader.liveness.tick(3500, WALL) == []
    for now_ms in range(4000, 5000, 500):
        leader.liveness.tick(now_ms, WALL)
    assert leader.liveness.tick(5000, WALL + 5000) == [c.SuspectNode("n1", "i1", WALL)]


def test_a_new_leader_does_not_watch_who_was_lost_and_minds_no_sandboxes():
    leader = Leader(2)
    leader.commit(c.LoseNode("n1", "i1", 5), create("s1"))
    leader.take_over(50_000)
    assert not leader.liveness.heard("n1", "i1", 50_000)
    assert leader.until(55_000, heard=("n2",)) == []


def test_one_tick_is_bounded():
    leader = Leader(300)
    leader.until(2500)
    assert len(leader.liveness.tick(3000, WALL)) == 256
    assert len(leader.liveness.tick(3500, WALL)) == 44


@pytest.mark.parametrize(
    ("agents", "heartbeat_ms", "lease_ms"),
    [(1, 1000, 15_000), (100, 1000, 15_000), (500, 5000, 30_000), (1000, 10_000, 60_000),
     (9000, 10_000, 60_000)],
)  # fmt: skip
def test_interval_grows_with_the_number_of_agents(agents, heartbeat_ms, lease_ms):
    config = LivenessConfig()
    assert config.heartbeat_ms(agents) == heartbeat_ms
    assert config.lease_ms(heartbeat_ms) == lease_ms


def test_terms_count_the_one_that_registers():
    assert Leader(149).liveness.terms() == (1500, 15_000)


def test_the_lease_that_a_node_was_told_counts():
    leader = Leader(0)
    leader.commit(register(lease_ms=60_000, heartbeat_ms=10_000))
    assert leader.until(29_500) == []
    assert leader.until(67_500) == [c.SuspectNode("n1", "i1", WALL)]
    assert leader.until(68_000) == [c.LoseNode("n1", "i1", WALL)]


def test_a_lease_is_not_renewed_once_the_loss_of_its_node_is_proposed():
    """The proposal may take long; what ran there is placed anew when it is committed."""
    leader = Leader()
    leader.until(LOSE_MS - 500)
    leader.now_ms = LOSE_MS
    (lose,) = leader.liveness.tick(LOSE_MS, WALL + LOSE_MS)
    assert isinstance(lose, c.LoseNode)
    assert not leader.liveness.heard("n1", "i1", LOSE_MS + 10)
    leader.commit(lose)
    assert leader.liveness.silence_ms("n1", LOSE_MS + 20) is None


def test_a_loss_that_was_not_committed_is_proposed_again_unless_the_node_registers():
    leader = Leader()
    leader.until(LOSE_MS - 500)
    assert leader.liveness.tick(LOSE_MS, WALL)
    assert leader.liveness.tick(LOSE_MS + 1000, WALL) == []
    assert leader.liveness.tick(LOSE_MS + 2000, WALL)
    leader.liveness.registered("n1", LOSE_MS + 2500)
    assert leader.liveness.heard("n1", "i1", LOSE_MS + 2600)
    again = leader.liveness.tick(LOSE_MS + 4500, WALL + LOSE_MS)
    assert [type(command) for command in again] == [c.ReviveNode]


def test_no_loss_is_proposed_behind_a_registration():
    """Both would be committed, and the agent have a lease on a node that is given up."""
    leader = Leader()
    leader.until(LOSE_MS - 500)
    leader.liveness.registering("n1", LOSE_MS - 10)
    assert leader.liveness.tick(LOSE_MS, WALL) == []
    # One that was condemned before stays so until it has registered.
    times = range(LOSE_MS + 500, 3 * LOSE_MS, 500)
    now_ms = next(at for at in times if leader.liveness.tick(at, WALL))
    assert now_ms >= 2 * LOSE_MS - 500
    leader.liveness.registering("n1", now_ms)
    assert not leader.liveness.heard("n1", "i1", now_ms)
