"""What the driver needs of the parts around it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from prism_common.errors import PrismError
from prism_control.node.compaction import Snapshotted
from prism_control.raft.types import Message


class StateMachine(Snapshotted, Protocol):
    """What committed entries are applied to."""

    def apply(self, index: int, data: bytes) -> object:
        """Apply a command; return its result for whoever proposed it."""


class Batch(Protocol):
    """One entry to be proposed, and who waits for it."""

    @property
    def data(self) -> bytes:
        """The encoded command."""

    def resolve(self, result: object) -> None:
        """It is committed and applied."""

    def fail(self, error: Exception) -> None:
        """It was not proposed, or its outcome is unknown, as the error says."""


class ProposalSource(Protocol):
    """Where the driver takes proposals from, once a turn: what waits then goes together."""

    @property
    def waits(self) -> bool:
        """Whether anything waits; it may still have to wait for company."""

    def take(self) -> Sequence[Batch]:
        """Return the next entries to propose. Called on a leader only."""

    def fail_all(self, error: PrismError) -> None:
        """Fail what waits: this member does not lead, so nobody would ever take it."""


class MessageSink(Protocol):
    """What carries messages to peers."""

    def send(self, messages: Iterable[Message]) -> None:
        """Queue messages; each may be lost."""
