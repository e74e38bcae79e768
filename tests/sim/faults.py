"""What befalls the cluster, each fault by its name; and the schedule that a seed makes of them.

Each fault draws from a random source of its own, so that leaving one out (`--shrink`) changes
the others as little as possible.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from prism_control.raft.core import Core
from prism_control.raft.types import Role
from tests.sim.network import NetworkFaults

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.node import Node


class Faults:
    """Strikes at random until the cluster is healed."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self._random = Random(f"faults {seed}")
        self._short_reigns_until_us = 0
        self._strike_changes_until_us = 0
        #: How many faults were scheduled; each has its number.
        self.count = 0

    def start(self) -> None:
        """Begin to strike."""
        if self._cluster.options.faults:
            self._cluster.after(self._random.randrange(200_000), self._strike_next)

    def _strike_next(self) -> None:
        cluster, options = self._cluster, self._cluster.options
        if cluster.is_healed:
            return
        self.count += 1
        self._random = random = Random(f"fault {self._seed} {self.count}")
        cluster.after(random.randrange(2 * options.fault_interval_us), self._strike_next)
        name = random.choice(options.faults)
        node = random.choice(list(cluster.nodes.values()))
        if self.count in options.faults_left_out:
            return
        cluster.trace("fault", self.count, name, node.id)
        getattr(self, name)(node)
        if random.random() < 0.3:
            cluster.trace("links restored")
            cluster.network.heal()

    def _leaders(self) -> list[Node]:
        nodes = self._cluster.nodes.values()
        return [node for node in nodes if node.core and node.core.role is Role.LEADER]

    # ---------------------------------------------------------------- processes

    def crash(self, node: Node) -> None:
        self._cluster.crash(node, self._random.choice((5_000, 600_000)))

    def crash_all(self, node: Node) -> None:
        if self._random.random() < 0.3:
            for each in self._cluster.nodes.values():
                self.crash(each)

    def crash_in_election(self, node: Node) -> None:
        """Crash the leader, and then again and again whoever may have voted."""
        for each in self._leaders():
            self.crash(each)
        for _ in range(6):
            voter = self._random.choice(list(self._cluster.nodes.values()))
            delay_us = self._random.randrange(100_000, 250_000)
            self._cluster.after(delay_us, partial(self._cluster.crash_shortly, voter))

    def pause(self, node: Node) -> None:
        node.paused_until_us = self._cluster.now_us + self._random.randrange(10_000, 500_000)

    def change_clock(self, node: Node) -> None:
        node.draw_clock(self._random)

    def wipe(self, node: Node) -> None:
        """Lose a disk for good; the operator brings a new member in its place."""
        if node.core is not None and self._cluster.may_lose(node):
            self._cluster.lost.add(node.id)
            self._cluster.crash(node, None)

    # ---------------------------------------------------------------- disks

    def slow_disk(self, node: Node) -> None:
        node.disk_latency_us = self._random.choice(
            ((100, 3_000), (5_000, 60_000), (50_000, 400_000))
        )

    def stall_disk(self, node: Node) -> None:
        node.disk.stalled_until_us = self._cluster.now_us + self._random.randrange(1_500_000)

    def fill_disk(self, node: Node) -> None:
        node.disk.full_until_us = self._cluster.now_us + self._random.randrange(1_000_000)

    def fail_disk(self, node: Node) -> None:
        node.disk.fails_next = True

    def flip_bit(self, node: Node) -> None:
        """Damage an entry; nobody may notice before the next start, which must."""
        if node.disk.synced.encoded and self._cluster.may_lose(node):
            self._cluster.lost.add(node.id)
            self._cluster.trace("flip", node.disk.flip_bit(self._random))
            self._cluster.after(self._random.randrange(300_000), partial(self.crash, node))

    # ---------------------------------------------------------------- the network

    def partition(self, node: Node) -> None:
        members = list(self._cluster.nodes)
        side = [member for member in members if self._random.random() < 0.5]
        self._cluster.network.partition(members, side)

    def bridge(self, node: Node) -> None:
        """Cut the members in two, but for one who still reaches all."""
        others = [member for member in self._cluster.nodes if member != node.id]
        side = [member for member in others if self._random.random() < 0.5]
        self._cluster.network.partition(others, side)

    def block_one_way(self, node: Node) -> None:
        for other in self._cluster.nodes:
            if other != node.id and self._random.random() < 0.6:
                if self._random.random() < 0.5:
                    self._cluster.network.block(node.id, other)
                else:
                    self._cluster.network.block(other, node.id)

    def bad_network(self, node: Node) -> None:
        random = self._random
        self._cluster.network.faults = NetworkFaults(
            drop=random.choice((0.0, 0.02, 0.1, 0.3)),
            duplicate=random.choice((0.0, 0.05, 0.3)),
            late=random.choice((0.0, 0.01, 0.1, 0.4)),
            late_max_us=random.choice((300_000, 3_000_000)),
            delay_max_us=random.choice((2_000, 20_000, 80_000)),
        )

    def replay(self, node: Node) -> None:
        """Deliver again what was sent long ago, perhaps in an earlier life of its receiver."""
        for _ in range(self._random.randrange(1, 30)):
            self._cluster.replay(self._random)

    def report_unreachable(self, node: Node) -> None:
        for other in self._cluster.nodes:
            node.receive(partial(_report_unreachable, other))

    def report_disconnected(self, node: Node) -> None:
        """Break connections of a member, or of all, while their ends go on."""
        everybody = list(self._cluster.nodes.values())
        for each in everybody if self._random.random() < 0.5 else [node]:
            for other in self._cluster.nodes:
                each.receive(partial(_report_disconnected, other))

    # ---------------------------------------------------------------- leaders

    def isolate_leader(self, node: Node) -> None:
        """Cut the leader off, perhaps with answers to it still under way."""
        if self._random.random() < 0.5:
            for each in self._leaders():
                self._cluster.network.slow_receiver = each.id
            self._cluster.after(400_000, self._isolate_leaders)
        else:
            self._isolate_leaders()

    def _isolate_leaders(self) -> None:
        if not self._cluster.is_healed:
            for each in self._leaders():
                self._cluster.network.partition(list(self._cluster.nodes), [each.id])

    def short_reigns(self, node: Node) -> None:
        """For some time, strike each leader soon after its election (figure 8)."""
        duration_us = self._random.randrange(500_000, 2_000_000)
        self._short_reigns_until_us = self._cluster.now_us + duration_us
        for each in self._leaders():
            self.elected(each)

    def elected(self, node: Node) -> None:
        """Take note that a member has begun to lead."""
        if self._cluster.now_us < self._short_reigns_until_us:
            # Before anybody has its first entry; before everybody has; later.
            low_us, high_us = self._random.choice(
                ((0, 1_000), (0, 1_000), (3_000, 9_000), (3_000, 9_000), (0, 300_000))
            )
            delay_us = self._random.randrange(low_us, high_us)
            self._cluster.after(delay_us, partial(self._strike, node))
            if self._random.random() < 0.4:
                # It will find the messages of two leaders in its inbox.
                self.pause(self._random.choice(list(self._cluster.nodes.values())))

    def strike_changes(self, node: Node) -> None:
        """For some time, stop leaders just when they have written a new configuration."""
        duration_us = self._random.randrange(500_000, 2_000_000)
        self._strike_changes_until_us = self._cluster.now_us + duration_us

    def configured(self, node: Node) -> None:
        """Take note that a leader has a new configuration on its disk."""
        if self._cluster.now_us < self._strike_changes_until_us and self._random.random() < 0.5:
            node.lost_before_us = self._cluster.now_us
            self._cluster.crash(node, 400_000)

    def _strike(self, node: Node) -> None:
        cluster = self._cluster
        if cluster.is_healed:
            return
        if self._random.random() < 0.7:
            # What it had sent is still in its buffers, and lost with it.
            node.lost_before_us = cluster.now_us
        if self._random.random() < 0.5:
            cluster.crash(node, 100_000)
        else:
            cluster.network.partition(list(cluster.nodes), [node.id])
            self.pause(self._random.choice(list(cluster.nodes.values())))
            cluster.after(self._random.randrange(50_000, 300_000), cluster.network.heal)


def _report_unreachable(member: int, core: Core) -> None:
    core.report_unreachable(member)


def _report_disconnected(member: int, core: Core) -> None:
    core.report_disconnected(member)
