"""What the machine answers to each item of a proposal: values, never exceptions."""

from __future__ import annotations

import enum
from typing import Final, TypeAlias

from msgspec import Struct

from prism_common import errors
from prism_control.state.model import NodeRow, SandboxRow, Spec, new_sandbox


class RefusalKind(enum.IntEnum):
    """Why a command was refused; each is one class of `prism_common.errors`."""

    NOT_FOUND = 1
    ALREADY_EXISTS = 2
    WRONG_STATE = 3
    REQUEST_ID_REUSED = 4
    INVALID = 5
    NO_CAPACITY = 6


_ERROR_OF: Final[dict[RefusalKind, type[errors.PrismError]]] = {
    RefusalKind.NOT_FOUND: errors.NotFoundError,
    RefusalKind.ALREADY_EXISTS: errors.AlreadyExistsError,
    RefusalKind.WRONG_STATE: errors.WrongStateError,
    RefusalKind.REQUEST_ID_REUSED: errors.RequestIdReusedError,
    RefusalKind.INVALID: errors.InvalidArgumentError,
    RefusalKind.NO_CAPACITY: errors.NoCapacityError,
}


class Ok(Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A user's command on a sandbox is done. `sandbox` is the row right after it."""

    sandbox: SandboxRow


class Refused(Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Nothing has changed.

    Attributes:
        field: Field of the request that is wrong, if one is.
    """

    kind: RefusalKind
    message: str
    field: str = ""

    @property
    def reason(self) -> str:
        """The stable code."""
        return _ERROR_OF[self.kind].reason

    def error(self) -> errors.PrismError:
        """Return the failure that the caller is told of."""
        return _ERROR_OF[self.kind](self.message, field=self.field)


class NodeOk(Struct, frozen=True, gc=False):
    """A command on a node is done."""

    node: NodeRow


class Assigned(Struct, frozen=True, gc=False):
    """Placements are recorded.

    Attributes:
        refused: Ids of sandboxes whose placement is void: the sandbox has moved on, or the node
            is not READY, is cordoned, or lacks room. Pass them to `Scheduler.forget`.
    """

    refused: tuple[str, ...] = ()


class Applied(Struct, frozen=True, gc=False):
    """Observations are recorded.

    Attributes:
        changed: Rows that changed.
        ignored: Items that were stale, fenced off, or had no transition; harmless, but counted.
    """

    changed: int = 0
    ignored: int = 0


class Created(Struct, frozen=True, array_like=True, gc=False, tag=3):
    """What a create's request id remembers: enough to say again what the first answer was.

    A whole row beside each sandbox's own would double the memory that sandboxes take.
    """

    sandbox_id: str
    name: str
    spec: Spec
    create_ms: int
    create_revision: int

    @classmethod
    def of(cls, row: SandboxRow) -> Created:
        """Remember the answer to a create."""
        return cls(row.id, row.name, row.spec, row.create_ms, row.create_revision)

    def ok(self) -> Ok:
        """Return the first answer."""
        return Ok(
            new_sandbox(self.sandbox_id, self.name, self.spec, self.create_ms, self.create_revision)
        )


#: What a user's command is answered with.
UserResult: TypeAlias = Ok | Refused
Result: TypeAlias = Ok | Refused | NodeOk | Assigned | Applied


class RequestRow(Struct, frozen=True, array_like=True, gc=False):
    """An answered request id.

    Attributes:
        at_ms: When it was answered first.
    """

    request_id: str
    fingerprint: bytes
    at_ms: int
    answer: Ok | Refused | Created

    @property
    def result(self) -> UserResult:
        """The first answer."""
        return self.answer.ok() if isinstance(self.answer, Created) else self.answer
