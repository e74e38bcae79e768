"""Expected failures. `status.py` maps each class to its gRPC status."""

from typing import ClassVar


class PrismError(Exception):
    """An expected failure that a caller is told of.

    Args:
        message: For people: what is wrong and what to do.
        field: The request field or flag that is wrong, if one is.
        retry_after_s: Sending the same call again after this time can help; None: it cannot.
        reason: Overrides the class's stable code.
        metadata: Further facts for programs, such as the leader's address.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        reason: str = "",
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.code = reason or self.reason
        self.metadata = metadata or {}


class InvalidArgumentError(PrismError):
    """A field is out of its range; `field` names it."""

    reason = "INVALID_ARGUMENT"


class RequestIdReusedError(InvalidArgumentError):
    """The request id was used before with other contents."""

    reason = "REQUEST_ID_REUSED"


class NotFoundError(PrismError):
    """No such sandbox, node or exec."""

    reason = "NOT_FOUND"


class AlreadyExistsError(PrismError):
    """The name is taken."""

    reason = "ALREADY_EXISTS"


class AmbiguousError(PrismError):
    """A prefix fits more than one."""

    reason = "AMBIGUOUS"


class WrongStateError(PrismError):
    """The state machine has no such transition from the present state."""

    reason = "WRONG_STATE"


class UpgradeNeededError(PrismError):
    """Some control node's release does not know the command. Metadata `members`: their names."""

    reason = "UPGRADE_NEEDED"


class QueueFullError(PrismError):
    """A bounded queue is full; retry after the given time."""

    reason = "QUEUE_FULL"


class NoCapacityError(PrismError):
    """Its node has no room for what is asked; nothing has changed."""

    reason = "NO_CAPACITY"


class TooManyCallsError(PrismError):
    """This client, or all together, have too much under way; nothing was done."""

    reason = "TOO_MANY_CALLS"


class DiskFullError(PrismError):
    """No room for another write; nothing was lost."""

    reason = "DISK_FULL"


class NotLeaderError(PrismError):
    """Nothing was proposed; try another member. Metadata `leader`: its API address, if known."""

    reason = "NOT_LEADER"


class NoLeaderError(PrismError):
    """No leader is known: there is no quorum, or an election is under way."""

    reason = "NO_LEADER"


class OutcomeUnknownError(PrismError):
    """It may yet commit; resend the same request_id."""

    reason = "OUTCOME_UNKNOWN"


class StoppingError(PrismError):
    """This process is stopping; nothing was proposed."""

    reason = "STOPPING"


class NodeUnreachableError(PrismError):
    """The sandbox's node does not answer."""

    reason = "NODE_UNREACHABLE"


class SandboxGoneError(PrismError):
    """The sandbox ended while the call was under way."""

    reason = "SANDBOX_GONE"


class CompactedError(PrismError):
    """The revision is older than what is kept; list again."""

    reason = "COMPACTED"


class NotServedError(PrismError):
    """This version does not serve the call or the field."""

    reason = "NOT_SERVED"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not served by this version")


class DeadlineError(PrismError):
    """The call's deadline passed before its answer was there."""

    reason = "DEADLINE_EXCEEDED"


class StartupError(PrismError):
    """A daemon cannot start as told; one line says why."""

    reason = "STARTUP"
