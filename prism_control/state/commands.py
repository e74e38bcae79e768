"""Commands of the state machine, and the envelope in which a Raft entry carries them.

A command says what shall be, in the imperative; the machine answers with one result an item, and
with events of what has changed. Commands are on disk and on the wire to members of other versions:

- a tag is never used again, and a new field goes last with a default;
- a command or meaning that an older member cannot apply needs a higher `VERSION`, and a line in
  `version_of`: such a member stops with `UnknownCommandError` rather than to diverge, and leaders
  hold such commands back until every member can apply them (`RaiseVersion`).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec
from msgspec import Struct

from prism_common.errors import PrismError
from prism_control.state.model import (
    LIMITS_NOT_HELD,
    Amounts,
    ObservedState,
    Pairs,
    PlacementRefusal,
    RuntimeRow,
    Spec,
)

#: Highest version of proposals that this member can apply.
VERSION: Final = 4
#: What a member can apply whose release does not tell: that of the last release that did not.
VERSION_UNTOLD: Final = 2


class UnknownCommandError(PrismError):
    """The log holds a command of a newer version; this member must be upgraded to go on.

    Attributes:
        version: Version that the proposal needs.
    """

    reason = "UNKNOWN_COMMAND"

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version


class MalformedProposalError(PrismError):
    """The bytes are no proposal at all: the log is corrupt, or not Prism's."""

    reason = "MALFORMED_PROPOSAL"


class CreateSandbox(Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Asks for a sandbox. Result: Ok, or Refused with ALREADY_EXISTS or REQUEST_ID_REUSED.

    Attributes:
        request_id: Idempotency key; empty: none.
        fingerprint: Digest of the request's contents, at most 32 bytes.
        sandbox_id: Made by the API, never used before.
        name: Unique among sandboxes that are not DELETED.
    """

    request_id: str
    fingerprint: bytes
    sandbox_id: str
    name: str
    spec: Spec


class DeleteSandbox(Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Removes a sandbox from any state. Result: Ok, or Refused with NOT_FOUND.

    Attributes:
        sandbox: Id or exact name.
        grace_ms: From SIGTERM to SIGKILL; taken as 0 with `force`.
    """

    request_id: str
    fingerprint: bytes
    sandbox: str
    force: bool = False
    grace_ms: int = 0


class StopSandbox(Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Ends its processes and keeps its files. Result: Ok, or Refused (NOT_FOUND, WRONG_STATE)."""

    request_id: str
    fingerprint: bytes
    sandbox: str
    grace_ms: int = 0


class StartSandbox(Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Starts a STOPPED sandbox again. Result: Ok, or Refused (NOT_FOUND, WRONG_STATE)."""

    request_id: str
    fingerprint: bytes
    sandbox: str


class Placement(Struct, frozen=True, array_like=True, gc=False):
    """The scheduler's choice for one sandbox.

    Attributes:
        generation: That the scheduler saw; the choice is void if it has moved on.
    """

    sandbox_id: str
    generation: int
    node_id: str


class Explanation(Struct, frozen=True, array_like=True, gc=False):
    """Why sandboxes of one shape stay PENDING.

    Attributes:
        sandbox_ids: Those that it explains.
        message: The sum of it, for people.
        refusals: For each node why not; at most REFUSALS_MAX are kept.
    """

    sandbox_ids: tuple[str, ...]
    message: str
    refusals: tuple[PlacementRefusal, ...]


class AssignSandboxes(Struct, frozen=True, array_like=True, gc=False, tag=5):
    """Places what waits, and explains what stays. Result: Assigned."""

    placements: tuple[Placement, ...] = ()
    explanations: tuple[Explanation, ...] = ()


class Report(Struct, frozen=True, array_like=True, gc=False):
    """What an agent sees of one sandbox; as prism.agent.v1.SandboxReport.

    Attributes:
        start_count: Of the last start that the agent made.
        at_ms: When it came to this state, by the agent's clock; informative only.
    """

    sandbox_id: str
    generation: int
    state: ObservedState
    reason: str = ""
    message: str = ""
    runtime: str = ""
    start_count: int = 1
    at_ms: int = 0


class ReportSandboxes(Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Records what an agent saw change. Result: Applied; all ignored if the incarnation is old."""

    node_id: str
    incarnation: str
    reports: tuple[Report, ...]


class RegisterNode(Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Adds a node, or says that its agent is back. Result: NodeOk, or Refused (ALREADY_EXISTS).

    Attributes:
        lease_ms: The lease that this registration's Welcome tells the agent.
        heartbeat_ms: The interval that it tells.
        reports: All sandboxes that the agent has. What the state has there beyond them, and the
            agent had acknowledged before, is LOST with reason NODE_FORGOT.
    """

    node_id: str
    name: str
    incarnation: str
    address: str
    capacity: Amounts
    runtimes: tuple[RuntimeRow, ...]
    labels: Pairs
    version: str
    lease_ms: int
    heartbeat_ms: int
    reports: tuple[Report, ...] = ()


class SuspectNode(Struct, frozen=True, array_like=True, gc=False, tag=8):
    """Places nothing new on a READY node until it is heard again. Result: Applied."""

    node_id: str
    incarnation: str
    last_seen_ms: int


class LoseNode(Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Gives a node up: its sandboxes become LOST or PENDING again. Result: Applied."""

    node_id: str
    incarnation: str
    last_seen_ms: int


class ReviveNode(Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Says that a SUSPECT node was heard. A LOST one must register again. Result: Applied."""

    node_id: str
    incarnation: str
    last_seen_ms: int


class CordonNode(Struct, frozen=True, array_like=True, gc=False, tag=11):
    """Places nothing new on a node, or again. Result: NodeOk, or Refused (NOT_FOUND).

    Attributes:
        node: Id or exact name.
    """

    node: str
    cordoned: bool


class ExpireSandboxes(Struct, frozen=True, array_like=True, gc=False, tag=12):
    """Removes sandboxes whose TTL is over. Result: Applied; those not due are ignored."""

    sandbox_ids: tuple[str, ...]


class UpdateSandbox(Struct, frozen=True, array_like=True, gc=False, tag=13):
    """Changes labels, the deadline or limits.

    Result: Ok, or Refused (NOT_FOUND, WRONG_STATE, INVALID, NO_CAPACITY) where nothing is changed.

    Attributes:
        labels: To set; an empty value removes one.
        expire_ms: The new end of life; 0: as it was.
        cpu_millicores: A new limit, as the others of version 4; 0: as it was.
    """

    request_id: str
    fingerprint: bytes
    sandbox: str
    labels: Pairs = ()
    expire_ms: int = 0
    cpu_millicores: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    processes_max: int = 0

    @property
    def has_limits(self) -> bool:
        """Whether it changes limits."""
        return bool(
            self.cpu_millicores or self.memory_bytes or self.disk_bytes or self.processes_max
        )


class PauseSandbox(Struct, frozen=True, array_like=True, gc=False, tag=14):
    """Has its processes frozen. Result: Ok, or Refused (NOT_FOUND, WRONG_STATE)."""

    request_id: str
    fingerprint: bytes
    sandbox: str


class ResumeSandbox(Struct, frozen=True, array_like=True, gc=False, tag=15):
    """Has its processes thawed. Result: Ok, or Refused (NOT_FOUND, WRONG_STATE)."""

    request_id: str
    fingerprint: bytes
    sandbox: str


class DrainNode(Struct, frozen=True, array_like=True, gc=False, tag=16):
    """Cordons a node that shall be empty. Result: NodeOk, or Refused (NOT_FOUND).

    Attributes:
        node: Id or exact name.
        deadline_ms: From now until what is left there is ended.
    """

    node: str
    deadline_ms: int = 0


class EvictSandboxes(Struct, frozen=True, array_like=True, gc=False, tag=17):
    """As MoveSandboxes, but places anew before the old copy has ended: in logs of version 2."""

    node_id: str
    sandbox_ids: tuple[str, ...]


class MoveSandboxes(Struct, frozen=True, array_like=True, gc=False, tag=18):
    """Moves or ends sandboxes of a node that drains. Result: Applied; those not due are ignored.

    One that is moved is STOPPING until its node says that it runs no more, and only then PENDING.
    """

    node_id: str
    sandbox_ids: tuple[str, ...]


class RaiseVersion(Struct, frozen=True, array_like=True, gc=False, tag=19):
    """Lets commands up to a version be proposed: all members can apply them. Result: Applied.

    Proposed under that version itself, so that a member that cannot apply them stops here.
    """

    version: int


Command: TypeAlias = (
    CreateSandbox
    | DeleteSandbox
    | StopSandbox
    | StartSandbox
    | AssignSandboxes
    | ReportSandboxes
    | RegisterNode
    | SuspectNode
    | LoseNode
    | ReviveNode
    | CordonNode
    | ExpireSandboxes
    | UpdateSandbox
    | PauseSandbox
    | ResumeSandbox
    | DrainNode
    | EvictSandboxes
    | MoveSandboxes
    | RaiseVersion
)

#: The version that a kind of command came with, where that is not the first.
_SINCE: Final[dict[type, int]] = {
    UpdateSandbox: 2,
    PauseSandbox: 2,
    ResumeSandbox: 2,
    DrainNode: 2,
    EvictSandboxes: 2,
    MoveSandboxes: 3,
}


class Proposal(Struct, frozen=True, array_like=True, gc=False):
    """What one Raft entry carries.

    Attributes:
        version: Lowest version of the machine that can apply all items.
        at_ms: The leader's clock when it proposed: the only clock that the machine knows.
        items: Applied in order; each has its own result.
    """

    version: int
    at_ms: int
    items: tuple[Command, ...]


def propose(at_ms: int, items: tuple[Command, ...]) -> Proposal:
    """Return a proposal of the lowest version that can apply its items."""
    return Proposal(max(map(version_of, items), default=1), at_ms, items)


def version_of(item: Command) -> int:
    """Return the lowest version of the machine that can apply a command."""
    if isinstance(item, CreateSandbox):  # first: most are
        return 4 if item.spec.output_bytes_per_second or item.spec.egress is not None else 1
    if isinstance(item, DeleteSandbox):  # the next most
        return 1
    kind = type(item)
    if isinstance(item, UpdateSandbox) and item.has_limits:
        return 4
    since = _SINCE.get(kind)
    if since is not None:
        return since
    if isinstance(item, RaiseVersion):
        return item.version
    if isinstance(item, ReportSandboxes | RegisterNode):
        return max(map(_version_of_report, item.reports), default=1)
    return 1


def _version_of_report(report: Report) -> int:
    if report.reason == LIMITS_NOT_HELD:
        return 4
    return 2 if report.state is _PAUSED else 1


#: Each report asks for it: a name of the module costs less than a member of an enum.
_PAUSED: Final = ObservedState.PAUSED


class _Head(Struct, frozen=True, array_like=True):
    """A proposal of any version."""

    version: int
    at_ms: int
    items: msgspec.Raw


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Proposal)
_head_decoder: Final = msgspec.msgpack.Decoder(_Head)


def encode(proposal: Proposal) -> bytes:
    """Return the bytes of a Raft entry."""
    return _encoder.encode(proposal)


def decode(data: bytes) -> Proposal:
    """Read a Raft entry.

    Raises:
        UnknownCommandError: A newer version wrote it.
        MalformedProposalError: It is no proposal.
    """
    try:
        proposal = _decoder.decode(data)
    except msgspec.DecodeError as error:  # also the base of ValidationError
        raise _unreadable(data, error) from error
    if proposal.version > VERSION:
        raise _too_new(proposal.version)
    return proposal


def _unreadable(data: bytes, error: msgspec.DecodeError) -> PrismError:
    """Tell a proposal of a newer version from bytes that are none."""
    try:
        head = _head_decoder.decode(data)
    except msgspec.DecodeError:
        return MalformedProposalError(f"not a proposal: {error}")
    if head.version > VERSION:
        return _too_new(head.version)
    return UnknownCommandError(
        f"a proposal of version {head.version} holds a command that version {VERSION} of this "
        f"member does not know: {error}",
        head.version,
    )


def _too_new(version: int) -> UnknownCommandError:
    return UnknownCommandError(
        f"the log holds commands of version {version}; this member knows up to {VERSION}: "
        "upgrade it",
        version,
    )
