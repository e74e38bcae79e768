"""The scheduler: events of the state machine in, decisions out.

It works on a view in memory that runs ahead of the state by its own decisions: what it decided is
reserved until the commit is observed or the decision is void, so that two passes never give the
same room away twice. Same events, same random numbers, same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from prism_control.scheduler.placement import (
    Candidates,
    Strategy,
    Uniform,
    choose_quickly,
)
from prism_control.scheduler.views import NodeView, Reservation, Shape, entry_of, shape_of
from prism_control.scheduler.waiting import ShapeQueue, Waiting
from prism_control.state.commands import AssignSandboxes, CreateSandbox, Explanation, Placement
from prism_control.state.events import Event, NodeChanged, SandboxChanged
from prism_control.state.machine import Machine
from prism_control.state.model import (
    GENERATION_FIRST,
    HOLDS_ALL,
    NOTHING,
    REFUSALS_MAX,
    NodeRow,
    Pairs,
    PlacementRefusal,
    SandboxRow,
    SandboxState,
    held_by,
    holds_all,
    is_placed,
)

#: Placements of one pass: a proposal of about 60 KiB, decided in tens of milliseconds.
PLACEMENTS_MAX: Final = 1000
#: Sandboxes that one pass explains: an explanation changes rows, and rows cost revisions.
EXPLAINED_MAX: Final = 200
#: A shape's explanation is made at most this often, …
_EXPLAIN_MS: Final = 5000
#: … so many shapes in one pass, each of which looks at all nodes, …
_EXPLAINED_SHAPES_MAX: Final = 4
#: … and passes that explain are so far apart.
_EXPLAIN_PASS_MS: Final = 500
#: Pairs of a parked shape and a node with new room that one pass looks at; what it does not come to
#: is tried when its patience is over.
_UNPARK_CHECKS_MAX: Final = 50_000

#: Shapes in an entry of creates that are tried at once: each may look at all nodes.
_AHEAD_SHAPES_MAX: Final = 32

#: Nodes by what they must have, whatever their room.
_Class: TypeAlias = tuple[str, Pairs]


class Scheduler:
    """Decides on the leader. Made anew by each leader (`from_machine`).

    Args:
        uniform: Random numbers, 0 ≤ x < 1, such as `random.Random(seed).random`.
        strategy: What makes a node better.
        leader_host: Host of the control node that leads: its own node is second choice. Empty: no
            node is.
    """

    def __init__(
        self,
        uniform: Uniform,
        *,
        strategy: Strategy = Strategy.SPREAD,
        leader_host: str = "",
    ) -> None:
        self._uniform = uniform
        self._strategy = strategy
        self._leader_host = leader_host
        #: All nodes, by id.
        self._nodes: dict[str, NodeView] = {}
        #: Decisions by sandbox that no event has confirmed yet.
        self._reserved: dict[str, Reservation] = {}
        self._waiting = Waiting()
        #: Creates in entries that are not applied yet for which there was no node.
        self._in_vain = 0
        #: Open nodes that suit a runtime and node_selector; emptied when nodes change.
        self._suitable: dict[_Class, list[NodeView]] = {}
        #: Changes when any node gains room.
        self._room_epoch = 0
        #: Nodes that have gained room since parked shapes were looked at.
        self._gained: dict[str, NodeView] = {}
        self._explain_ms = 0

    @classmethod
    def from_machine(
        cls,
        machine: Machine,
        uniform: Uniform,
        *,
        strategy: Strategy = Strategy.SPREAD,
        leader_host: str = "",
    ) -> Scheduler:
        """Return a scheduler that knows what the machine knows."""
        scheduler = cls(uniform, strategy=strategy, leader_host=leader_host)
        for row in machine.nodes():
            held = machine.allocated(row.id)
            scheduler._nodes[row.id] = NodeView(row, held, leader_host)
        for sandbox in machine.pending():
            scheduler._waiting.add(entry_of(sandbox), shape_of(sandbox.spec))
        return scheduler

    # ── What happens ─────────────────────────────────────────────────────────────────────────

    def observe(self, events: Sequence[Event]) -> None:
        """Take over committed changes, in order. Every event since `from_machine` must come."""
        for event in events:
            if isinstance(event, SandboxChanged):
                self._sandbox_changed(event.row, event.previous)
            elif isinstance(event, NodeChanged):
                self._node_changed(event)
            else:
                self._node_removed(event.row)

    def forget(self, sandbox_ids: Iterable[str]) -> None:
        """Give back what was reserved for decisions that are void, and let the sandboxes wait.

        For `Assigned.refused`, and for all of a command that was not proposed. Ids without a
        reservation are no error.
        """
        for key in sandbox_ids:
            reservation = self._reserved.get(key)
            if reservation is None:
                continue
            self._release(key, reservation)
            if reservation.entry is not None:
                self._waiting.add(reservation.entry, reservation.shape)

    def forget_all(self, command: AssignSandboxes) -> None:
        """Take a whole command back that was not proposed, or may not be committed."""
        self.forget(placement.sandbox_id for placement in command.placements)
        for explanation in command.explanations:
            self._waiting.retell(explanation.sandbox_ids)

    def heard_load(self, node_id: str, load_per_core: float) -> None:
        """Note the load of a heartbeat."""
        view = self._nodes.get(node_id)
        if view is not None:
            view.load_per_core = load_per_core
            view.rescore()

    # ── What to do ───────────────────────────────────────────────────────────────────────────

    @property
    def waiting_count(self) -> int:
        """Sandboxes that wait for a decision."""
        return len(self._waiting)

    @property
    def reserved_count(self) -> int:
        """Decisions that are not committed yet."""
        return len(self._reserved)

    def score(self, node_id: str) -> float | None:
        """Return a node's score, 0–100; None: unknown."""
        view = self._nodes.get(node_id)
        return None if view is None else view.score

    def decide(self, now_ms: int, limit: int = PLACEMENTS_MAX) -> AssignSandboxes | None:
        """Place up to `limit` sandboxes, in turn. None: there is nothing to propose.

        Each placement is reserved until `observe` or `forget` hears of it.
        """
        self._unpark(now_ms)
        placements: list[Placement] = []
        while len(placements) < limit:
            turn = self._waiting.first()
            if turn is None:
                break
            entry, queue = turn
            view = self._choose(queue)
            if view is None:
                self._waiting.park(queue, now_ms)
                continue
            self._waiting.take(queue)
            placements.append(Placement(entry[3], entry[2], view.row.id))
            view.take(queue.held, 1)
            self._reserved[entry[3]] = Reservation(view.row.id, queue.held, queue.shape, entry)
        explanations = self._explain(now_ms)
        if not placements and not explanations:
            return None
        return AssignSandboxes(tuple(placements), explanations)

    def decide_ahead(self, creates: Sequence[CreateSandbox]) -> tuple[AssignSandboxes, int]:
        """Place sandboxes that are about to be created, for the same entry of the log.

        Whose turn comes only after others, and who finds no node, is left to `decide`. Each
        placement is reserved as there; of one that was not created `forget` keeps nothing.

        Returns:
            The placements; and how many found no node, for `end_ahead`: until then nobody is placed
            ahead, since room that comes meanwhile is theirs.
        """
        if self._is_anyone_first():
            return AssignSandboxes(), 0
        placements: list[Placement] = []
        queues: dict[Shape, ShapeQueue | None] = {}
        in_vain = 0
        for create in sorted(creates, key=_most_important_first):
            shape, key = shape_of(create.spec), create.sandbox_id
            if shape not in queues:
                may_try = len(queues) < _AHEAD_SHAPES_MAX and not self._waiting.holds(shape)
                queues[shape] = ShapeQueue(shape) if may_try else None
            queue = queues[shape]
            if queue is None or key in self._reserved:
                continue
            view = self._choose(queue)
            if view is None:
                in_vain += 1
                queues[shape] = None
                continue
            placements.append(Placement(key, GENERATION_FIRST, view.row.id))
            view.take(queue.held, 1)
            self._reserved[key] = Reservation(view.row.id, queue.held, shape, None)
        self._in_vain += in_vain
        return AssignSandboxes(tuple(placements)), in_vain

    def end_ahead(self, in_vain: int) -> None:
        """Take note that an entry of creates, of which so many found no node, has ended."""
        self._in_vain -= in_vain

    def _is_anyone_first(self) -> bool:
        """Whether others may have a claim to the room that there is."""
        if self._in_vain or self._waiting.first() is not None:
            return True
        return bool(self._gained) and len(self._waiting) > 0

    def next_ms(self, now_ms: int) -> int | None:
        """Return when `decide` may have something new if no event comes; None: never."""
        if self._gained and len(self._waiting):
            return now_ms
        times: list[int] = []
        for queue in self._waiting.shapes():
            if not queue.parked:
                return now_ms
            times.append(min(queue.retry_ms, max(self._explain_ms, queue.explain_ms)))
            if len(queue.told) < queue.members:
                times.append(self._explain_ms)
        return max(now_ms, min(times)) if times else None

    # ── Events ───────────────────────────────────────────────────────────────────────────────

    def _sandbox_changed(self, row: SandboxRow, previous: SandboxRow | None) -> None:
        if previous is not None and HOLDS_ALL[previous.state] and holds_all(row):
            if row.spec is not previous.spec:  # its limits may be others
                self._account(previous, -1)
                self._account(row, 1)
            return  # most events of a sandbox's life: its node's room stays as it is
        if previous is not None:
            self._account(previous, -1)
        reservation = self._reserved.get(row.id)
        if row.state is SandboxState.PENDING:
            if reservation is None:
                self._waiting.add(entry_of(row), shape_of(row.spec))
            elif reservation.entry is None:
                self._reserved[row.id] = reservation._replace(entry=entry_of(row))
            return
        self._waiting.remove(row.id)
        if reservation is not None:
            if HOLDS_ALL[row.state] and row.node_id == reservation.node_id:
                del self._reserved[row.id]  # confirmed: the room stays taken
                return
            self._release(row.id, reservation)
        self._account(row, 1)

    def _account(self, row: SandboxRow, sign: int) -> None:
        view = self._nodes.get(row.node_id)
        if view is not None and is_placed(row):
            view.take(held_by(row), sign)
            if sign < 0:
                self._room_gained(view)

    def _release(self, sandbox_id: str, reservation: Reservation) -> None:
        del self._reserved[sandbox_id]
        view = self._nodes.get(reservation.node_id)
        if view is not None:
            view.take(reservation.held, -1)
            self._room_gained(view)

    def _room_gained(self, view: NodeView) -> None:
        self._gained[view.row.id] = view
        self._room_epoch += 1

    def _node_changed(self, event: NodeChanged) -> None:
        row = event.row
        view = self._nodes.get(row.id)
        if view is None:
            view = self._nodes[row.id] = NodeView(row, NOTHING, self._leader_host)
        else:
            view.take_over(row, self._leader_host)
        self._suitable.clear()
        self._room_gained(view)

    def _node_removed(self, row: NodeRow) -> None:
        self._nodes.pop(row.id, None)
        self._gained.pop(row.id, None)
        self._suitable.clear()
        self._room_epoch += 1

    # ── Choosing ─────────────────────────────────────────────────────────────────────────────

    def _choose(self, queue: ShapeQueue) -> NodeView | None:
        shape = queue.shape
        suitable = self._suiting(shape)
        if self._strategy is Strategy.SPREAD:
            view, certain = choose_quickly(suitable, shape, self._uniform)
            if view is not None or certain:
                return view
        if queue.candidates is None or queue.candidates_epoch != self._room_epoch:
            queue.candidates = Candidates(suitable, shape, self._strategy)
            queue.candidates_epoch = self._room_epoch
        return queue.candidates.choose(shape, self._uniform)

    def _suiting(self, shape: Shape) -> list[NodeView]:
        key = (shape.runtime, shape.node_selector)
        found = self._suitable.get(key)
        if found is None:
            found = [view for view in self._nodes.values() if view.open and view.suits(shape)]
            self._suitable[key] = found
        return found

    def _unpark(self, now_ms: int) -> None:
        """Give parked shapes their turn that some node with new room could take, or whose time is.

        Shapes that have waited longest for a check come first only by chance; the bound is far
        beyond what a cluster with sane requests needs.
        """
        gained = [view for view in self._gained.values() if view.open]
        self._gained.clear()
        checks = _UNPARK_CHECKS_MAX
        for queue in self._waiting.shapes():
            if not queue.parked:
                continue
            shape = queue.shape
            if gained and checks > 0:
                checks -= len(gained)
                if any(view.fits(shape) and view.suits(shape) for view in gained):
                    self._waiting.unpark(queue, gained=True)
                    continue
            if queue.retry_ms <= now_ms:
                self._waiting.unpark(queue, gained=False)

    # ── Explaining ───────────────────────────────────────────────────────────────────────────

    def _explain(self, now_ms: int) -> tuple[Explanation, ...]:
        if now_ms < self._explain_ms:
            return ()
        found: list[Explanation] = []
        budget, shapes = EXPLAINED_MAX, _EXPLAINED_SHAPES_MAX
        for queue in self._waiting.shapes():
            if not queue.parked or not budget:
                continue
            self._explain_ms = now_ms + _EXPLAIN_PASS_MS
            if queue.explain_ms <= now_ms and shapes:
                shapes -= 1
                queue.explain_ms = now_ms + _EXPLAIN_MS
                self._waiting.set_explanation(queue, *self.explain(queue.shape))
            explanation = self._waiting.explain(queue, budget)
            if explanation is not None:
                budget -= len(explanation.sandbox_ids)
                found.append(explanation)
        return tuple(found)

    def explain(self, shape: Shape) -> tuple[str, tuple[PlacementRefusal, ...]]:
        """Return why a shape finds no node: in a sentence, and for the nodes that come nearest.

        Looks at all nodes. Nodes that would take it count as lacking nothing and are left out.
        """
        if not self._nodes:
            return "no node has registered yet", ()
        closed, unsuitable, full = [], [], []
        for view in self._nodes.values():
            if not view.open:
                closed.append(view)
            elif not view.suits(shape):
                unsuitable.append(view)
            elif not view.fits(shape):
                full.append(view)
        for views in (closed, unsuitable, full):
            views.sort(key=_nearest_first)
        parts = (
            (full, "without room for it"),
            (unsuitable, "without what it asks for"),
            (closed, "closed to new sandboxes"),
        )
        counts = ", ".join(f"{len(views)} {what}" for views, what in parts if views)
        refusals = tuple(
            PlacementRefusal(view.row.id, view.row.name, view.refusal(shape))
            for view in (full + unsuitable + closed)[:REFUSALS_MAX]
        )
        return f"waits for a node: of {len(self._nodes)}, {counts or 'none refuses'}", refusals


def _most_important_first(create: CreateSandbox) -> int:
    return -create.spec.priority


def _nearest_first(view: NodeView) -> tuple[float, str]:
    return -view.score, view.row.name
