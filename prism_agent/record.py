"""What the journal holds of one sandbox."""

import msgspec

from prism_agent.model import Assignment, Desired, Phase, Sandbox

VERSION = 1


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One sandbox as the journal holds it."""

    version: int = VERSION
    sandbox_id: str
    name: str
    generation: int
    start_count: int
    phase: Phase
    desired: Desired
    wanted_start_count: int
    #: Serialized prism.sandbox.v1.SandboxSpec.
    spec: bytes
    expire_time_s: float
    grace_s: float
    reschedules: bool
    runtime: str = ""
    reason: str = ""
    message: str = ""
    #: When it came to its phase, wall clock.
    phase_time_s: float = 0.0
    #: A newer record of it was lost with a damaged part of the file: this was true once.
    uncertain: bool = False

    # ── what runs ──
    #: The boot of the machine that it was started in: nothing of it outlives that.
    boot_id: str = ""
    #: The host uid that its processes run as; 0: none was given.
    uid: int = 0
    #: Its supervisor, as the host sees it; 0: none runs.
    pid: int = 0
    #: Start time of that process in clock ticks since boot: tells it from a later one of that pid.
    pid_start_ticks: int = 0
    #: Name of its cgroup below the agent's; empty: it has none.
    cgroup: str = ""
    #: What it was called while it waited in the pool of prepared sandboxes; empty: it did not. Its
    #: processes and its cgroup have that name for as long as it exists.
    prepared_as: str = ""
    #: Something is mounted in its directory.
    mounted: bool = False
    #: Name of its network device on the host, and the address inside; empty: it has no network.
    device: str = ""
    address: str = ""

    @classmethod
    def unassigned(cls, sandbox_id: str, name: str, runtime: str) -> "Record":
        """Return one of a sandbox that no leader knows of; after a death it is only removed."""
        return cls(
            sandbox_id=sandbox_id,
            name=name,
            generation=0,
            start_count=0,
            phase=Phase.DELETING,
            desired=Desired.DELETED,
            wanted_start_count=0,
            spec=b"",
            expire_time_s=0.0,
            grace_s=0.0,
            reschedules=False,
            runtime=runtime,
        )

    def to_sandbox(self) -> Sandbox:
        """Return it as the reconciler sees it."""
        wanted = Assignment(
            sandbox_id=self.sandbox_id,
            generation=self.generation,
            desired=self.desired,
            start_count=self.wanted_start_count,
            name=self.name,
            spec=self.spec,
            expire_time_s=self.expire_time_s,
            grace_s=self.grace_s,
            reschedules=self.reschedules,
        )
        return Sandbox(
            wanted, self.phase, self.start_count, self.runtime, self.reason, self.message
        )

    def take(self, sandbox: Sandbox) -> None:
        """Bring it up to what the reconciler holds; what runs stays as it is."""
        wanted = sandbox.wanted
        self.name, self.generation = wanted.name, wanted.generation
        self.desired, self.wanted_start_count = wanted.desired, wanted.start_count
        self.spec, self.expire_time_s = wanted.spec, wanted.expire_time_s
        self.grace_s, self.reschedules = wanted.grace_s, wanted.reschedules
        self.phase, self.start_count = sandbox.phase, sandbox.start_count
        self.runtime = sandbox.runtime or self.runtime
        self.reason, self.message = sandbox.reason, sandbox.message


def record_of(sandbox: Sandbox) -> Record:
    """Return a new record: nothing runs yet."""
    wanted = sandbox.wanted
    return Record(
        sandbox_id=wanted.sandbox_id,
        name=wanted.name,
        generation=wanted.generation,
        start_count=sandbox.start_count,
        phase=sandbox.phase,
        desired=wanted.desired,
        wanted_start_count=wanted.start_count,
        spec=wanted.spec,
        expire_time_s=wanted.expire_time_s,
        grace_s=wanted.grace_s,
        reschedules=wanted.reschedules,
        reason=sandbox.reason,
        message=sandbox.message,
    )
