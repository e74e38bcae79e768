"""What to do so that the node's sandboxes become what the leader assigned.

Pure: assignments and observations go in, actions come out. The edge (`sandboxes.py`) performs the
actions, and tells what came of them. At most one action is under way for a sandbox, so the edge
needs no locks; everything is idempotent by (sandbox, generation, start_count).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prism_agent.actions import (
    Action,
    Delete,
    Forget,
    Hurry,
    Pause,
    Report,
    Resize,
    Resume,
    Start,
    Stop,
    Update,
)
from prism_agent.model import (
    BUSY,
    LEASE_EXPIRED,
    LIMITS_NOT_HELD,
    LIVE,
    UP,
    Assignment,
    Desired,
    Phase,
    Sandbox,
)

#: The words that it is spoken to in come with it.
__all__ = [
    "BUSY",
    "LEASE_EXPIRED",
    "LIMITS_NOT_HELD",
    "LIVE",
    "UP",
    "Action",
    "Assignment",
    "Delete",
    "Desired",
    "Forget",
    "Hurry",
    "Pause",
    "Phase",
    "Reconciler",
    "Report",
    "Resize",
    "Resume",
    "Sandbox",
    "Start",
    "Stop",
    "Update",
]

#: Reasons of one that runs nevertheless.
_PASSING = frozenset({LIMITS_NOT_HELD, "PAUSE_FAILED", "RESUME_FAILED"})
_LEASE_EXPIRED_MESSAGE = "no leader was heard within the node's lease"

#: The outcome of the action under way leads on to what is wanted by then.
_DEFERS = frozenset({Phase.STARTING, Phase.PAUSING, Phase.RESUMING})


@dataclass(slots=True)
class Reconciler:
    """The sandboxes of one node.

    Args:
        starts_max: Starts under way at once; more only make each of them slower.
        term: Highest leader's term seen, as kept on disk.
        fenced: The lease was over when this process began: what may be placed elsewhere by now is
            not started again from the journal.
    """

    starts_max: int
    term: int = 0
    fenced: bool = False
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    #: Invariant: holds exactly the ids of the sandboxes that are QUEUED, oldest first.
    _queue: deque[str] = field(default_factory=deque)
    #: Invariant: holds exactly the ids of the sandboxes that are STARTING.
    _starting: set[str] = field(default_factory=set)

    # ── from the journal ──

    def adopt(self, sandbox: Sandbox, alive: bool) -> list[Action]:
        """Take over a sandbox that the journal knows; `alive`: its supervisor answered."""
        self.sandboxes[sandbox.sandbox_id] = sandbox
        match sandbox.phase:
            case Phase.DELETING:
                return [Delete(sandbox.sandbox_id, sandbox.wanted.grace_s)]
            case Phase.STOPPING:
                return [self._stop(sandbox)]
            case Phase.QUEUED | Phase.STARTING if self.fenced and sandbox.wanted.reschedules:
                return self._fail(sandbox, LEASE_EXPIRED, _LEASE_EXPIRED_MESSAGE)
            case Phase.QUEUED | Phase.STARTING:
                return self._enqueue(sandbox)
            case _ if sandbox.phase in UP and not alive:
                return self._fail(
                    sandbox, "PROCESS_LOST", "its processes ended while no agent ran here"
                )
            case Phase.PAUSING:
                return [Pause(sandbox.sandbox_id)]
            case Phase.RESUMING:
                return [Resume(sandbox.sandbox_id)]
            case _ if sandbox.phase in UP and sandbox.reason == LIMITS_NOT_HELD:
                return [Resize(sandbox.sandbox_id)]
            case _:
                return []

    # ── from the leader ──

    def accepts_term(self, term: int) -> bool:
        """Raise the term to a leader's; False: the leader is of an older one."""
        if term < self.term:
            return False
        self.term = term
        return True

    def assign(self, term: int, assignments: Iterable[Assignment], complete: bool) -> list[Action]:
        """Obey a batch. `complete`: sandboxes that are not in it are to go."""
        if not self.accepts_term(term):
            return []
        actions: list[Action] = []
        named: set[str] = set()
        for assignment in assignments:
            named.add(assignment.sandbox_id)
            actions += self._assign(assignment)
        if complete:
            for sandbox_id in sorted(self.sandboxes.keys() - named):
                actions += self._remove_unknown(self.sandboxes[sandbox_id])
        return actions

    def _remove_unknown(self, sandbox: Sandbox) -> list[Action]:
        if sandbox.phase is Phase.DELETED:
            return [Report(sandbox.sandbox_id)]
        sandbox.successor = None
        sandbox.reason = "NOT_ASSIGNED"
        sandbox.message = "the control plane does not know it here"
        return self._delete(sandbox, grace_s=0.0)

    def _assign(self, new: Assignment) -> list[Action]:
        sandbox = self.sandboxes.get(new.sandbox_id)
        if sandbox is None:
            return self._assign_unknown(new)
        if new.generation < sandbox.generation:
            return []
        if new.generation > sandbox.generation:
            return self._supersede(sandbox, new)
        if sandbox.phase is Phase.DELETED:
            return [Report(new.sandbox_id)]
        if sandbox.phase is Phase.DELETING:
            return self._hurry(sandbox, new.grace_s) if new.desired is Desired.DELETED else []
        return self._converge(sandbox, new)

    def _assign_unknown(self, new: Assignment) -> list[Action]:
        if new.desired is Desired.RUNNING:
            sandbox = self.sandboxes[new.sandbox_id] = Sandbox(new, Phase.QUEUED)
            return self._enqueue(sandbox)
        phase = Phase.DELETED if new.desired is Desired.DELETED else Phase.FAILED
        sandbox = self.sandboxes[new.sandbox_id] = Sandbox(new, phase, new.start_count)
        if phase is Phase.FAILED:
            sandbox.reason, sandbox.message = "FILES_LOST", "this node has nothing of it"
        return [Report(new.sandbox_id)]

    def _supersede(self, sandbox: Sandbox, new: Assignment) -> list[Action]:
        """A higher generation begins empty: what is here goes first."""
        if sandbox.phase is Phase.DELETED:
            del self.sandboxes[new.sandbox_id]
            return self._assign_unknown(new)
        sandbox.successor = new
        return self._delete(sandbox, grace_s=0.0)

    def _converge(self, sandbox: Sandbox, new: Assignment) -> list[Action]:
        old = sandbox.wanted
        if old.desired is Desired.DELETED and new.desired is not Desired.DELETED:
            # It goes already, perhaps because its time was up: nothing brings it back.
            return []
        if not new.spec:
            new = new.with_spec_of(old)
        sandbox.wanted = new
        changed = new.expire_time_s != old.expire_time_s
        actions: list[Action] = [Update(sandbox.sandbox_id)] if changed else []
        if new.spec != old.spec:
            actions.append(self._resize(sandbox))
        if new.desired is Desired.DELETED:
            return self._delete(sandbox)
        if new.desired is Desired.STOPPED:
            return actions + self._converge_stopped(sandbox)
        if new.start_count < old.start_count:
            # A late copy of an earlier wish.
            sandbox.wanted = old
            return actions
        if new.desired is Desired.PAUSED:
            return actions + self._converge_paused(sandbox)
        if sandbox.phase is Phase.READY and old.desired is Desired.PAUSED:
            # It was not paused, or not for long: the leader may know it as paused.
            sandbox.reason = sandbox.message = ""
            actions.append(Report(sandbox.sandbox_id))
        return actions + self._converge_running(sandbox)

    def _resize(self, sandbox: Sandbox) -> Action:
        sandbox.resize_due = sandbox.phase is Phase.STARTING
        if sandbox.phase in UP and not sandbox.reason:
            # Kept before it is done: the next process does it if this one does not come to it.
            sandbox.reason, sandbox.message = LIMITS_NOT_HELD, "its limits are being changed"
        return Resize(sandbox.sandbox_id)

    def _converge_paused(self, sandbox: Sandbox) -> list[Action]:
        if sandbox.wanted.start_count > sandbox.start_count:
            # It was to be stopped, started and paused while we were away.
            return self._converge_running(sandbox)
        match sandbox.phase:
            case Phase.READY:
                return [self._pause(sandbox)]
            case Phase.PAUSED:
                return [Report(sandbox.sandbox_id)]
            case _:
                return []

    def _converge_stopped(self, sandbox: Sandbox) -> list[Action]:
        # A start that was overtaken by this stop counts as done: the leader takes no report of
        # an earlier one.
        sandbox.start_count = max(sandbox.start_count, sandbox.wanted.start_count)
        match sandbox.phase:
            case Phase.READY | Phase.PAUSED:
                return [self._stop(sandbox)]
            case Phase.QUEUED:
                self._queue.remove(sandbox.sandbox_id)
                sandbox.phase = Phase.STOPPED
                return [Report(sandbox.sandbox_id)]
            case Phase.STOPPING:
                return self._hurry(sandbox, sandbox.wanted.grace_s)
            case Phase.STOPPED | Phase.FAILED:
                # One that failed before it started was reported with no start, or an earlier one.
                return [Report(sandbox.sandbox_id)]
            case _:
                return []

    def _converge_running(self, sandbox: Sandbox) -> list[Action]:
        if sandbox.wanted.start_count <= sandbox.start_count:
            paused = sandbox.phase is Phase.PAUSED and sandbox.wanted.desired is Desired.RUNNING
            return [self._resume(sandbox)] if paused else []
        match sandbox.phase:
            case Phase.READY | Phase.PAUSED:
                # It was to be stopped and started while we were away: the start implies the stop.
                return [self._stop(sandbox)]
            case Phase.STOPPED | Phase.FAILED:
                return self._enqueue(sandbox)
            case _:
                return []

    # ── from the edge ──

    def started(self, sandbox_id: str, runtime: str) -> list[Action]:
        """It accepts execs."""
        sandbox = self.sandboxes[sandbox_id]
        self._starting.discard(sandbox_id)
        sandbox.phase, sandbox.runtime = Phase.READY, runtime
        actions = self._start_next()
        if sandbox.wanted.desired is Desired.DELETED or sandbox.successor is not None:
            return actions + self._delete(sandbox)
        if sandbox.wanted.desired is Desired.STOPPED:
            return [*actions, self._stop(sandbox)]
        sandbox.reason = sandbox.message = ""
        actions.append(Report(sandbox_id))
        if sandbox.resize_due:
            sandbox.resize_due = False
            actions.append(Resize(sandbox_id))
        if sandbox.wanted.desired is Desired.PAUSED:
            actions.append(self._pause(sandbox))
        return actions

    def paused(self, sandbox_id: str) -> list[Action]:
        """Its processes are frozen."""
        return self._settle_pause(sandbox_id, Phase.PAUSING, Phase.PAUSED, "", "")

    def pause_failed(self, sandbox_id: str, message: str) -> list[Action]:
        """Its processes run on. It is tried again when the leader says so again."""
        return self._settle_pause(sandbox_id, Phase.PAUSING, Phase.READY, "PAUSE_FAILED", message)

    def resumed(self, sandbox_id: str) -> list[Action]:
        """Its processes run, and it accepts execs."""
        return self._settle_pause(sandbox_id, Phase.RESUMING, Phase.READY, "", "")

    def resume_failed(self, sandbox_id: str, message: str) -> list[Action]:
        """Its processes are frozen still."""
        return self._settle_pause(
            sandbox_id, Phase.RESUMING, Phase.PAUSED, "RESUME_FAILED", message
        )

    def _settle_pause(
        self, sandbox_id: str, was: Phase, now: Phase, reason: str, message: str
    ) -> list[Action]:
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase is not was:
            return []
        sandbox.phase = now
        if sandbox.wanted.desired is Desired.DELETED or sandbox.successor is not None:
            return self._delete(sandbox)
        if sandbox.wanted.desired is Desired.STOPPED:
            return [self._stop(sandbox)]
        sandbox.reason, sandbox.message = reason, message
        actions: list[Action] = [Report(sandbox_id)]
        if reason:
            return actions
        if sandbox.wanted.desired is Desired.PAUSED and now is Phase.READY:
            return actions + self._converge_paused(sandbox)
        return actions + self._converge_running(sandbox)

    def resized(self, sandbox_id: str, failure: str) -> list[Action]:
        """It is held to the limits of its spec; or, as `failure` says why, not to all of them."""
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase not in UP:
            return []
        reason = LIMITS_NOT_HELD if failure else ""
        if sandbox.reason not in ("", LIMITS_NOT_HELD) or (sandbox.reason, sandbox.message) == (
            reason,
            failure,
        ):
            return []
        sandbox.reason, sandbox.message = reason, failure
        return [Report(sandbox_id)]

    def start_failed(self, sandbox_id: str, reason: str, message: str) -> list[Action]:
        """It could not be made, and nothing of it runs."""
        sandbox = self.sandboxes[sandbox_id]
        self._starting.discard(sandbox_id)
        failed = self._fail(sandbox, reason, message)
        if sandbox.wanted.desired is Desired.DELETED or sandbox.successor is not None:
            failed = self._delete(sandbox)
        return self._start_next() + failed

    def stopped(self, sandbox_id: str) -> list[Action]:
        """No process of it runs."""
        sandbox = self.sandboxes[sandbox_id]
        if sandbox.phase is not Phase.STOPPING:
            return []
        sandbox.phase = Phase.FAILED if sandbox.reason else Phase.STOPPED
        if sandbox.wanted.desired is Desired.DELETED or sandbox.successor is not None:
            return self._delete(sandbox)
        return [Report(sandbox_id), *self._converge_running_if_wanted(sandbox)]

    def _converge_running_if_wanted(self, sandbox: Sandbox) -> list[Action]:
        if sandbox.wanted.desired not in (Desired.RUNNING, Desired.PAUSED):
            return []
        return self._converge_running(sandbox)

    def died(self, sandbox_id: str, reason: str, message: str) -> list[Action]:
        """Its supervisor ended without being asked to."""
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase not in UP:
            return []
        return self._fail(sandbox, reason, message)

    def expired(self, sandbox_id: str, reason: str, message: str) -> list[Action]:
        """Its TTL or idle timeout has passed: the node removes it by itself."""
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase in (Phase.DELETING, Phase.DELETED):
            return []
        sandbox.reason, sandbox.message = reason, message
        return self._delete(sandbox)

    def deleted(self, sandbox_id: str) -> list[Action]:
        """Nothing of it is left."""
        sandbox = self.sandboxes[sandbox_id]
        sandbox.phase = Phase.DELETED
        if sandbox.successor is not None:
            successor = sandbox.successor
            del self.sandboxes[sandbox_id]
            return self._assign_unknown(successor)
        return [Report(sandbox_id)]

    def delete_failed(self, sandbox_id: str) -> list[Action]:
        """Something of it is left: the edge waits, then is told to try again."""
        return [Delete(sandbox_id, 0.0)]

    def acknowledged(self, sandbox_id: str) -> list[Action]:
        """The leader has committed the last report of it."""
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.phase is not Phase.DELETED:
            return []
        del self.sandboxes[sandbox_id]
        return [Forget(sandbox_id)]

    def lease_expired(self) -> list[Action]:
        """Stop what the leader may by now have placed elsewhere (fencing)."""
        actions: list[Action] = []
        for sandbox in sorted(self.sandboxes.values(), key=lambda each: each.sandbox_id):
            if not sandbox.wanted.reschedules:
                continue
            reason, message = LEASE_EXPIRED, _LEASE_EXPIRED_MESSAGE
            if sandbox.phase is Phase.QUEUED:
                self._queue.remove(sandbox.sandbox_id)
                actions += self._fail(sandbox, reason, message)
            elif sandbox.phase in LIVE:
                sandbox.reason, sandbox.message = reason, message
                if sandbox.phase in (Phase.READY, Phase.PAUSED):
                    actions.append(self._stop(sandbox, grace_s=0.0))
                elif sandbox.phase in _DEFERS:
                    sandbox.wanted = sandbox.wanted.stopped()
                else:
                    actions += self._hurry(sandbox, 0.0)
        return actions

    # ── transitions ──

    def _enqueue(self, sandbox: Sandbox) -> list[Action]:
        sandbox.phase = Phase.QUEUED
        sandbox.reason = sandbox.message = ""
        self._queue.append(sandbox.sandbox_id)
        return [Report(sandbox.sandbox_id), *self._start_next()]

    def _start_next(self) -> list[Action]:
        actions: list[Action] = []
        while self._queue and len(self._starting) < self.starts_max:
            sandbox = self.sandboxes[self._queue.popleft()]
            sandbox.phase = Phase.STARTING
            sandbox.start_count = sandbox.wanted.start_count
            self._starting.add(sandbox.sandbox_id)
            actions.append(Start(sandbox.sandbox_id))
        return actions

    def _stop(self, sandbox: Sandbox, grace_s: float | None = None) -> Stop:
        sandbox.phase = Phase.STOPPING
        if sandbox.reason in _PASSING:
            # Not why it ends.
            sandbox.reason = sandbox.message = ""
        grace = sandbox.wanted.grace_s if grace_s is None else grace_s
        return Stop(sandbox.sandbox_id, grace)

    def _pause(self, sandbox: Sandbox) -> Pause:
        sandbox.phase = Phase.PAUSING
        return Pause(sandbox.sandbox_id)

    def _resume(self, sandbox: Sandbox) -> Resume:
        sandbox.phase = Phase.RESUMING
        return Resume(sandbox.sandbox_id)

    def _hurry(self, sandbox: Sandbox, grace_s: float) -> list[Action]:
        return [Hurry(sandbox.sandbox_id, grace_s)]

    def _fail(self, sandbox: Sandbox, reason: str, message: str) -> list[Action]:
        sandbox.phase, sandbox.reason, sandbox.message = Phase.FAILED, reason, message
        return [Report(sandbox.sandbox_id)]

    def _delete(self, sandbox: Sandbox, grace_s: float | None = None) -> list[Action]:
        """Delete now, or have the outcome of the action under way lead to it."""
        grace = sandbox.wanted.grace_s if grace_s is None else grace_s
        if sandbox.phase is Phase.DELETING:
            return self._hurry(sandbox, grace)
        if sandbox.phase in _DEFERS or sandbox.phase is Phase.STOPPING:
            sandbox.wanted = sandbox.wanted.deleted(grace)
            hurried = sandbox.phase is Phase.STOPPING
            return self._hurry(sandbox, grace) if hurried else []
        if sandbox.phase is Phase.QUEUED:
            self._queue.remove(sandbox.sandbox_id)
        sandbox.phase = Phase.DELETING
        return [Delete(sandbox.sandbox_id, grace)]

    def check(self) -> None:
        """Raise if an invariant is broken. For tests: call it after each step."""
        queued = [key for key, each in self.sandboxes.items() if each.phase is Phase.QUEUED]
        if sorted(queued) != sorted(self._queue):
            raise AssertionError(f"queued {queued} but the queue holds {list(self._queue)}")
        starting = {key for key, each in self.sandboxes.items() if each.phase is Phase.STARTING}
        if starting != self._starting:
            raise AssertionError(f"{starting} start, but {self._starting} are counted")
        if len(starting) > self.starts_max:
            raise AssertionError(f"{starting} start at once; at most {self.starts_max}")
        if self._queue and len(starting) < self.starts_max:
            raise AssertionError("a start waits although there is room")
        for key, each in self.sandboxes.items():
            if key != each.sandbox_id:
                raise AssertionError(f"{key} is kept as {each.sandbox_id}")
            if each.successor and each.successor.generation <= each.generation:
                raise AssertionError(f"{key}: a successor of no higher generation")
