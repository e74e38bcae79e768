"""What a control node measures. Gauges are read at each scrape, so that they cost nothing else."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from prism_common.calls import CallMetrics

#: From a RAM disk's commit to a spinning disk under load.
_FSYNC_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
_SIZE_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_READY_BUCKETS: Final = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip


class RaftMetrics:
    """What the driver and the log count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.proposals = Counter(
            "prism_raft_proposals_total",
            "Entries proposed here, by how they ended: committed, dropped, lost or unknown.",
            ("result",),
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "prism_raft_commit_seconds",
            "Time from a proposal to its commit and application on the leader.",
            buckets=_FSYNC_BUCKETS,
            registry=registry,
        )
        self.fsync_seconds = Histogram(
            "prism_raft_fsync_seconds",
            "Time of one synchronous commit to the log on disk.",
            buckets=_FSYNC_BUCKETS,
            registry=registry,
        )
        for result in ("committed", "dropped", "lost", "unknown"):
            self.proposals.labels(result)


class SnapshotMetrics:
    """What is counted of snapshots on their way to other members."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.transfers = Counter(
            "prism_raft_snapshot_transfers_total",
            "Snapshots sent to other members, by how that ended: sent or failed.",
            ("result",),
            registry=registry,
        )
        self.sent_bytes = Counter(
            "prism_raft_snapshot_sent_bytes_total",
            "Bytes of snapshots sent to other members.",
            registry=registry,
        )
        self.resumed_bytes = Counter(
            "prism_raft_snapshot_resumed_bytes_total",
            "Bytes that were not sent again when a broken transfer went on.",
            registry=registry,
        )
        for result in ("sent", "failed"):
            self.transfers.labels(result)


class BatcherMetrics:
    """What the batcher counts; `op` is create, delete or other."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.batch_size = Histogram(
            "prism_batcher_batch_size",
            "Requests that went into one entry of the log.",
            ("op",),
            buckets=_SIZE_BUCKETS,
            registry=registry,
        )
        self.rejected = Counter(
            "prism_batcher_rejected_total",
            "Requests refused because the queue was full.",
            ("op",),
            registry=registry,
        )


class LeaderMetrics:
    """What a leader counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.placements = Counter(
            "prism_scheduler_placements_total",
            "Placements decided, by what became of them: committed, or refused since the node or "
            "the sandbox was another by then, or was not created at all.",
            ("result",),
            registry=registry,
        )
        self.dispatch_size = Histogram(
            "prism_dispatch_batch_size",
            "Assignments in one message to an agent.",
            buckets=_SIZE_BUCKETS,
            registry=registry,
        )
        self.ready_seconds = Histogram(
            "prism_sandbox_ready_seconds",
            "Time from the commit of a sandbox's creation to READY.",
            buckets=_READY_BUCKETS,
            registry=registry,
        )
        for result in ("committed", "refused"):
            self.placements.labels(result)


class ControlMetrics:
    """Everything that one control node exposes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self.registry)
        self.raft = RaftMetrics(self.registry)
        self.snapshots = SnapshotMetrics(self.registry)
        self.batcher = BatcherMetrics(self.registry)
        self.leader = LeaderMetrics(self.registry)


@dataclass(frozen=True, slots=True)
class RaftFigures:
    """Raft's gauges.

    Attributes:
        match_index: Peer's name → highest index known to be on its disk; empty on a follower.
        last_contact: Peer's name → monotonic time of the last message from it.
    """

    term: int
    is_leader: bool
    last_index: int
    commit_index: int
    applied_index: int
    leader_changes: int
    snapshot_bytes: int
    match_index: Mapping[str, int]
    last_contact: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StateFigures:
    """The gauges of state and queues.

    Attributes:
        sandboxes: State's name → number.
        nodes: State's name → number.
        pending: Sandboxes that wait for a node.
        queues: op → length, capacity, and whether it batches.
    """

    sandboxes: Mapping[str, int]
    nodes: Mapping[str, int]
    pending: int
    queues: Mapping[str, tuple[int, int, bool]]


def _gauge(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label] if label else None)
    for key, value in values:
        family.add_metric([key] if label else [], value)
    return family


class StatusCollector:
    """Turns two statuses into gauges at each scrape. It runs in the scraper's thread."""

    def __init__(self, raft: Callable[[], RaftFigures], state: Callable[[], StateFigures]) -> None:
        self._raft = raft
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yield every gauge."""
        yield from self._collect_raft(self._raft())
        yield from self._collect_state(self._state())

    def _collect_raft(self, raft: RaftFigures) -> Iterator[Metric]:
        for name, text, value in (
            ("prism_raft_term", "Current term.", raft.term),
            ("prism_raft_is_leader", "1 on the leader, else 0.", int(raft.is_leader)),
            ("prism_raft_last_index", "Last index in the log.", raft.last_index),
            ("prism_raft_commit_index", "Highest committed index known.", raft.commit_index),
            ("prism_raft_applied_index", "Highest index applied.", raft.applied_index),
            ("prism_raft_snapshot_bytes", "Size of the last snapshot made.", raft.snapshot_bytes),
        ):
            yield _gauge(name, text, "", [("", value)])
        changes = Metric("prism_raft_leader_changes", "Leaders seen by this member.", "counter")
        changes.add_sample("prism_raft_leader_changes_total", {}, raft.leader_changes)
        yield changes
        yield _gauge(
            "prism_raft_peer_match_index",
            "Highest index known to be on a peer's disk; on the leader only.",
            "peer",
            raft.match_index.items(),
        )
        now = time.monotonic()
        yield _gauge(
            "prism_raft_peer_last_contact_seconds",
            "Time since a peer was last heard.",
            "peer",
            ((peer, now - heard) for peer, heard in raft.last_contact.items()),
        )

    def _collect_state(self, state: StateFigures) -> Iterator[Metric]:
        yield _gauge("prism_sandboxes", "Sandboxes.", "state", state.sandboxes.items())
        yield _gauge("prism_nodes", "Nodes.", "state", state.nodes.items())
        yield _gauge("prism_scheduler_pending", "Sandboxes that wait for a node.", "",
                     [("", state.pending)])  # fmt: skip
        queues = state.queues.items()
        yield _gauge("prism_batcher_queue_length", "Requests that wait.", "op",
                     ((op, length) for op, (length, _, _) in queues))  # fmt: skip
        yield _gauge("prism_batcher_queue_capacity", "Requests that may wait.", "op",
                     ((op, capacity) for op, (_, capacity, _) in queues))  # fmt: skip
        yield _gauge("prism_batcher_batching", "0 passes through, 1 batches.", "op",
                     ((op, int(batching)) for op, (_, _, batching) in queues))  # fmt: skip
