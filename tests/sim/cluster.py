"""A whole cluster on virtual time: members, clients, faults, and then healing.

One seed decides everything: the shape of the cluster, the limits, which faults happen at all
(so that each kind is also seen alone), and every delay. Events are ordered by time and then by
the order in which they were made, so nothing depends on hashing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from prism_control.raft.config import CoreConfig, Limits
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.types import Configuration, Message, Role, SnapshotRequest
from tests.sim.disk import Disk
from tests.sim.invariants import Invariants, ViolationError
from tests.sim.network import Network, NetworkFaults
from tests.sim.node import Node

TICK_US = 10_000
ELECTION_TICKS = 10
HEARTBEAT_TICKS = 2
FAULTS_UNTIL_US = 4_000_000
HEALED_UNTIL_US = 40_000_000


@dataclass(frozen=True)
class Options:
    """What a seed has chosen."""

    configuration: Configuration
    limits: Limits
    snapshot_entries: int
    trailing_entries: int
    clients: int
    #: Mean time between two operations of a client.
    pause_us: int
    #: Mean time between two faults.
    fault_interval_us: int
    #: Names of `_Faults` methods that happen, each with the same probability.
    faults: tuple[str, ...]

    @classmethod
    def draw(cls, random: Random) -> Options:
        """Choose a cluster and what will befall it."""
        faults = [name for name in FAULT_NAMES if random.random() < 0.6]
        # In a storm leaders seldom last, and followers get one entry at a time, so that logs
        # part in the ways of figures 7 and 8.
        storm = random.random() < 0.4
        return cls(
            configuration=random.choices(CONFIGURATIONS, CONFIGURATION_WEIGHTS)[0],
            limits=Limits(
                append_bytes_max=30 if storm else random.choice((100, 300, 1 << 20)),
                inflight_messages_max=random.choice((1, 3) if storm else (1, 3, 64)),
                inflight_bytes_max=random.choice((200, 1000, 8 << 20)),
                uncommitted_bytes_max=random.choice((400, 64 << 20)),
                committed_bytes_max=random.choice((120, 16 << 20)),
                reads_waiting_max=random.choice((3, 1000)),
            ),
            snapshot_entries=random.choice((5, 20, 60, 10_000)),
            trailing_entries=random.choice((0, 3, 20)),
            clients=random.randrange(1, 6),
            pause_us=random.choice((20_000, 60_000) if storm else (5_000, 20_000, 60_000)),
            fault_interval_us=40_000 if storm else random.choice((60_000, 150_000, 400_000)),
            faults=tuple(faults),
        )

    @classmethod
    def storm(cls, voters: int, *faults: str) -> Options:
        """Return a shape in which logs part often: one entry a message, and few faults."""
        return cls(
            configuration=Configuration(voters=tuple(range(1, voters + 1))),
            limits=Limits(append_bytes_max=30, inflight_messages_max=1),
            snapshot_entries=10_000,
            trailing_entries=0,
            clients=2,
            pause_us=20_000,
            fault_interval_us=200_000,
            faults=faults,
        )


CONFIGURATIONS = (
    Configuration(voters=(1,)),
    Configuration(voters=(1, 2, 3)),
    Configuration(voters=(1, 2, 3), learners=(4,)),
    Configuration(voters=(1, 2, 3, 4, 5)),
    # Joint: agreement of both majorities.
    Configuration(voters=(1, 2, 3), voters_outgoing=(3, 4, 5)),
)
CONFIGURATION_WEIGHTS = (1, 8, 2, 8, 2)

FAULT_NAMES = (
    "crash",
    "crash_all",
    "crash_in_election",
    "partition",
    "isolate_leader",
    "block_one_way",
    "slow_disk",
    "pause",
    "bad_network",
    "report_unreachable",
    "short_reigns",
)


class Cluster:
    """All members and everything between them, from one seed."""

    def __init__(
        self,
        seed: int,
        trace: Callable[[str], None] | None = None,
        options: Options | None = None,
    ) -> None:
        self._random = random = Random(seed)
        self._trace = trace
        self.options = options or Options.draw(random)
        self.now_us = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._events_made = 0
        configuration = self.options.configuration
        self.members = configuration.ids()
        hard_state, entry = bootstrap(configuration)
        disks = {member: Disk(hard_state, (entry,)) for member in self.members}
        self.invariants = Invariants(configuration, disks)
        self.network = Network(Random(random.getrandbits(64)), NetworkFaults())
        self.nodes = {
            member: Node(
                self,
                CoreConfig(member, ELECTION_TICKS, HEARTBEAT_TICKS, self.options.limits),
                disks[member],
                Random(random.getrandbits(64)),
            )
            for member in self.members
        }
        self._is_healed = False
        self._short_reigns_until_us = 0
        self._writes = 0
        self.reads_served = 0
        self.crashes = 0

    # ---------------------------------------------------------------- time

    def after(self, delay_us: int, action: Callable[[], None]) -> None:
        """Let `action` happen after a while."""
        self._events_made += 1
        heapq.heappush(self._events, (self.now_us + delay_us, self._events_made, action))

    def _run_until(self, end_us: int, done: Callable[[], bool] | None = None) -> bool:
        while self._events and self._events[0][0] <= end_us:
            self.now_us, _, action = heapq.heappop(self._events)
            action()
            if done is not None and done():
                return True
        self.now_us = end_us
        return False

    def trace(self, what: str, *details: object) -> None:
        """Write down what happens, if somebody wants to know."""
        if self._trace is not None:
            self._trace(f"{self.now_us:>9} {what} {' '.join(map(str, details))}")

    # ---------------------------------------------------------------- a run

    def run(self) -> None:
        """Run through faults and healing.

        Raises:
            ViolationError: Something that must hold did not.
        """
        self.trace("options", self.options)
        for node in self.nodes.values():
            node.start()
            self._schedule_tick(node, self._random.randrange(TICK_US))
        for client in range(self.options.clients):
            self.after(self._random.randrange(100_000), partial(self._client, client))
        if self.options.faults:
            self.after(self._random.randrange(200_000), self._fault)
        self._run_until(FAULTS_UNTIL_US)
        self._heal()
        if not self._run_until(HEALED_UNTIL_US, self._has_recovered):
            raise ViolationError("liveness: the healed cluster does not recover: " + self._state())
        self.invariants.finished({node.id: node.state for node in self.nodes.values()})
        self.trace("end", len(self.invariants.committed), self.reads_served, self.crashes)

    def _schedule_tick(self, node: Node, delay_us: int) -> None:
        # Clocks differ by up to 10 %.
        period_us = TICK_US + self._random.randrange(-1_000, 1_001)

        def tick() -> None:
            node.tick()
            self.after(period_us, tick)

        self.after(delay_us, tick)

    def _heal(self) -> None:
        """End all faults; clients stop too, except for one last write each."""
        self.trace("heal")
        self._is_healed = True
        self.network.heal()
        self.network.faults = NetworkFaults()
        for node in self.nodes.values():
            node.disk_latency_us = (100, 3_000)
            node.paused_until_us = 0
            if node.core is None:
                node.start()
        self._acknowledged_before = len(self.invariants.acknowledged)
        self._reads_before = self.reads_served
        self.after(500_000, self._last_operations)

    def _last_operations(self) -> None:
        for node in self.nodes.values():
            node.propose([self._next_write()])
            node.read(self._random.getrandbits(63))
        self.after(500_000, self._last_operations)

    def _has_recovered(self) -> bool:
        cores = [node.core for node in self.nodes.values() if node.core is not None]
        leaders = [core for core in cores if core.role is Role.LEADER]
        return (
            len(leaders) == 1
            and all(core.leader == leaders[0].config.id for core in cores)
            and len(self.invariants.acknowledged) > self._acknowledged_before
            and self.reads_served > self._reads_before
            and all(
                node.state.index == len(self.invariants.committed) == leaders[0].log.last_index
                for node in self.nodes.values()
            )
        )

    def _state(self) -> str:
        return "; ".join(
            f"{core.config.id}: {core.role.name} term={core.term} commit={core.commit} "
            f"last={core.log.last_index}"
            + (f" {core.replication.progress}" if core.replication else "")
            for core in self.cores()
        )

    def cores(self) -> list[Core]:
        """Return the cores of all running members."""
        return [node.core for node in self.nodes.values() if node.core is not None]

    def turned(self, node: Node) -> None:
        """Check a member after its core was touched."""
        if node.core is not None:
            self.invariants.turned(node.core, self.cores())

    # ---------------------------------------------------------------- network

    def send(self, message: Message) -> None:
        """Give a message to the network."""
        delays_us = self.network.delays_us(message.sender, message.receiver)
        if self._trace is not None:
            self.trace("send", delays_us, message)
        sender, receiver = self.nodes[message.sender], self.nodes[message.receiver]
        sent_us = self.now_us

        def arrive() -> None:
            if sent_us > sender.lost_before_us:
                receiver.deliver(message)

        for delay_us in delays_us:
            self.after(delay_us, arrive)

    def send_snapshot(self, node: Node, message: SnapshotRequest) -> None:
        """Stream the newest snapshot, which takes a while, and report how it went."""
        snapshot = node.newest_snapshot()
        request = SnapshotRequest(message.sender, message.receiver, message.term, snapshot.meta)
        delays_us = self.network.delays_us(message.sender, message.receiver)
        delays_us = [min(delay_us, 100_000) for delay_us in delays_us]
        receiver = self.nodes[message.receiver]
        self.trace("stream", delays_us, request)
        for delay_us in delays_us:
            self.after(delay_us * 5, lambda: receiver.deliver_snapshot(request, snapshot))
        ok, life = bool(delays_us), node.life

        def report() -> None:
            if node.life == life:
                node.receive(lambda core: core.report_snapshot(message.receiver, ok))

        self.after(max(delays_us, default=20_000) * 6, report)

    # ---------------------------------------------------------------- clients

    def _next_write(self) -> bytes:
        self._writes += 1
        return b"write %d" % self._writes

    def _client(self, client: int) -> None:
        if self._is_healed:
            return
        random = self._random
        node = self._some_node()
        if random.random() < 0.3:
            node.read(random.getrandbits(63))
        else:
            node.propose([self._next_write() for _ in range(random.choice((1, 1, 2, 8)))])
        self.after(random.randrange(2 * self.options.pause_us), lambda: self._client(client))

    def _some_node(self) -> Node:
        leaders = [node for node in self.nodes.values() if node.core and node.core.replication]
        if leaders and self._random.random() < 0.8:
            return self._random.choice(leaders)
        return self._random.choice(list(self.nodes.values()))

    def write_acknowledged(self, index: int, data: bytes) -> None:
        """Tell a client that its write is done."""
        self.trace("acknowledge", index, data)
        self.invariants.write_acknowledged(index, data)

    def read_served(self, node: Node, asked: int) -> None:
        """Tell a client what it has read."""
        self.reads_served += 1
        self.trace("read", node.id, node.state.index, asked)
        self.invariants.read_served(node.state.index, asked)

    # ---------------------------------------------------------------- faults

    def _fault(self) -> None:
        if self._is_healed:
            return
        name = self._random.choice(self.options.faults)
        node = self._random.choice(list(self.nodes.values()))
        self.trace("fault", name, node.id)
        getattr(self, f"_fault_{name}")(node)
        if self._random.random() < 0.3:
            self.trace("links restored")
            self.network.heal()
        self.after(self._random.randrange(2 * self.options.fault_interval_us), self._fault)

    def _fault_crash(self, node: Node) -> None:
        self._crash(node, self._random.choice((5_000, 600_000)))

    def _crash(self, node: Node, down_us: int) -> None:
        if node.core is None:
            return
        self.crashes += 1
        self.trace("crash", node.id, node.crash())
        self.invariants.disk_changed()
        life = node.life

        def restart() -> None:
            if node.life == life:
                self.trace("restart", node.id)
                node.start()

        self.after(self._random.randrange(1_000, down_us), restart)

    def _fault_crash_all(self, node: Node) -> None:
        if self._random.random() < 0.3:
            for each in self.nodes.values():
                self._fault_crash(each)

    def _fault_partition(self, node: Node) -> None:
        side = [member for member in self.members if self._random.random() < 0.5]
        self.network.partition(self.members, side)

    def _fault_crash_in_election(self, node: Node) -> None:
        """Crash the leader, and then again and again whoever may have voted."""
        for each in self.nodes.values():
            if each.core is not None and each.core.role is Role.LEADER:
                self._fault_crash(each)
        for _ in range(6):
            voter = self._random.choice(list(self.nodes.values()))
            delay_us = self._random.randrange(100_000, 250_000)
            self.after(delay_us, partial(self._crash_shortly, voter))

    def _crash_shortly(self, node: Node) -> None:
        if node.core is not None and not self._is_healed:
            self.trace("crash", node.id, node.crash())
            node.start()

    def _fault_isolate_leader(self, node: Node) -> None:
        """Cut the leader off, perhaps with answers to it still under way."""
        if self._random.random() < 0.5:
            for each in self.nodes.values():
                if each.core is not None and each.core.role is Role.LEADER:
                    self.network.slow_receiver = each.id
            self.after(400_000, self._isolate_leader)
        else:
            self._isolate_leader()

    def _isolate_leader(self) -> None:
        if self._is_healed:
            return
        for each in self.nodes.values():
            if each.core is not None and each.core.role is Role.LEADER:
                self.network.partition(self.members, [each.id])

    def _fault_short_reigns(self, node: Node) -> None:
        """For some time, strike each leader soon after its election (figure 8)."""
        self._short_reigns_until_us = self.now_us + self._random.randrange(500_000, 2_000_000)
        for each in self.nodes.values():
            if each.core is not None and each.core.role is Role.LEADER:
                self.elected(each)

    def elected(self, node: Node) -> None:
        """Take note that a member has begun to lead."""
        if self.now_us < self._short_reigns_until_us:
            # Before anybody has its first entry; before everybody has; later.
            low_us, high_us = self._random.choice(
                ((0, 1_000), (0, 1_000), (3_000, 9_000), (3_000, 9_000), (0, 300_000))
            )
            self.after(self._random.randrange(low_us, high_us), lambda: self._strike(node))
            if self._random.random() < 0.4:
                # It will find the messages of two leaders in its inbox.
                self._fault_pause(self._random.choice(list(self.nodes.values())))

    def _strike(self, node: Node) -> None:
        if self._is_healed:
            return
        if self._random.random() < 0.7:
            # What it had sent is still in its buffers, and lost with it.
            node.lost_before_us = self.now_us
        if self._random.random() < 0.5:
            self._crash(node, 100_000)
        else:
            self.network.partition(self.members, [node.id])
            self._fault_pause(self._random.choice(list(self.nodes.values())))
            self.after(self._random.randrange(50_000, 300_000), self.network.heal)

    def _fault_block_one_way(self, node: Node) -> None:
        for other in self.members:
            if other != node.id and self._random.random() < 0.6:
                if self._random.random() < 0.5:
                    self.network.block(node.id, other)
                else:
                    self.network.block(other, node.id)

    def _fault_slow_disk(self, node: Node) -> None:
        slow = self._random.choice(((100, 3_000), (5_000, 60_000), (50_000, 400_000)))
        node.disk_latency_us = slow

    def _fault_pause(self, node: Node) -> None:
        node.paused_until_us = self.now_us + self._random.randrange(10_000, 500_000)

    def _fault_bad_network(self, node: Node) -> None:
        random = self._random
        self.network.faults = NetworkFaults(
            drop=random.choice((0.0, 0.02, 0.1, 0.3)),
            duplicate=random.choice((0.0, 0.05, 0.3)),
            late=random.choice((0.0, 0.01, 0.1, 0.4)),
            late_max_us=random.choice((300_000, 3_000_000)),
            delay_max_us=random.choice((2_000, 20_000, 80_000)),
        )

    def _fault_report_unreachable(self, node: Node) -> None:
        for other in self.members:
            node.receive(partial(_report_unreachable, other))


def _report_unreachable(member: int, core: Core) -> None:
    core.report_unreachable(member)
