"""What users' commands and the scheduler's do to the tables. Each returns its item's result."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from prism_common.limits import GRACE_S_DEFAULT, LABELS_MAX, MIB
from prism_control.state.commands import (
    AssignSandboxes,
    CreateSandbox,
    DeleteSandbox,
    ExpireSandboxes,
    Explanation,
    PauseSandbox,
    Placement,
    ResumeSandbox,
    StartSandbox,
    StopSandbox,
    UpdateSandbox,
)
from prism_control.state.model import (
    HOLDS_ALL,
    REFUSALS_MAX,
    DesiredState,
    NodeState,
    SandboxRow,
    SandboxState,
    Spec,
    is_moving,
    is_placed,
    new_sandbox,
    pairs,
)
from prism_control.state.results import Applied, Assigned, Ok, RefusalKind, Refused
from prism_control.state.tables import Tables
from prism_control.state.transitions import Cause, next_state

TTL_EXPIRED: Final = "TTL_EXPIRED"
GRACE_MS_DEFAULT: Final = int(GRACE_S_DEFAULT * 1000)
#: Each placement asks for these: a name of the module costs less than a member of an enum.
_PLACE: Final = Cause.PLACE
_NODE_READY: Final = NodeState.READY
_NOTHING_HELD: Final = (0, 0, 0, 0)


def create(tables: Tables, command: CreateSandbox) -> Ok | Refused:
    """Add a PENDING sandbox."""
    if command.name in tables.names:
        return Refused(
            RefusalKind.ALREADY_EXISTS,
            f"the name {command.name!r} is taken by sandbox {tables.names[command.name]}",
            "name",
        )
    if command.sandbox_id in tables.sandboxes:
        return Refused(
            RefusalKind.ALREADY_EXISTS, f"the id {command.sandbox_id!r} is taken", "sandbox_id"
        )
    spec = tables.intern(command.spec)
    row = new_sandbox(command.sandbox_id, command.name, spec, tables.now_ms, tables.revision + 1)
    return Ok(tables.create_sandbox(row))


def delete(tables: Tables, command: DeleteSandbox) -> Ok | Refused:
    """Remove a sandbox: at once where no node has anything of it."""
    row = tables.sandbox(command.sandbox)
    if row is None or row.state is SandboxState.DELETED:
        return _not_found(command.sandbox)
    grace_ms = 0 if command.force else command.grace_ms
    return Ok(remove(tables, row, grace_ms, row.reason, row.message))


def stop(tables: Tables, command: StopSandbox) -> Ok | Refused:
    """Have a sandbox's processes ended."""
    row = tables.sandbox(command.sandbox)
    if row is None or row.state is SandboxState.DELETED:
        return _not_found(command.sandbox)
    state = next_state(row.state, Cause.STOP)
    if state is None:
        return _wrong_state(row, "stopped")
    if is_moving(row):  # it stays where it is now, stopped
        return Ok(tables.put_sandbox(row, reason="", message=""))
    if state is row.state:
        return Ok(row)
    return Ok(
        tables.put_sandbox(
            row, state=state, desired=DesiredState.STOPPED, grace_ms=command.grace_ms
        )
    )


def start(tables: Tables, command: StartSandbox) -> Ok | Refused:
    """Have a STOPPED sandbox started again."""
    row = tables.sandbox(command.sandbox)
    if row is None or row.state is SandboxState.DELETED:
        return _not_found(command.sandbox)
    state = next_state(row.state, Cause.START)
    if state is None:
        return _wrong_state(row, "started")
    return Ok(
        tables.put_sandbox(
            row,
            state=state,
            desired=DesiredState.RUNNING,
            start_count=row.start_count + 1,
            reason="",
            message="",
            end_ms=0,
        )
    )


def update(tables: Tables, command: UpdateSandbox) -> Ok | Refused:
    """Change labels, the deadline or limits of a sandbox that lives."""
    row = tables.sandbox(command.sandbox)
    if row is None or row.state is SandboxState.DELETED:
        return _not_found(command.sandbox)
    if row.state is SandboxState.DELETING:
        return _wrong_state(row, "changed")
    labels = dict(row.spec.labels)
    labels.update(command.labels)
    kept = pairs({key: value for key, value in labels.items() if value})
    if len(kept) > LABELS_MAX:
        return Refused(
            RefusalKind.INVALID,
            f"labels: sandbox {row.name!r} would have {len(kept)}; at most {LABELS_MAX}",
            "labels",
        )
    expire_ms = command.expire_ms or row.expire_ms
    spec = replace(row.spec, labels=kept)
    if command.has_limits:
        spec = _resized(spec, command)
        refused = _refuse_limits(tables, row, spec)
        if refused is not None:
            return refused
    if spec == row.spec and expire_ms == row.expire_ms:
        return Ok(row)
    return Ok(tables.put_sandbox(row, spec=tables.intern(spec), expire_ms=expire_ms))


def _resized(spec: Spec, command: UpdateSandbox) -> Spec:
    return replace(
        spec,
        cpu_millicores=command.cpu_millicores or spec.cpu_millicores,
        memory_bytes=command.memory_bytes or spec.memory_bytes,
        disk_bytes=command.disk_bytes or spec.disk_bytes,
        processes_max=command.processes_max or spec.processes_max,
    )


def _refuse_limits(tables: Tables, row: SandboxRow, spec: Spec) -> Refused | None:
    """Say why a sandbox cannot have the limits of a spec; None: it can.

    One that waits for a node is what the scheduler decides about just now; one that has ended gave
    its room back, and takes none again.
    """
    node = tables.nodes.get(row.node_id)
    if not HOLDS_ALL[row.state] or node is None:
        return _wrong_state(row, "given other limits")
    held, room, old, new = tables.allocated(node.id), node.capacity, row.spec, spec
    for what, added, used, whole in (
        ("CPU", new.cpu_millicores - old.cpu_millicores, held.cpu_millicores, room.cpu_millicores),
        ("memory", new.memory_bytes - old.memory_bytes, held.memory_bytes, room.memory_bytes),
        ("disk", new.disk_bytes - old.disk_bytes, held.disk_bytes, room.disk_bytes),
    ):
        # What is not added is not asked about: a node may have come back with less than it had.
        if added > 0 and used + added > whole:
            return Refused(
                RefusalKind.NO_CAPACITY,
                f"node {node.name!r} has no room for {_amount(what, added)} more of {what}: "
                f"{_amount(what, max(0, whole - used))} is free",
            )
    return None


def _amount(what: str, value: int) -> str:
    return f"{value}m" if what == "CPU" else f"{value // MIB} MiB"


def pause(tables: Tables, command: PauseSandbox) -> Ok | Refused:
    """Have a sandbox's processes frozen; its node says when they are."""
    return _wish(tables, command.sandbox, Cause.PAUSE, DesiredState.PAUSED, "paused")


def resume(tables: Tables, command: ResumeSandbox) -> Ok | Refused:
    """Have a sandbox's processes thawed."""
    return _wish(tables, command.sandbox, Cause.RESUME, DesiredState.RUNNING, "resumed")


def _wish(
    tables: Tables, reference: str, cause: Cause, desired: DesiredState, what: str
) -> Ok | Refused:
    row = tables.sandbox(reference)
    if row is None or row.state is SandboxState.DELETED:
        return _not_found(reference)
    state = next_state(row.state, cause)
    if state is None:
        return _wrong_state(row, what)
    if row.desired is desired:
        return Ok(row)
    return Ok(tables.put_sandbox(row, state=state, desired=desired))


def expire(tables: Tables, command: ExpireSandboxes) -> Applied:
    """Remove sandboxes whose TTL is over."""
    changed = 0
    for key in command.sandbox_ids:
        row = tables.sandboxes.get(key)
        if row is None or not 0 < row.expire_ms <= tables.now_ms:
            continue
        if row.state in (SandboxState.DELETING, SandboxState.DELETED):
            continue
        remove(tables, row, GRACE_MS_DEFAULT, TTL_EXPIRED, "its time to live is over")
        changed += 1
    return Applied(changed, len(command.sandbox_ids) - changed)


def assign(tables: Tables, command: AssignSandboxes) -> Assigned:
    """Record the scheduler's decisions, as far as they still hold."""
    refused = [
        placement.sandbox_id for placement in command.placements if not _place(tables, placement)
    ]
    for explanation in command.explanations:
        _explain(tables, explanation)
    return Assigned(tuple(refused))


def _place(tables: Tables, placement: Placement) -> bool:
    row = tables.sandboxes.get(placement.sandbox_id)
    node = tables.nodes.get(placement.node_id)
    if row is None or node is None or row.generation != placement.generation:
        return False
    state = next_state(row.state, _PLACE)
    if state is None or node.state is not _NODE_READY or node.cordoned:
        return False
    cpu, memory, disk, slots = tables.held.get(node.id, _NOTHING_HELD)
    need, room = row.spec, node.capacity
    if (
        cpu + need.cpu_millicores > room.cpu_millicores
        or memory + need.memory_bytes > room.memory_bytes
        or disk + need.disk_bytes > room.disk_bytes
        or slots >= room.slots
    ):
        return False
    tables.succeed_sandbox(
        row,
        replace(
            row,
            revision=tables.revision + 1,
            state=state,
            node_id=node.id,
            node_name=node.name,
            schedule_ms=tables.now_ms,
            reason="",
            message="",
            placement=(),
        ),
    )
    return True


def _explain(tables: Tables, explanation: Explanation) -> None:
    refusals = explanation.refusals[:REFUSALS_MAX]
    for key in explanation.sandbox_ids:
        row = tables.sandboxes.get(key)
        if row is None or row.state is not SandboxState.PENDING:
            continue
        if row.placement != refusals or row.message != explanation.message:
            tables.put_sandbox(row, message=explanation.message, placement=refusals)


def remove(tables: Tables, row: SandboxRow, grace_ms: int, reason: str, message: str) -> SandboxRow:
    """Let a sandbox that is not DELETED go, by its node where that can be."""
    if is_placed(row):
        if row.state is SandboxState.DELETING:  # only a shorter grace period is news
            return row if grace_ms >= row.grace_ms else tables.put_sandbox(row, grace_ms=grace_ms)
        fresh = replace(
            row,
            revision=tables.revision + 1,
            state=_follow(row, Cause.DELETE),
            desired=DesiredState.DELETED,
            grace_ms=grace_ms,
            reason=reason,
            message=message,
        )
        return tables.succeed_sandbox(row, fresh)
    return tables.put_sandbox(
        row,
        state=_follow(row, Cause.REMOVE),
        desired=DesiredState.DELETED,
        reason=reason,
        message=message if reason else "",
        end_ms=tables.now_ms,
        placement=(),
    )


def _follow(row: SandboxRow, cause: Cause) -> SandboxState:
    """Return the next state where the table is known to have one: it lets any sandbox go."""
    state = next_state(row.state, cause)
    if state is None:
        raise ValueError(f"sandbox {row.id} is {row.state.name}: no way on by {cause.name}")
    return state


def _not_found(reference: str) -> Refused:
    return Refused(RefusalKind.NOT_FOUND, f"no sandbox {reference!r}", "sandbox")


def _wrong_state(row: SandboxRow, what: str) -> Refused:
    return Refused(
        RefusalKind.WRONG_STATE,
        f"sandbox {row.name!r} is {row.state.name} and cannot be {what}",
        "sandbox",
    )
