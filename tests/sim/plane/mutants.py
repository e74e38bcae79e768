"""Known bugs around the core: of the batcher, the leader's duties, dispatch and the agents.

Three of them are bugs that the simulator found here. Two more that it found take too many seeds to
be found again, and have unit tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from prism_agent.edge import Edge
from prism_agent.reconcile import Reconciler, Sandbox
from prism_agent.session import Session
from prism_common.errors import PrismError
from prism_control.batcher import Batcher, EntryBatch
from prism_control.node.driver import Driver
from prism_control.node.replica import Replica
from prism_control.node.upgrade import VersionGate
from prism_control.scheduler.core import Scheduler
from prism_control.scheduler.drains import Drains
from prism_control.scheduler.liveness import Liveness
from prism_control.scheduler.views import NodeView, Shape
from prism_control.state.commands import AssignSandboxes, CreateSandbox, EvictSandboxes, decode
from prism_control.state.machine import Machine
from prism_control.state.model import NodeState
from prism_control.state.snapshot import encode_snapshot
from prism_control.state.tables import Tables
from tests.sim.mutant import Mutant
from tests.sim.plane.supervisor import SimSupervisor


def _answers_in_the_wrong_order(original: Any) -> Callable[..., Any]:
    def resolve(self: EntryBatch, result: Any) -> None:
        original(self, list(reversed(result)))

    return resolve


class _Answered:
    """Takes the place of a batch whose callers were answered too early."""

    def resolve(self, result: object) -> None:
        """Nobody waits any more."""

    def fail(self, error: Exception) -> None:
        """Nobody waits any more."""


def _creates_are_answered_before_commit(original: Any) -> Callable[..., Any]:
    def propose(self: Driver, batches: Any) -> None:
        for batch in batches:
            known = set(self._pending)
            original(self, [batch])
            if not isinstance(decode(batch.data).items[0], CreateSandbox):
                continue
            for index in set(self._pending) - known:
                view = cast("Replica", self._machine).machine.snapshot_view()
                machine = Machine.from_snapshot(encode_snapshot(view))
                batch.resolve(machine.apply(index, batch.data)[0])
                self._pending[index].batch = _Answered()

    return propose


def _repeats_are_applied_again(original: Any) -> Callable[..., Any]:
    def remember(self: Tables, row: Any) -> None:
        """Nothing is known of it later."""

    return remember


def _waiting_callers_are_forgotten(original: Any) -> Callable[..., Any]:
    def fail_all(self: Batcher, error: PrismError) -> None:
        for queue in self._queues:
            queue.items.clear()

    return fail_all


def _stale_term_is_obeyed(original: Any) -> Callable[..., Any]:
    def accepts_term(self: Reconciler, term: int) -> bool:
        self.term = max(term, self.term)
        return True

    return accepts_term


def _unknown_copies_stay(original: Any) -> Callable[..., Any]:
    def remove_unknown(self: Reconciler, sandbox: Sandbox) -> list[Any]:
        return []

    return remove_unknown


def _lease_is_ignored(original: Any) -> Callable[..., Any]:
    def renew_lease(self: Session, sent_s: float) -> None:
        # Supervisors are told so too: they would make up for an agent that ignores it alone.
        original(self, sent_s + 3600.0)

    return renew_lease


def _nodes_are_lost_too_soon(original: Any) -> Callable[..., Any]:
    def judge(self: Liveness, watched: Any, now_ms: int) -> Any:
        return original(self, watched, now_ms + watched.row.lease_ms // 2)

    return judge


def _reservations_are_forgotten(original: Any) -> Callable[..., Any]:
    def forget(self: Scheduler, sandbox_ids: Any) -> None:
        """Nothing waits again."""

    return forget


def _labels_are_not_compared(original: Any) -> Callable[..., Any]:
    def suits(self: NodeView, shape: Shape) -> bool:
        return bool(self.runtimes)

    return suits


def _old_copy_is_not_waited_for(original: Any) -> Callable[..., Any]:
    def due(self: Drains, machine: Any, now_ms: int) -> Any:
        command = original(self, machine, now_ms)
        return command and EvictSandboxes(command.node_id, command.sandbox_ids)

    return due


def _lost_explanations_are_not_told_again(original: Any) -> Callable[..., Any]:
    def forget_all(self: Scheduler, command: AssignSandboxes) -> None:
        self.forget(placement.sandbox_id for placement in command.placements)

    return forget_all


def _overtaken_start_keeps_its_count(original: Any) -> Callable[..., Any]:
    def converge_stopped(self: Reconciler, sandbox: Sandbox) -> Any:
        before = sandbox.start_count
        actions = original(self, sandbox)
        sandbox.start_count = before
        return actions

    return converge_stopped


def _new_commands_are_not_held_back(original: Any) -> Callable[..., Any]:
    def may(self: VersionGate, command: Any) -> bool:
        return True

    return may


def _version_is_raised_by_who_was_heard(original: Any) -> Callable[..., Any]:
    def others(self: VersionGate) -> dict[str, int | None]:
        return {name: told for name, told in original(self).items() if told}

    return others


def _cordoned_nodes_are_open(original: Any) -> Any:
    return property(lambda self: self.row.state is NodeState.READY)


def _supervisors_outlive_their_lease(original: Any) -> Callable[..., Any]:
    def look(self: SimSupervisor) -> None:
        """It ends when an agent says so."""

    return look


def _supervisors_outlast_the_leader(original: Any) -> Callable[..., Any]:
    def lease_left_s(self: Edge, record: Any) -> float | None:
        left_s = original(self, record)
        return None if left_s is None else float(left_s) + 3.0

    return lease_left_s


def _mutant(
    title: str, seeds_max: int, owner: type, name: str, make: Callable[[Any], Callable[..., Any]]
) -> Mutant:
    return Mutant(title, seeds_max, owner, name, make, in_plane=True)


PLANE_MUTANTS = (
    _mutant("answers in the wrong order", 5, EntryBatch, "resolve", _answers_in_the_wrong_order),
    _mutant(
        "creates are answered before commit",
        100,
        Driver,
        "_propose",
        _creates_are_answered_before_commit,
    ),
    _mutant("repeats are applied again", 20, Tables, "remember", _repeats_are_applied_again),
    _mutant(
        "waiting callers are forgotten", 400, Batcher, "fail_all", _waiting_callers_are_forgotten
    ),
    _mutant("stale term is obeyed", 300, Reconciler, "accepts_term", _stale_term_is_obeyed),
    _mutant("unknown copies stay", 20, Reconciler, "_remove_unknown", _unknown_copies_stay),
    _mutant("lease is ignored", 200, Session, "_renew_lease", _lease_is_ignored),
    _mutant("nodes are lost too soon", 50, Liveness, "_judge", _nodes_are_lost_too_soon),
    _mutant("reservations are forgotten", 200, Scheduler, "forget", _reservations_are_forgotten),
    _mutant("labels are not compared", 20, NodeView, "suits", _labels_are_not_compared),
    _mutant("old copy is not waited for", 100, Drains, "due", _old_copy_is_not_waited_for),
    _mutant(
        "lost explanations are not told again",
        400,
        Scheduler,
        "forget_all",
        _lost_explanations_are_not_told_again,
    ),
    _mutant(
        "overtaken start keeps its count",
        100,
        Reconciler,
        "_converge_stopped",
        _overtaken_start_keeps_its_count,
    ),
    _mutant(
        "new commands are not held back", 50, VersionGate, "may", _new_commands_are_not_held_back
    ),
    _mutant("cordoned nodes are open", 50, NodeView, "open", _cordoned_nodes_are_open),
    _mutant(
        "supervisors outlive their lease",
        100,
        SimSupervisor,
        "_look",
        _supervisors_outlive_their_lease,
    ),
    _mutant(
        "supervisors outlast the leader's patience",
        100,
        Edge,
        "_lease_left_s",
        _supervisors_outlast_the_leader,
    ),
    _mutant(
        "version is raised by who was heard",
        20,
        VersionGate,
        "_others",
        _version_is_raised_by_who_was_heard,
    ),
)
