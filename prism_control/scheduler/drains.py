"""Which sandboxes must leave nodes that drain, for the leader to propose."""

from __future__ import annotations

from typing import Final

from prism_control.state.commands import MoveSandboxes
from prism_control.state.machine import Machine
from prism_control.state.model import NodeRow, OnNodeLoss, SandboxRow, SandboxState, is_moving

#: Sandboxes of one command: one entry is applied in one go.
MOVES_MAX: Final = 1000
#: A node that drains is looked at this often: a look costs about 1 ms a thousand sandboxes.
_LOOK_MS: Final = 1000

#: What can be placed anew: it has not ended, and nobody has asked for its end.
_MOVABLE: Final = frozenset(
    {SandboxState.SCHEDULED, SandboxState.STARTING, SandboxState.READY, SandboxState.PAUSED}
)


class Drains:
    """The leader's view of drains. Made anew by each leader."""

    def __init__(self) -> None:
        #: When each node that drains is looked at next, by wall time.
        self._look_ms: dict[str, int] = {}

    def due(self, machine: Machine, now_ms: int) -> MoveSandboxes | None:
        """Return the next sandboxes to move or to end, all of one node; None: there are none now.

        What is proposed and not yet applied is returned again, which changes nothing.
        """
        draining = {node.id: node for node in machine.nodes() if node.drain_ms}
        self._look_ms = {key: at for key, at in self._look_ms.items() if key in draining}
        for node in draining.values():
            if self._look_ms.get(node.id, 0) > now_ms:
                continue
            found = [row.id for row in machine.sandboxes_on(node.id) if _goes(row, node, now_ms)]
            if found:
                return MoveSandboxes(node.id, tuple(found[:MOVES_MAX]))
            self._look_ms[node.id] = now_ms + _LOOK_MS
        return None


def _goes(row: SandboxRow, node: NodeRow, now_ms: int) -> bool:
    if row.spec.on_node_loss is OnNodeLoss.RESCHEDULE and row.state in _MOVABLE:
        return True
    if row.state is SandboxState.DELETING or is_moving(row):
        return False
    return now_ms >= node.drain_ms
