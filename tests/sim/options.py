"""What a seed has chosen: the shape of the cluster, its limits, and what will befall it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from prism_control.raft.config import Limits
from prism_control.raft.types import Configuration, Member, MemberId

FAULT_NAMES = (
    "crash",
    "crash_all",
    "crash_in_election",
    "partition",
    "bridge",
    "isolate_leader",
    "block_one_way",
    "slow_disk",
    "stall_disk",
    "fail_disk",
    "fill_disk",
    "flip_bit",
    "wipe",
    "pause",
    "change_clock",
    "bad_network",
    "replay",
    "report_unreachable",
    "report_disconnected",
    "short_reigns",
    "strike_changes",
)


def member(id: MemberId) -> Member:
    """Return a member with made-up addresses."""
    return Member(id, f"n{id}", f"n{id}:4200", f"n{id}:8008")


def cluster_of(
    voters: tuple[MemberId, ...],
    outgoing: tuple[MemberId, ...] = (),
    learners: tuple[MemberId, ...] = (),
) -> Configuration:
    """Return a configuration with the addresses of everybody in it."""
    bare = Configuration(voters, outgoing, learners)
    return replace(bare, members=tuple(map(member, bare.ids())))


CONFIGURATIONS = (
    cluster_of((1,)),
    cluster_of((1, 2, 3)),
    cluster_of((1, 2, 3), learners=(4,)),
    cluster_of((1, 2, 3, 4, 5)),
    # Joint: agreement of both majorities.
    cluster_of((1, 2, 3), outgoing=(3, 4, 5)),
)
CONFIGURATION_WEIGHTS = (1, 8, 2, 6, 2)


@dataclass(frozen=True)
class Options:
    """One seed's choices; the same for a run and its replay."""

    configuration: Configuration
    limits: Limits
    snapshot_entries: int
    trailing_entries: int
    clients: int
    #: Mean time between two operations of a client.
    pause_us: int
    #: Mean time between two faults.
    fault_interval_us: int
    #: Names of `Faults` methods that happen, each with the same probability.
    faults: tuple[str, ...]
    faults_until_us: int = 2_000_000
    #: Mean time between two requests of the operator (changes and transfers); 0: none.
    operator_interval_us: int = 0
    #: Share of transfers among them.
    transfers: float = 0.0
    promotes_learners: bool = True
    #: Clocks run at 1 ± this.
    clock_spread: float = 0.1
    #: Replicate Prism's own state machine, in place of registers and a chain of hashes.
    with_prism: bool = False
    #: Clients whose histories are checked for linearizability.
    register_clients: int = 0
    #: Numbers of faults that are left out (`--shrink`).
    faults_left_out: frozenset[int] = frozenset()

    @classmethod
    def draw(cls, random: Random) -> Options:
        """Choose a cluster and what will befall it."""
        share = random.choice((0.2, 0.5))
        faults = [name for name in FAULT_NAMES if random.random() < share]
        # In a storm leaders seldom last, and followers get one entry at a time, so that logs
        # part in the ways of figures 7 and 8.
        storm = random.random() < 0.4
        with_prism = random.random() < 0.2
        return cls(
            configuration=random.choices(CONFIGURATIONS, CONFIGURATION_WEIGHTS)[0],
            limits=Limits(
                append_bytes_max=30 if storm else random.choice((100, 300, 1 << 20)),
                inflight_messages_max=random.choice((1, 3) if storm else (1, 3, 64)),
                inflight_bytes_max=random.choice((200, 1000, 8 << 20)),
                uncommitted_bytes_max=random.choice((400, 64 << 20)),
                committed_bytes_max=random.choice((120, 16 << 20)),
                promotion_lag_entries_max=random.choice((0, 5, 64)),
                reads_waiting_max=random.choice((3, 1000)),
            ),
            snapshot_entries=random.choice((5, 20, 60, 10_000)),
            trailing_entries=random.choice((0, 3, 20)),
            clients=random.randrange(1, 4),
            pause_us=random.choice((20_000, 60_000) if storm else (5_000, 20_000, 60_000)),
            fault_interval_us=40_000 if storm else random.choice((60_000, 150_000, 400_000)),
            faults=tuple(faults),
            faults_until_us=random.choice((1_000_000, 1_500_000, 3_000_000)),
            operator_interval_us=random.choice((0, 60_000, 200_000, 400_000)),
            transfers=random.choice((0.0, 0.2, 0.6)),
            promotes_learners=random.random() < 0.7,
            clock_spread=random.choice((0.1, 0.1, 0.3)),
            with_prism=with_prism,
            register_clients=0 if with_prism else random.choice((0, 2, 3)),
        )

    @classmethod
    def storm(cls, voters: int, *faults: str) -> Options:
        """Return a shape in which logs part often: one entry a message, and few faults."""
        return cls(
            configuration=cluster_of(tuple(range(1, voters + 1))),
            limits=Limits(append_bytes_max=30, inflight_messages_max=1),
            snapshot_entries=10_000,
            trailing_entries=0,
            clients=2,
            pause_us=20_000,
            fault_interval_us=200_000,
            faults=faults,
            faults_until_us=4_000_000,
        )

    @classmethod
    def changes(cls, voters: int, *faults: str) -> Options:
        """Return a shape in which the configuration changes all the time."""
        return replace(
            cls.storm(voters, *faults),
            limits=Limits(),
            operator_interval_us=50_000,
            fault_interval_us=80_000,
            snapshot_entries=20,
            faults_until_us=3_000_000,
        )
