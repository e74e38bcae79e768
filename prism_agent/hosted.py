"""One sandbox as the edge holds it: what runs, its deadlines, and what is said of it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf import timestamp_pb2
from prism.agent.v1 import agent_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.execs import Execs
from prism_agent.file_call import FileCall
from prism_agent.model import Assignment, Phase, Sandbox
from prism_agent.network.forward import Forward
from prism_agent.network.relayed import Relayed
from prism_agent.record import Record
from prism_agent.runtime.base import Running
from prism_common.errors import NotServedError, SandboxGoneError

_OBSERVED = {
    Phase.QUEUED: agent_pb2.OBSERVED_STATE_STARTING,
    Phase.STARTING: agent_pb2.OBSERVED_STATE_STARTING,
    Phase.READY: agent_pb2.OBSERVED_STATE_READY,
    # Until the kernel says that all are frozen, or all run, it goes on being what it was.
    Phase.PAUSING: agent_pb2.OBSERVED_STATE_READY,
    Phase.PAUSED: agent_pb2.OBSERVED_STATE_PAUSED,
    Phase.RESUMING: agent_pb2.OBSERVED_STATE_PAUSED,
    Phase.STOPPING: agent_pb2.OBSERVED_STATE_STOPPING,
    Phase.STOPPED: agent_pb2.OBSERVED_STATE_STOPPED,
    Phase.FAILED: agent_pb2.OBSERVED_STATE_FAILED,
    # There is no word for it: it goes on being what it was until nothing is left.
    Phase.DELETING: agent_pb2.OBSERVED_STATE_STOPPING,
    Phase.DELETED: agent_pb2.OBSERVED_STATE_DELETED,
}


def report_of(
    sandbox: Sandbox, phase_time_s: float, phase: Phase | None = None
) -> agent_pb2.SandboxReport:
    """Return what the leader is to know of a sandbox; `phase`: what may be said of it so far."""
    seconds = int(phase_time_s)
    return agent_pb2.SandboxReport(
        sandbox_id=sandbox.sandbox_id,
        generation=sandbox.generation,
        state=_OBSERVED[phase or sandbox.phase],
        reason=sandbox.reason,
        message=sandbox.message,
        runtime=sandbox.runtime,
        start_count=max(0, sandbox.start_count),
        time=timestamp_pb2.Timestamp(seconds=seconds, nanos=int((phase_time_s - seconds) * 1e9)),
    )


@dataclass(slots=True)
class Hosted:
    """What the edge holds of one sandbox beside the reconciler's view."""

    record: Record
    spec: sandbox_pb2.SandboxSpec
    #: Makes `execs` when they are first asked for: what has no supervisor never has any.
    make_execs: Callable[[], Execs]
    known_execs: Execs | None = None
    #: The assignment that the record was last brought up to.
    taken: Assignment | None = None
    running: Running | None = None
    #: How much of the journal must survive the machine before it may be called READY.
    start_position: int = 0
    #: Waits for the end of `running`.
    watch: asyncio.Task[None] | None = None
    #: Loop time at which a stop under way turns into a kill.
    kill_at_s: float = 0.0
    known_hurried: asyncio.Event | None = None
    #: Held while its processes are being frozen or thawed: its end is told of afterwards.
    freezing: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: File calls under way. They hold its files open, so they are ended with it.
    file_calls: set[FileCall] = field(default_factory=set)
    #: Connections to its ports. Their clients would not be told of its end otherwise.
    forwards: set[Forward] = field(default_factory=set)

    def is_as(self, sandbox: Sandbox) -> bool:
        """Whether the record says what the reconciler holds."""
        record = self.record
        return (
            self.taken is sandbox.wanted
            and record.phase is sandbox.phase
            and record.start_count == sandbox.start_count
            and record.runtime == (sandbox.runtime or record.runtime)
            and record.reason == sandbox.reason
            and record.message == sandbox.message
        )

    @property
    def hurried(self) -> asyncio.Event:
        """Set when its stop is to be a kill; most never need it, and it is large."""
        if self.known_hurried is None:
            self.known_hurried = asyncio.Event()
        return self.known_hurried

    @property
    def execs(self) -> Execs:
        """Its execs."""
        if self.known_execs is None:
            self.known_execs = self.make_execs()
        return self.known_execs

    def lose_execs(self) -> None:
        """Its processes are gone."""
        if self.known_execs is not None:
            self.known_execs.lose()

    def detach(self) -> None:
        """Stop speaking to its supervisor; it goes on."""
        if self.known_execs is not None:
            self.known_execs.detach()

    def unwatch(self) -> None:
        """Stop waiting for its end."""
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None

    def new_forward(self) -> Forward:
        """Return a new connection to a port of it, not made yet.

        Raises:
            NotServedError: This agent may not enter its network.
            SandboxGoneError: It ends just now.
        """
        running, execs = self.running, self.execs
        if running is None or running.process is None:
            raise SandboxGoneError("the sandbox ended")
        if running.shared is not None and not self.record.device:
            # Its loopback is its own kernel's, and no socket of ours reaches that.
            return Relayed(
                running.shared,
                execs.new_relay(),
                execs.relay,
                self.forwards.discard,
                execs.activity.in_use(),
            )
        try:
            namespace = running.process.open_network()
        except ProcessLookupError:
            raise SandboxGoneError("the sandbox ended") from None
        except OSError as error:
            raise NotServedError(f"ports by this agent ({error.strerror}): it") from None
        return Forward(namespace, self.forwards.discard, execs.activity.in_use())

    async def end_calls(self) -> None:
        """Have every file call and forward let go of the sandbox, and return when they have."""
        for forward in list(self.forwards):
            forward.end()
        closing = [call.end() for call in list(self.file_calls)]
        if closing:
            await asyncio.wait(closing, timeout=limits.FILE_CALLS_END_S)

    @property
    def idle_timeout_s(self) -> float:
        """Time without an exec after which it goes; 0: none."""
        if not self.spec.HasField("idle_timeout"):
            return 0.0
        idle = self.spec.idle_timeout
        return idle.seconds + idle.nanos / 1e9

    @property
    def _may_idle(self) -> bool:
        """What is paused is so on purpose: only its TTL ends it."""
        paused = self.record.phase in (Phase.PAUSED, Phase.RESUMING)
        return bool(self.idle_timeout_s) and self.running is not None and not paused

    def deadline_in_s(self, now_s: float) -> float | None:
        """Return the time until it may have to go; None: it has no deadline."""
        if self.record.phase in (Phase.DELETING, Phase.DELETED):
            return None
        delays = []
        if self.record.expire_time_s:
            delays.append(self.record.expire_time_s - now_s)
        if self._may_idle:
            delays.append(self.idle_timeout_s - self.execs.idle_s())
        return min(delays, default=None)

    def expiry(self, now_s: float) -> tuple[str, str] | None:
        """Return the reason why it goes now, as a code and in words; None: it does not."""
        if self.record.expire_time_s and now_s >= self.record.expire_time_s:
            return "TTL_EXPIRED", "its time to live has passed"
        if self._may_idle and self.execs.idle_s() >= self.idle_timeout_s:
            return "IDLE_TIMEOUT", f"nothing was run in it for {self.idle_timeout_s:g} s"
        return None
