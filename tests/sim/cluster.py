"""A whole cluster on virtual time: members, clients, faults, and then healing.

One seed decides everything: the shape of the cluster, the limits, which faults happen at all
(so that each kind is also seen alone), and every delay. Events are ordered by time and then by
the order in which they were made, so nothing depends on hashing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from random import Random

from prism_control.raft.config import CoreConfig
from prism_control.raft.configuration import bootstrap
from prism_control.raft.core import Core
from prism_control.raft.types import (
    Configuration,
    Entry,
    HardState,
    MemberId,
    Message,
    Role,
    SnapshotRequest,
    TimeoutNow,
    TransferResult,
    VoteRequest,
)
from tests.sim.clients import Clients
from tests.sim.disk import Disk
from tests.sim.faults import Faults
from tests.sim.invariants import Invariants, ViolationError, has_quorum
from tests.sim.network import Network, NetworkFaults
from tests.sim.node import TICK_US, Node
from tests.sim.options import Options
from tests.sim.state_machine import Chain, FrozenPrism, State

ELECTION_TICKS = 10
HEARTBEAT_TICKS = 2
HEALED_UNTIL_US = 40_000_000


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
        self.options = options or Options.draw(Random(f"options {seed}"))
        self.now_us = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._events_made = 0
        self.network = Network(Random(random.getrandbits(64)), NetworkFaults())
        self._disks: dict[MemberId, Disk] = {}
        self.nodes: dict[MemberId, Node] = {}
        #: Members whose disk is gone or damaged; they never come back under their id.
        self.lost: set[MemberId] = set()
        self.invariants = Invariants(self._disks, self._fresh)
        hard_state, entry = bootstrap(self.options.configuration)
        for member in self.options.configuration.ids():
            self._make_node(member, hard_state, (entry,))
        self.faults = Faults(self, seed)
        self.clients = Clients(self, Random(random.getrandbits(64)))
        self.is_healed = False
        #: A sample of what was sent.
        self._sent: list[Message] = []
        #: When the last word arrives by which a leader itself has somebody else elected.
        self._transfers_until_us = 0
        self.reads_served = 0
        self.crashes = 0
        self.transfers_done = 0

    def _fresh(self) -> State:
        return FrozenPrism().thaw() if self.options.with_prism else Chain()

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
        self.clients.start()
        self.faults.start()
        self._run_until(self.options.faults_until_us)
        self._heal()
        if not self._run_until(HEALED_UNTIL_US, self._has_recovered):
            raise ViolationError("liveness: the healed cluster does not recover: " + self._state())
        alive = {core.config.id for core in self.cores()}.intersection(self._final().ids())
        self.invariants.finished({id_: self.nodes[id_].state for id_ in sorted(alive)})
        self._check_quiet()
        self.clients.check_histories()
        self.trace("end", len(self.invariants.committed), self.reads_served, self.crashes)

    def _leader(self) -> Core | None:
        leaders = [core for core in self.cores() if core.role is Role.LEADER]
        return leaders[0] if len(leaders) == 1 else None

    def _final(self) -> Configuration:
        leader = self._leader()
        return leader.configuration if leader else Configuration()

    def _check_quiet(self) -> None:
        """Check that nobody, removed members above all, deposes a leader without faults."""
        # What a fault has made late disturbs in good faith.
        self._run_until(self._transfers_until_us)
        if not self._run_until(self.now_us + HEALED_UNTIL_US, self._has_recovered):
            raise ViolationError("liveness: a late transfer is not got over: " + self._state())
        leader = self._leader()
        if leader is None or len(self.nodes) == len(leader.configuration.ids()):
            return
        term = leader.term
        self._run_until(self.now_us + 500_000)
        if leader.role is not Role.LEADER or leader.term != term:
            raise ViolationError("liveness: a leader was disturbed: " + self._state())

    def _schedule_tick(self, node: Node, delay_us: int) -> None:
        def tick() -> None:
            node.tick()
            self.after(node.tick_us, tick)

        self.after(delay_us, tick)

    def _heal(self) -> None:
        """End all faults; clients stop too, except for one last write each."""
        self.trace("heal")
        self.is_healed = True
        self.network.heal()
        self.network.faults = NetworkFaults()
        for node in self.nodes.values():
            node.disk_latency_us = (100, 3_000)
            node.paused_until_us = 0
            node.disk.stalled_until_us = node.disk.full_until_us = 0
            node.disk.fails_next = False
            if node.core is None and node.id not in self.lost:
                node.start()
        self._acknowledged_before = len(self.invariants.acknowledged)
        self._reads_before = self.reads_served
        self.after(500_000, self._last_operations)

    def _last_operations(self) -> None:
        for node in self.nodes.values():
            node.propose([self.clients.next_write()])
            node.read(self._random.getrandbits(63))
        self.after(500_000, self._last_operations)

    def _has_recovered(self) -> bool:
        leader = self._leader()
        if leader is None or not leader.is_settled or leader._transfer is not None:
            return False
        if not leader.configuration.is_voter(leader.config.id):
            return False
        ids = leader.configuration.ids()
        alive = [node for id_, node in self.nodes.items() if id_ in ids and node.core is not None]
        learners = set(leader.configuration.learners) - self.lost
        return (
            not (learners and self.options.promotes_learners)
            and all(node.core and node.core.leader == leader.config.id for node in alive)
            and len(self.invariants.acknowledged) > self._acknowledged_before
            and self.reads_served > self._reads_before
            and all(
                node.state.index == len(self.invariants.committed) == leader.log.last_index
                for node in alive
            )
        )

    def _state(self) -> str:
        return "; ".join(
            f"{core.config.id}: {core.role.name} term={core.term} commit={core.commit} "
            f"last={core.log.last_index} {core.configuration.voters}/"
            f"{core.configuration.voters_outgoing}+{core.configuration.learners}"
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
        if self._random.random() < 0.02:
            self._sent.append(message)
        sender, receiver = self.nodes[message.sender], self.nodes[message.receiver]
        sent_us = self.now_us

        def arrive() -> None:
            if sent_us > sender.lost_before_us:
                receiver.deliver(message)

        for delay_us in delays_us:
            self.after(delay_us, arrive)
            if isinstance(message, TimeoutNow) or (
                isinstance(message, VoteRequest) and message.transfer
            ):
                arrival_us = self.now_us + delay_us
                self._transfers_until_us = max(self._transfers_until_us, arrival_us)

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

    def replay(self, random: Random) -> None:
        """Deliver again some message that was sent at any time before."""
        if self._sent:
            message = random.choice(self._sent)
            self.trace("replay", message)
            self.nodes[message.receiver].deliver(message)

    # ---------------------------------------------------------------- what clients are told

    def write_acknowledged(self, index: int, data: bytes, answer: object) -> None:
        """Tell a client that its write is done."""
        self.trace("acknowledge", index, data)
        self.invariants.write_acknowledged(index, data)
        self.clients.answered(data, answer)

    def read_served(self, node: Node, asked: int) -> None:
        """Tell a client what it has read."""
        self.reads_served += 1
        self.trace("read", node.id, node.state.index, asked)
        self.invariants.read_served(node.state.index, asked)

    def transferred(self, node: Node, result: TransferResult) -> None:
        """Tell the operator how a transfer has ended."""
        self.trace("transferred", node.id, result)
        self.transfers_done += result.succeeded

    # ---------------------------------------------------------------- members

    def add_node(self) -> Node:
        """Return a new member: an empty disk, an id never used, and not in the cluster yet."""
        node = self._make_node(max(self.nodes) + 1, HardState(), ())
        node.start()
        self._schedule_tick(node, self._random.randrange(TICK_US))
        return node

    def _make_node(self, id_: MemberId, hard_state: HardState, entries: tuple[Entry, ...]) -> Node:
        options = self.options
        disk = self._disks[id_] = Disk(hard_state, entries, self._fresh().freeze())
        config = CoreConfig(
            id_, ELECTION_TICKS, HEARTBEAT_TICKS, options.limits, options.promotes_learners
        )
        node = self.nodes[id_] = Node(self, config, disk, Random(self._random.getrandbits(64)))
        return node

    def crash(self, node: Node, down_us: int | None) -> None:
        """Stop a member; start it again after up to `down_us`, or never."""
        if node.core is None:
            return
        self.crashes += 1
        self.trace("crash", node.id, node.crash())
        self.invariants.disk_changed()
        self._disconnect(node.id)
        if down_us is None:
            return
        life = node.life

        def restart() -> None:
            if node.life == life:
                self.trace("restart", node.id)
                node.start()

        self.after(self._random.randrange(1_000, down_us), restart)

    def _disconnect(self, crashed: MemberId) -> None:
        """Let some of the others notice that the connections of a crashed member have ended."""
        for other in self.nodes.values():
            if other.id != crashed and self._random.random() < 0.7:
                notice = partial(other.receive, partial(_report_disconnected, crashed))
                self.after(self._random.randrange(100, 5_000), notice)

    def crash_shortly(self, node: Node) -> None:
        """Stop a member and start it at once."""
        if node.core is not None and not self.is_healed:
            self.trace("crash", node.id, node.crash())
            node.start()

    def may_lose(self, node: Node) -> bool:
        """Whether every configuration that may come into force keeps a majority without `node`."""
        cores = self.cores()
        leaders = [core for core in cores if core.role is Role.LEADER]
        if node.id in self.lost or not leaders:
            return False
        ids = max(leaders, key=lambda core: core.term).configuration.ids()
        lost = self.lost | {node.id}
        if any(self.nodes[id_].core is None and id_ not in lost for id_ in ids):
            return False
        return all(
            has_quorum(configuration, set(configuration.ids()) - lost)
            # As if all learners were voters, which they may become.
            and 2 * len(lost.intersection(configuration.ids())) < len(configuration.ids())
            # Nor as if only those were that are lost.
            and 2 * len(lost.intersection(configuration.ids()))
            < len({*configuration.voters, *lost.intersection(configuration.learners)})
            for core in cores
            if core.config.id in ids
            for configuration in core._configurations.since(core.commit)
        )


def _report_disconnected(member: MemberId, core: Core) -> None:
    core.report_disconnected(member)
