"""The reconciler: what is done so that what runs becomes what was assigned."""

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from prism_agent.reconcile import (
    BUSY,
    UP,
    Action,
    Assignment,
    Delete,
    Desired,
    Forget,
    Hurry,
    Pause,
    Phase,
    Reconciler,
    Report,
    Resize,
    Resume,
    Sandbox,
    Start,
    Stop,
    Update,
)


def want(
    sandbox_id: str = "a", desired: Desired = Desired.RUNNING, generation: int = 1, start: int = 1
) -> Assignment:
    spec = b"spec" if desired is Desired.RUNNING else b""
    return Assignment(sandbox_id, generation, desired, start, sandbox_id, spec)


def ready(machine: Reconciler, assignment: Assignment | None = None) -> None:
    assignment = assignment or want()
    machine.assign(1, [assignment], complete=False)
    machine.started(assignment.sandbox_id, "r")


def test_running_starts_once() -> None:
    machine = Reconciler(4)
    assert machine.assign(1, [want()], False) == [Report("a"), Start("a")]
    assert machine.assign(1, [want()], False) == []
    assert machine.started("a", "bubblewrap") == [Report("a")]
    assert machine.assign(1, [want()], True) == []
    assert machine.sandboxes["a"].phase is Phase.READY
    assert machine.sandboxes["a"].start_count == 1


def test_a_lower_term_is_refused() -> None:
    machine = Reconciler(4, term=5)
    assert machine.assign(4, [want()], True) == []
    assert machine.term == 5
    assert not machine.sandboxes


def test_a_lower_generation_is_refused() -> None:
    machine = Reconciler(4)
    ready(machine, want(generation=3))
    assert machine.assign(1, [want(generation=2, desired=Desired.DELETED)], False) == []
    assert machine.sandboxes["a"].phase is Phase.READY


def test_a_higher_generation_begins_empty() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [want(generation=2)], False) == [Delete("a", 0.0)]
    assert machine.deleted("a") == [Report("a"), Start("a")]
    assert machine.sandboxes["a"].generation == 2


def test_at_most_n_start_at_once_and_the_rest_in_order() -> None:
    machine = Reconciler(2)
    actions = machine.assign(1, [want(name) for name in "abcd"], False)
    assert [each for each in actions if isinstance(each, Start)] == [Start("a"), Start("b")]
    assert Start("c") in machine.started("a", "r")
    assert Start("d") in machine.start_failed("b", "START_FAILED", "no")
    machine.check()


def test_stop_and_start_again() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [want(desired=Desired.STOPPED)], False) == [Stop("a", 5.0)]
    assert machine.stopped("a") == [Report("a")]
    assert machine.assign(1, [want(start=1)], False) == []
    assert Start("a") in machine.assign(1, [want(start=2)], False)
    machine.started("a", "r")
    assert machine.sandboxes["a"].start_count == 2


def test_a_start_that_was_missed_implies_the_stop() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [want(start=2)], False) == [Stop("a", 5.0)]
    assert Start("a") in machine.stopped("a")


def test_stop_while_starting_is_obeyed_after_it() -> None:
    machine = Reconciler(4)
    machine.assign(1, [want()], False)
    assert machine.assign(1, [want(desired=Desired.STOPPED)], False) == []
    assert machine.started("a", "r") == [Stop("a", 5.0)]


def test_delete_while_starting_is_obeyed_after_it() -> None:
    machine = Reconciler(4)
    machine.assign(1, [want()], False)
    assert machine.assign(1, [want(desired=Desired.DELETED)], False) == []
    assert machine.started("a", "r") == [Delete("a", 5.0)]


def test_delete_while_queued_starts_nothing() -> None:
    machine = Reconciler(1)
    machine.assign(1, [want("a"), want("b")], False)
    assert machine.assign(1, [want("b", Desired.DELETED)], False) == [Delete("b", 5.0)]
    machine.check()


def test_delete_shortens_a_stop_under_way() -> None:
    machine = Reconciler(4)
    ready(machine)
    machine.assign(1, [want(desired=Desired.STOPPED)], False)
    forced = replace(want(desired=Desired.DELETED), grace_s=0.0)
    assert machine.assign(1, [forced], False) == [Hurry("a", 0.0)]
    assert machine.stopped("a") == [Delete("a", 0.0)]


def test_unknown_that_is_to_be_deleted_is_deleted() -> None:
    machine = Reconciler(4)
    assert machine.assign(1, [want(desired=Desired.DELETED)], False) == [Report("a")]
    assert machine.sandboxes["a"].phase is Phase.DELETED
    assert machine.acknowledged("a") == [Forget("a")]
    assert not machine.sandboxes


def test_what_a_complete_batch_lacks_goes() -> None:
    machine = Reconciler(4)
    ready(machine, want("a"))
    ready(machine, want("b"))
    assert machine.assign(1, [want("b")], complete=True) == [Delete("a", 0.0)]


def test_expired_is_not_started_again_before_the_leader_knows() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.expired("a", "TTL_EXPIRED", "over") == [Delete("a", 5.0)]
    assert machine.assign(1, [want(start=2)], False) == []
    assert machine.deleted("a") == [Report("a")]
    assert machine.sandboxes["a"].reason == "TTL_EXPIRED"
    assert machine.assign(1, [want(start=2)], False) == [Report("a")]


def test_a_renewed_deadline_is_told() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [replace(want(), expire_time_s=9.0)], False) == [Update("a")]


def test_lease_expiry_stops_only_what_may_be_placed_elsewhere() -> None:
    machine = Reconciler(1)
    ready(machine, replace(want("a"), reschedules=True))
    ready(machine, want("b"))
    machine.assign(1, [replace(want("c"), reschedules=True)], False)
    machine.assign(1, [replace(want("d"), reschedules=True)], False)
    assert machine.lease_expired() == [Stop("a", 0.0), Report("d")]
    machine.stopped("a")
    assert machine.sandboxes["a"].phase is Phase.FAILED
    assert machine.sandboxes["b"].phase is Phase.READY
    assert machine.started("c", "r") == [Stop("c", 0.0)]
    machine.stopped("c")
    assert machine.sandboxes["c"].reason == machine.sandboxes["d"].reason == "LEASE_EXPIRED"


def test_adoption_goes_on_with_what_was_under_way() -> None:
    machine = Reconciler(4)
    for phase, alive, expected in (
        (Phase.READY, True, []),
        (Phase.READY, False, [Report("a")]),
        (Phase.STARTING, False, [Report("a"), Start("a")]),
        (Phase.STOPPING, True, [Stop("a", 5.0)]),
        (Phase.DELETING, False, [Delete("a", 5.0)]),
        (Phase.STOPPED, False, []),
        (Phase.DELETED, False, []),
    ):
        machine = Reconciler(4)
        assert machine.adopt(Sandbox(want(), phase, 1), alive) == expected
        machine.check()


def test_pause_and_resume_go_through_their_own_phases() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [want(desired=Desired.PAUSED)], False) == [Pause("a")]
    assert machine.assign(1, [want(desired=Desired.PAUSED)], False) == []
    assert machine.paused("a") == [Report("a")]
    assert machine.assign(1, [want(desired=Desired.PAUSED)], False) == [Report("a")]
    assert machine.assign(1, [want()], False) == [Resume("a")]
    assert machine.resumed("a") == [Report("a")]
    assert machine.sandboxes["a"].phase is Phase.READY


def test_what_is_wanted_while_pausing_is_done_after_it() -> None:
    for desired, action in (
        (Desired.RUNNING, Resume("a")),
        (Desired.STOPPED, Stop("a", 5.0)),
        (Desired.DELETED, Delete("a", 5.0)),
    ):
        machine = Reconciler(4)
        ready(machine)
        machine.assign(1, [want(desired=Desired.PAUSED)], False)
        assert machine.assign(1, [want(desired=desired)], False) == []
        assert machine.paused("a")[-1] == action


def test_a_pause_that_fails_is_reported_and_not_repeated_by_itself() -> None:
    machine = Reconciler(4)
    ready(machine)
    machine.assign(1, [want(desired=Desired.PAUSED)], False)
    assert machine.pause_failed("a", "no freezer") == [Report("a")]
    assert machine.sandboxes["a"].reason == "PAUSE_FAILED"
    assert machine.assign(1, [want()], False) == [Report("a")]
    assert machine.sandboxes["a"].reason == ""


def test_a_sandbox_wanted_paused_before_it_was_started_is_started_first() -> None:
    machine = Reconciler(4)
    machine.assign(1, [want()], False)
    assert machine.assign(1, [want(desired=Desired.PAUSED)], False) == []
    assert machine.started("a", "r") == [Report("a"), Pause("a")]
    machine.paused("a")
    assert machine.assign(1, [want(start=2)], False) == [Stop("a", 5.0)]


def test_pausing_and_resuming_are_done_again_after_a_restart() -> None:
    for phase, action in ((Phase.PAUSING, Pause("a")), (Phase.RESUMING, Resume("a"))):
        adopted = Sandbox(want(desired=Desired.PAUSED), phase, 1)
        assert Reconciler(4).adopt(adopted, alive=True) == [action]
    dead = Sandbox(want(desired=Desired.PAUSED), Phase.PAUSED, 1)
    assert Reconciler(4).adopt(dead, alive=False) == [Report("a")]
    assert dead.phase is Phase.FAILED


def test_the_lease_ends_what_is_paused_too() -> None:
    machine = Reconciler(4)
    ready(machine, replace(want(), reschedules=True))
    machine.assign(1, [want(desired=Desired.PAUSED)], False)
    assert machine.lease_expired() == []
    assert machine.paused("a") == [Stop("a", 0.0)]


def test_one_that_failed_before_it_started_is_reported_when_it_is_stopped() -> None:
    machine = Reconciler(0)
    machine.assign(1, [replace(want(), reschedules=True)], False)
    assert machine.lease_expired() == [Report("a")]
    assert machine.sandboxes["a"].start_count == -1
    assert machine.assign(1, [want(desired=Desired.STOPPED)], False) == [Report("a")]
    # The leader takes no report of an earlier start than the one that it has asked for.
    assert machine.sandboxes["a"].start_count == 1


def resized(desired: Desired = Desired.RUNNING) -> Assignment:
    return replace(want(desired=desired), spec=b"other")


def test_new_limits_are_kept_before_they_are_set() -> None:
    machine = Reconciler(4)
    ready(machine)
    assert machine.assign(1, [resized()], False) == [Resize("a")]
    sandbox = machine.sandboxes["a"]
    assert (sandbox.wanted.spec, sandbox.reason) == (b"other", "LIMITS_NOT_HELD")
    assert machine.assign(1, [resized()], False) == []
    assert machine.resized("a", "") == [Report("a")]
    assert (sandbox.reason, sandbox.message) == ("", "")


def test_the_next_process_sets_limits_that_were_not_set() -> None:
    first = Reconciler(4)
    ready(first)
    first.assign(1, [resized()], False)
    after = Reconciler(4)
    assert after.adopt(first.sandboxes["a"], alive=True) == [Resize("a")]


def test_limits_that_cannot_be_set_are_told_once_and_when_they_are() -> None:
    machine = Reconciler(4)
    ready(machine)
    machine.assign(1, [resized()], False)
    assert machine.resized("a", "in use") == [Report("a")]
    assert machine.resized("a", "in use") == []
    assert machine.sandboxes["a"].message == "in use"
    assert machine.resized("a", "") == [Report("a")]
    machine.assign(1, [want(desired=Desired.DELETED)], False)
    assert machine.resized("a", "too late") == []


def test_limits_that_came_during_the_start_are_set_after_it() -> None:
    machine = Reconciler(4)
    machine.assign(1, [want()], False)
    assert machine.assign(1, [resized()], False) == [Resize("a")]
    assert machine.started("a", "r") == [Report("a"), Resize("a")]


def test_a_paused_sandbox_gets_new_limits_and_stays_paused() -> None:
    machine = Reconciler(4)
    ready(machine)
    machine.assign(1, [want(desired=Desired.PAUSED)], False)
    machine.paused("a")
    assert Resize("a") in machine.assign(1, [resized(Desired.PAUSED)], False)
    assert machine.sandboxes["a"].phase is Phase.PAUSED


def test_a_stop_is_none_the_worse_for_limits_that_could_not_be_set() -> None:
    machine = Reconciler(4)
    ready(machine)
    machine.assign(1, [resized()], False)
    machine.resized("a", "in use")
    assert machine.assign(1, [want(desired=Desired.STOPPED)], False) == [Stop("a", 5.0)]
    assert machine.stopped("a") == [Report("a")]
    assert machine.sandboxes["a"].phase is Phase.STOPPED
    again = replace(want(start=2), spec=b"third")
    assert machine.assign(1, [again], False) == [Resize("a"), Report("a"), Start("a")]


class Convergence(RuleBasedStateMachine):
    """Any order of assignments, outcomes and accidents: invariants hold, and it converges."""

    @initialize(starts_max=st.integers(1, 3))
    def begin(self, starts_max: int) -> None:
        self.machine = Reconciler(starts_max)
        self.under_way: dict[str, Action] = {}
        self.generations: dict[str, int] = {}
        #: The spec whose limits each is held to, and those that are about to be held to another.
        self.held: dict[str, bytes] = {}
        self.resizing: set[str] = set()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start | Stop | Pause | Resume | Delete):
                assert action.sandbox_id not in self.under_way, "two actions at once"
                self.under_way[action.sandbox_id] = action
            sandbox = self.machine.sandboxes.get(action.sandbox_id)
            if sandbox is not None and isinstance(action, Start):
                self.held[action.sandbox_id] = sandbox.wanted.spec
            elif sandbox is not None and isinstance(action, Resize) and sandbox.phase in UP:
                self.resizing.add(action.sandbox_id)

    @rule(
        name=st.sampled_from("abc"),
        generation=st.integers(1, 3),
        start=st.integers(1, 3),
        desired=st.sampled_from(Desired),
        complete=st.booleans(),
        spec=st.sampled_from([b"spec", b"other"]),
    )
    def assign(
        self, name: str, generation: int, start: int, desired: Desired, complete: bool, spec: bytes
    ) -> None:
        wanted = want(name, desired, generation, start)
        if wanted.spec:
            wanted = replace(wanted, spec=spec)
        self.perform(self.machine.assign(1, [wanted], complete))

    @precondition(lambda self: self.resizing)
    @rule(data=st.data(), good=st.booleans())
    def resize(self, data: st.DataObject, good: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.resizing)))
        if good:
            self.set_limits(name)
        else:
            self.perform(self.machine.resized(name, "in use"))

    def set_limits(self, name: str) -> None:
        self.resizing.discard(name)
        sandbox = self.machine.sandboxes.get(name)
        if sandbox is not None and sandbox.phase in UP:
            self.held[name] = sandbox.wanted.spec
        self.perform(self.machine.resized(name, ""))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), good=st.booleans())
    def finish(self, data: st.DataObject, good: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.under_way)))
        match self.under_way.pop(name):
            case Start() if good:
                self.perform(self.machine.started(name, "r"))
            case Start():
                self.perform(self.machine.start_failed(name, "START_FAILED", "no"))
            case Pause() if good:
                self.perform(self.machine.paused(name))
            case Pause():
                self.perform(self.machine.pause_failed(name, "no"))
            case Resume() if good:
                self.perform(self.machine.resumed(name))
            case Resume():
                self.perform(self.machine.resume_failed(name, "no"))
            case Stop():
                self.perform(self.machine.stopped(name))
            case Delete():
                self.perform(self.machine.deleted(name))

    @rule(name=st.sampled_from("abc"), kind=st.sampled_from(["died", "expired", "acknowledged"]))
    def accident(self, name: str, kind: str) -> None:
        if kind == "acknowledged":
            self.perform(self.machine.acknowledged(name))
        elif kind == "died":
            if name in self.under_way:
                # The edge tells of an end when what is under way is over.
                return
            self.perform(self.machine.died(name, "SUPERVISOR_DIED", "x"))
        else:
            self.perform(self.machine.expired(name, "TTL_EXPIRED", "x"))

    @rule()
    def lose_lease(self) -> None:
        self.perform(self.machine.lease_expired())

    @invariant()
    def holds(self) -> None:
        self.machine.check()
        for name, each in self.machine.sandboxes.items():
            busy = each.phase in BUSY
            assert busy == (name in self.under_way), (name, each, self.under_way)
            assert each.generation >= self.generations.get(name, 0)
            self.generations[name] = each.generation
        for name in set(self.generations) - self.machine.sandboxes.keys():
            del self.generations[name]

    def teardown(self) -> None:
        for _ in itertools.repeat(None, 50):
            if not self.under_way:
                break
            name = sorted(self.under_way)[0]
            outcome = {
                Start: lambda name: self.machine.started(name, "r"),
                Pause: self.machine.paused,
                Resume: self.machine.resumed,
                Stop: self.machine.stopped,
                Delete: self.machine.deleted,
            }[type(self.under_way.pop(name))]
            self.perform(outcome(name))
        assert not self.under_way, "it never comes to rest"
        for name in sorted(self.resizing):
            self.set_limits(name)
        for each in self.machine.sandboxes.values():
            assert each.phase not in BUSY | {Phase.QUEUED}
            if each.phase in UP:
                assert self.held[each.sandbox_id] == each.wanted.spec
                assert each.reason != "LIMITS_NOT_HELD"
            if each.phase is Phase.READY:
                failed = each.reason == "PAUSE_FAILED"
                assert each.wanted.desired is (Desired.PAUSED if failed else Desired.RUNNING)
            if each.phase is Phase.PAUSED and each.reason != "RESUME_FAILED":
                assert each.wanted.desired is Desired.PAUSED


TestConvergence = Convergence.TestCase
TestConvergence.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_stop_that_overtakes_a_start_is_reported_as_of_that_start() -> None:
    """The leader takes no report of an earlier start than the one it wanted last."""
    machine = Reconciler(1)
    machine.assign(1, [want("a"), want("b")], False)
    assert machine.sandboxes["b"].phase is Phase.QUEUED
    assert machine.assign(1, [want("b", Desired.STOPPED)], False) == [Report("b")]
    assert machine.sandboxes["b"].start_count == 1

    machine.started("a", "r")
    # It was stopped, started and stopped again while we were away.
    assert machine.assign(1, [want("a", Desired.STOPPED, start=2)], False) == [Stop("a", 5.0)]
    machine.stopped("a")
    assert machine.sandboxes["a"].start_count == 2


def test_what_may_run_elsewhere_by_now_is_not_started_again_from_the_journal() -> None:
    machine = Reconciler(4, fenced=True)
    moves = replace(want("a"), reschedules=True)
    assert machine.adopt(Sandbox(moves, Phase.STARTING, 1), alive=False) == [Report("a")]
    assert machine.sandboxes["a"].phase is Phase.FAILED
    assert machine.sandboxes["a"].reason == "LEASE_EXPIRED"
    stays = machine.adopt(Sandbox(want("b"), Phase.QUEUED), alive=False)
    assert Start("b") in stays
