"""Which nodes live: heartbeats heard and time passed in, commands out.

Two clocks, both in milliseconds and both given by the caller: the monotonic one decides, the wall
clock only says in `last_seen_ms` when that was, so that a step of the wall clock loses no node.

A node is given up only when its agent has ceased to trust its own lease, for a sandbox that is
placed again must not run twice. The agent counts the lease from when it *sent* the heartbeat, the
leader from when it heard it, which is later; a margin covers clocks that run at unequal speed and
the time the agent needs to stop. The lease that counts is the one that the node was told, which its
row holds, not what this leader would tell now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from prism_control.state.commands import LoseNode, ReviveNode, SuspectNode
from prism_control.state.events import Event, NodeRemoved, SandboxChanged
from prism_control.state.model import NodeRow, NodeState

LivenessCommand: TypeAlias = SuspectNode | LoseNode | ReviveNode

#: A proposal may be lost with no word (a queue was full); it is made again after this time.
_RETRY_MS: Final = 2000
#: Commands of one tick: a proposal stays small even when a switch takes hundreds of nodes away.
_COMMANDS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class LivenessConfig:
    """How patient the leader is.

    Attributes:
        heartbeat_ms_min: Interval up to 100 agents.
        heartbeat_ms_max: Interval from 1,000 agents on; between, 100 heartbeats a second arrive.
        agents_per_s: Heartbeats that the leader wants to hear each second at most.
        suspect_beats: Intervals of silence after which a node is SUSPECT.
        lease_beats: Intervals that a lease lasts.
        lease_ms_min: A lease lasts this long at least: an election and a reconnect fit into it.
        margin_ms: Beyond the lease until the node is LOST, and a tenth of the lease besides.
        stall_ms: Ticks further apart than this are the leader's own fault, and count as no silence.
    """

    heartbeat_ms_min: int = 1000
    heartbeat_ms_max: int = 10_000
    agents_per_s: int = 100
    suspect_beats: int = 3
    lease_beats: int = 6
    lease_ms_min: int = 15_000
    margin_ms: int = 2000
    stall_ms: int = 1500

    def heartbeat_ms(self, agents: int) -> int:
        """Return the interval to tell an agent when there are this many."""
        wanted = agents * 1000 // self.agents_per_s
        return min(max(wanted, self.heartbeat_ms_min), self.heartbeat_ms_max)

    def lease_ms(self, heartbeat_ms: int) -> int:
        """Return the lease to tell with an interval."""
        return max(self.lease_beats * heartbeat_ms, self.lease_ms_min)


class _Watched:
    """One node that is not LOST."""

    __slots__ = ("condemned", "counted_ms", "heard_ms", "retry_ms", "row")

    def __init__(self, row: NodeRow, counted_ms: int, heard_ms: int | None) -> None:
        self.row = row
        #: Monotonic time since which silence counts: the last heartbeat, or this leader's begin,
        #: moved on by the leader's own stalls.
        self.counted_ms = counted_ms
        #: Monotonic time at which this leader really heard it last; None: not yet.
        self.heard_ms = heard_ms
        #: No command is repeated before this time.
        self.retry_ms = 0
        #: Its loss is proposed: until that is settled its lease must not be renewed, for what ran
        #: there may be placed anew.
        self.condemned = False


class Liveness:
    """The leader's opinion of its nodes. Made anew by each leader.

    Args:
        nodes: All rows at the applied index at which it became leader.
        now_ms: Monotonic time; every node counts as heard now, so that none is lost before this
            leader has listened for a whole lease.
    """

    def __init__(
        self, nodes: Iterable[NodeRow], now_ms: int, config: LivenessConfig | None = None
    ) -> None:
        self.config = config or LivenessConfig()
        self._tick_ms = now_ms
        self._watched: dict[str, _Watched] = {}
        for row in nodes:
            if row.state is not NodeState.LOST:
                self._watched[row.id] = _Watched(row, now_ms, None)

    def terms(self) -> tuple[int, int]:
        """Return (heartbeat_ms, lease_ms) to tell the next agent that registers."""
        heartbeat_ms = self.config.heartbeat_ms(len(self._watched) + 1)
        return heartbeat_ms, self.config.lease_ms(heartbeat_ms)

    def heard(self, node_id: str, incarnation: str, now_ms: int) -> bool:
        """Note a heartbeat. False: no such node lives here; its session should end."""
        watched = self._watched.get(node_id)
        if watched is None or watched.row.incarnation != incarnation or watched.condemned:
            return False
        watched.heard_ms = now_ms
        watched.counted_ms = max(watched.counted_ms, now_ms)
        return True

    def registering(self, node_id: str, now_ms: int) -> None:
        """Note that a registration is about to be proposed: no loss may be proposed behind it.

        One that takes longer than a lease gives its agent none that is still good.
        """
        watched = self._watched.get(node_id)
        if watched is not None and not watched.condemned:
            watched.counted_ms = max(watched.counted_ms, now_ms)

    def registered(self, node_id: str, now_ms: int) -> None:
        """Note that a registration is committed: a loss that was proposed before is settled."""
        watched = self._watched.get(node_id)
        if watched is not None:
            watched.condemned = False
            watched.heard_ms = now_ms
            watched.counted_ms = max(watched.counted_ms, now_ms)

    def silence_ms(self, node_id: str, now_ms: int) -> int | None:
        """Return the time since the last heartbeat; None: this leader has heard none of it."""
        watched = self._watched.get(node_id)
        if watched is None or watched.heard_ms is None:
            return None
        return max(0, now_ms - watched.heard_ms)

    def observe(self, events: Sequence[Event], now_ms: int) -> None:
        """Take over committed changes of nodes. A registration counts as a heartbeat."""
        for event in events:
            if isinstance(event, SandboxChanged):
                continue  # nearly all
            if isinstance(event, NodeRemoved):
                self._watched.pop(event.row.id, None)
            else:
                self._node_changed(event.row, now_ms)

    def tick(self, now_ms: int, wall_ms: int) -> list[LivenessCommand]:
        """Return what to propose now, at once. Call it several times a second."""
        gap_ms = now_ms - self._tick_ms
        self._tick_ms = now_ms
        if gap_ms > self.config.stall_ms:
            for watched in self._watched.values():
                watched.counted_ms = min(now_ms, watched.counted_ms + gap_ms)
        commands: list[LivenessCommand] = []
        for watched in self._watched.values():
            if len(commands) == _COMMANDS_MAX:
                break
            kind = self._judge(watched, now_ms)
            if kind is not None and watched.retry_ms <= now_ms:
                watched.retry_ms = now_ms + _RETRY_MS
                watched.condemned = kind is LoseNode
                seen_ms = _seen_ms(watched, now_ms, wall_ms)
                commands.append(kind(watched.row.id, watched.row.incarnation, seen_ms))
        return commands

    def _node_changed(self, row: NodeRow, now_ms: int) -> None:
        watched = self._watched.get(row.id)
        if row.state is NodeState.LOST:
            self._watched.pop(row.id, None)
        elif watched is None or watched.row.incarnation != row.incarnation:
            self._watched[row.id] = _Watched(row, now_ms, now_ms)
        else:
            watched.row = row
            watched.retry_ms = 0

    def _judge(self, watched: _Watched, now_ms: int) -> type[LivenessCommand] | None:
        row, silence_ms = watched.row, now_ms - watched.counted_ms
        suspect_ms = self.config.suspect_beats * row.heartbeat_ms
        if silence_ms >= row.lease_ms + row.lease_ms // 10 + self.config.margin_ms:
            return LoseNode
        if row.state is NodeState.READY:
            return SuspectNode if silence_ms >= suspect_ms else None
        heard = watched.heard_ms is not None and now_ms - watched.heard_ms < suspect_ms
        return ReviveNode if heard else None


def _seen_ms(watched: _Watched, now_ms: int, wall_ms: int) -> int:
    """Return by wall time when the node was heard last, as well as this leader can know.

    One that was READY and that this leader has never heard lived when its predecessor ended.
    """
    if watched.heard_ms is not None:
        return wall_ms - (now_ms - watched.heard_ms)
    if watched.row.state is NodeState.SUSPECT:
        return watched.row.last_seen_ms
    return wall_ms - (now_ms - watched.counted_ms)
