"""What nodes' registrations, reports and silence do to the tables."""

from __future__ import annotations

from collections.abc import Callable
from sys import intern
from typing import Final

from msgspec.structs import replace

from prism_control.state.commands import (
    CordonNode,
    DrainNode,
    EvictSandboxes,
    LoseNode,
    MoveSandboxes,
    RaiseVersion,
    RegisterNode,
    Report,
    ReportSandboxes,
    ReviveNode,
    SuspectNode,
)
from prism_control.state.model import (
    LIMITS_NOT_HELD,
    NODE_DRAINED,
    DesiredState,
    NodeRow,
    NodeState,
    OnNodeLoss,
    SandboxRow,
    SandboxState,
    is_moving,
    is_placed,
)
from prism_control.state.results import Applied, NodeOk, RefusalKind, Refused
from prism_control.state.sandbox_handlers import GRACE_MS_DEFAULT, remove
from prism_control.state.tables import Tables
from prism_control.state.transitions import CAUSE_OF_REPORT, Cause, next_state

NODE_LOST: Final = "NODE_LOST"
NODE_FORGOT: Final = "NODE_FORGOT"
#: A LOST node is listed for this long, so that somebody sees it; then it is forgotten.
LOST_NODE_KEPT_MS: Final = 24 * 3600 * 1000
#: Rows stay small, whatever an agent says.
_MESSAGE_LENGTH_MAX: Final = 500

#: Each report asks for these: a name of the module costs less than a member of an enum.
_READY: Final = SandboxState.READY
_REPORT_DELETED: Final = Cause.REPORT_DELETED
_DESIRED_AFTER: Final = {
    SandboxState.STOPPING: DesiredState.STOPPED,
    SandboxState.STOPPED: DesiredState.STOPPED,
    # A FAILED sandbox must not be made anew by an agent that has lost it.
    SandboxState.FAILED: DesiredState.STOPPED,
    SandboxState.DELETED: DesiredState.DELETED,
}
_ENDED: Final = frozenset({SandboxState.STOPPED, SandboxState.FAILED, SandboxState.DELETED})


def register(tables: Tables, command: RegisterNode) -> NodeOk | Refused:
    """Add a node or take it back, with all that its agent has."""
    holder_id = tables.node_names.get(command.name, command.node_id)
    if holder_id != command.node_id:
        holder = tables.nodes[holder_id]
        if holder.state is not NodeState.LOST:
            return Refused(
                RefusalKind.ALREADY_EXISTS,
                f"the name {command.name!r} belongs to node {holder.id} at {holder.address}, which "
                "is alive: give this agent another --name",
                "name",
            )
        tables.drop_node(holder)
    _drop_long_lost(tables, command.node_id)
    previous = tables.nodes.get(command.node_id)
    node = tables.put_node(
        NodeRow(
            id=command.node_id,
            name=command.name,
            state=NodeState.READY,
            incarnation=command.incarnation,
            address=command.address,
            capacity=command.capacity,
            runtimes=command.runtimes,
            labels=command.labels,
            version=command.version,
            lease_ms=command.lease_ms,
            heartbeat_ms=command.heartbeat_ms,
            revision=0,
            create_ms=tables.now_ms if previous is None else previous.create_ms,
            last_seen_ms=tables.now_ms,
            cordoned=previous is not None and previous.cordoned,
            drain_ms=0 if previous is None else previous.drain_ms,
        )
    )
    for one in command.reports:
        _report(tables, node.id, one)
    has = {(one.sandbox_id, one.generation) for one in command.reports}
    for row in tables.placed_on(node.id):
        if (row.id, row.generation) not in has:
            _forgotten(tables, row)
    return NodeOk(node)


def report(tables: Tables, command: ReportSandboxes) -> Applied:
    """Record what an agent saw."""
    node = tables.nodes.get(command.node_id)
    if node is None or node.incarnation != command.incarnation:
        return Applied(0, len(command.reports))
    before, ignored = tables.revision, 0
    for one in command.reports:
        if not _report(tables, node.id, one):
            ignored += 1
    return Applied(tables.revision - before, ignored)


def suspect(tables: Tables, command: SuspectNode) -> Applied:
    """Place nothing new on a READY node."""
    return _mark(tables, command, NodeState.READY, NodeState.SUSPECT)


def revive(tables: Tables, command: ReviveNode) -> Applied:
    """Trust a SUSPECT node again."""
    return _mark(tables, command, NodeState.SUSPECT, NodeState.READY)


def lose(tables: Tables, command: LoseNode) -> Applied:
    """Give a node up, and with it what ran there."""
    node = tables.nodes.get(command.node_id)
    if node is None or node.incarnation != command.incarnation or node.state is NodeState.LOST:
        return Applied(0, 1)
    before = tables.revision
    seen_ms = max(command.last_seen_ms, node.last_seen_ms)
    tables.put_node(_with(node, NodeState.LOST, seen_ms))
    for row in tables.placed_on(node.id):
        _lose(tables, row, NODE_LOST, f"its node {row.node_name!r} was lost", seen_ms)
    return Applied(tables.revision - before)


def cordon(tables: Tables, command: CordonNode) -> NodeOk | Refused:
    """Close a node to new sandboxes, or open it."""
    node = tables.node(command.node)
    if node is None:
        return Refused(RefusalKind.NOT_FOUND, f"no node {command.node!r}", "node")
    drain_ms = node.drain_ms if command.cordoned else 0
    if node.cordoned == command.cordoned and node.drain_ms == drain_ms:
        return NodeOk(node)
    return NodeOk(tables.put_node(replace(node, cordoned=command.cordoned, drain_ms=drain_ms)))


def drain(tables: Tables, command: DrainNode) -> NodeOk | Refused:
    """Close a node, and note until when its sandboxes may stay."""
    node = tables.node(command.node)
    if node is None:
        return Refused(RefusalKind.NOT_FOUND, f"no node {command.node!r}", "node")
    drain_ms = max(tables.now_ms + command.deadline_ms, 1)
    return NodeOk(tables.put_node(replace(node, cordoned=True, drain_ms=drain_ms)))


def evict(tables: Tables, command: EvictSandboxes) -> Applied:
    """Move sandboxes off a node that drains, or end them where its deadline has passed."""
    return _clear(tables, command, _evict)


def move(tables: Tables, command: MoveSandboxes) -> Applied:
    """Begin to move sandboxes off a node that drains, and end the rest once its deadline is over.

    The next generation waits until the node says that this one runs no more: never two at once.
    """
    return _clear(tables, command, _move)


def _clear(
    tables: Tables,
    command: EvictSandboxes | MoveSandboxes,
    act: Callable[[Tables, SandboxRow, bool], bool],
) -> Applied:
    """Do to each sandbox that is still there what clears its node; `act` says if it was due."""
    node = tables.nodes.get(command.node_id)
    if node is None or not node.drain_ms:
        return Applied(0, len(command.sandbox_ids))
    over = tables.now_ms >= node.drain_ms
    changed = 0
    for key in command.sandbox_ids:
        row = tables.sandboxes.get(key)
        if row is not None and row.node_id == node.id and is_placed(row):
            changed += act(tables, row, over)
    return Applied(changed, len(command.sandbox_ids) - changed)


def raise_version(tables: Tables, command: RaiseVersion) -> Applied:
    """Let commands of a higher version be proposed."""
    raised = command.version > tables.command_version
    tables.command_version = max(tables.command_version, command.version)
    return Applied(0, int(not raised))


def _move(tables: Tables, row: SandboxRow, over: bool) -> bool:
    if is_moving(row):
        return False
    message = f"its node {row.node_name!r} was drained"
    movable = next_state(row.state, Cause.RESCHEDULE) is not None
    if row.spec.on_node_loss is OnNodeLoss.RESCHEDULE and movable:
        tables.put_sandbox(
            row,
            state=SandboxState.STOPPING,
            desired=DesiredState.STOPPED,
            grace_ms=GRACE_MS_DEFAULT,
            reason=NODE_DRAINED,
            message=f"{message}; it ends there, to be placed again",
        )
        return True
    if not over or row.state is SandboxState.DELETING:
        return False
    remove(tables, row, GRACE_MS_DEFAULT, NODE_DRAINED, message)
    return True


def _evict(tables: Tables, row: SandboxRow, over: bool) -> bool:
    message = f"its node {row.node_name!r} was drained"
    if row.spec.on_node_loss is OnNodeLoss.RESCHEDULE:
        state = next_state(row.state, Cause.RESCHEDULE)
        if state is not None:
            _reschedule(tables, row, state, message)
            return True
    if not over or row.state is SandboxState.DELETING:
        return False
    remove(tables, row, GRACE_MS_DEFAULT, NODE_DRAINED, message)
    return True


def _mark(
    tables: Tables, command: SuspectNode | ReviveNode, before: NodeState, after: NodeState
) -> Applied:
    node = tables.nodes.get(command.node_id)
    if node is None or node.incarnation != command.incarnation or node.state is not before:
        return Applied(0, 1)
    seen_ms = max(command.last_seen_ms, node.last_seen_ms)
    tables.put_node(_with(node, after, seen_ms))
    return Applied(1)


def _drop_long_lost(tables: Tables, node_id: str) -> None:
    """Forget nodes that are LOST for long, except the one that registers now."""
    horizon = tables.now_ms - LOST_NODE_KEPT_MS
    for node in list(tables.nodes.values()):
        if node.state is NodeState.LOST and node.last_seen_ms < horizon and node.id != node_id:
            tables.drop_node(node)


def _report(tables: Tables, node_id: str, report: Report) -> bool:
    """Apply one observation; False if it is fenced off, stale, or the table has no such step."""
    row = tables.sandboxes.get(report.sandbox_id)
    if row is None or row.node_id != node_id or row.generation != report.generation:
        return False
    cause = CAUSE_OF_REPORT[report.state]
    if report.start_count < row.start_count and cause is not _REPORT_DELETED:
        return False  # the agent has not heard of the start that is wanted now
    state = next_state(row.state, cause)
    if state is None:
        return False
    # One text for a hundred thousand rows.
    runtime = intern(report.runtime) if report.runtime else row.runtime
    if state is row.state and row.acknowledged and runtime == row.runtime:
        # Known; but that it is not held to its limits comes and goes while it runs.
        if LIMITS_NOT_HELD in (report.reason, row.reason) and _says_else(report, row):
            message = report.message[:_MESSAGE_LENGTH_MAX]
            tables.put_sandbox(row, reason=report.reason, message=message)
        return True
    ended, moving = state in _ENDED, is_moving(row)
    if moving and ended:
        _reschedule(tables, row, SandboxState.PENDING, f"its node {row.node_name!r} was drained")
        return True
    now_ms = tables.now_ms
    # Where the leader has ended it (a TTL), the agent need not say why again.
    kept = ended or moving
    reason = row.reason if moving else report.reason or (row.reason if kept else "")
    message = report.message or (row.message if kept else "")
    fresh = replace(
        row,
        revision=tables.revision + 1,
        state=state,
        desired=_DESIRED_AFTER.get(state, row.desired),
        runtime=runtime,
        reason=reason,
        message=message[:_MESSAGE_LENGTH_MAX],
        ready_ms=now_ms if state is _READY else row.ready_ms,
        end_ms=(row.end_ms or now_ms) if ended else row.end_ms,
        acknowledged=True,
    )
    tables.succeed_sandbox(row, fresh)
    return True


def _says_else(report: Report, row: SandboxRow) -> bool:
    return (report.reason, report.message[:_MESSAGE_LENGTH_MAX]) != (row.reason, row.message)


def _forgotten(tables: Tables, row: SandboxRow) -> None:
    """Draw the conclusion from an agent that does not have what the state has there.

    What it never acknowledged is assigned again.
    """
    if row.state is SandboxState.DELETING:
        _lose(tables, row, row.reason, row.message, row.last_seen_ms)
    elif row.acknowledged:
        message = f"its node {row.node_name!r} came back without it"
        _lose(tables, row, NODE_FORGOT, message, tables.now_ms)


def _lose(tables: Tables, row: SandboxRow, reason: str, message: str, seen_ms: int) -> None:
    """End a sandbox whose node has nothing of it any more, or place it again."""
    if is_moving(row):
        _reschedule(tables, row, SandboxState.PENDING, message)
        return
    if row.spec.on_node_loss is OnNodeLoss.RESCHEDULE:
        state = next_state(row.state, Cause.RESCHEDULE)
        if state is not None:
            _reschedule(tables, row, state, message)
            return
    state = next_state(row.state, Cause.LOSE)
    if state is row.state:  # FAILED: it had ended before, and only its files are gone now
        tables.put_sandbox(row, node_id="")
        return
    deleted = state is SandboxState.DELETED
    tables.put_sandbox(
        row,
        state=state,
        # A node that returns with it is told to remove its copy.
        desired=DesiredState.DELETED,
        reason=row.reason if deleted else reason,
        message=row.message if deleted else message,
        last_seen_ms=row.last_seen_ms if deleted else seen_ms,
        end_ms=tables.now_ms,
    )


def _reschedule(tables: Tables, row: SandboxRow, state: SandboxState, message: str) -> None:
    """Let a sandbox wait for a node again, as the next generation."""
    tables.put_sandbox(
        row,
        state=state,
        desired=DesiredState.RUNNING,
        generation=row.generation + 1,
        start_count=1,
        node_id="",
        node_name="",
        runtime="",
        reason="",
        message=f"{message}; it waits to be placed again",
        schedule_ms=0,
        ready_ms=0,
        acknowledged=False,
    )


def _with(node: NodeRow, state: NodeState, last_seen_ms: int) -> NodeRow:
    return replace(node, state=state, last_seen_ms=last_seen_ms)
