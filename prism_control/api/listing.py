"""ListSandboxes: pages of encoded rows; the next is made while the client reads one (ADR 24)."""

import asyncio
import base64
import binascii
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits, names
from prism_common.errors import InvalidArgumentError
from prism_control.api import validation
from prism_control.row_bytes import field_bytes
from prism_control.state.machine import Machine
from prism_control.state.model import SandboxRow, SandboxState, Spec

#: Where the page begins, and the state's revision that the page before has shown.
_PAGE_TOKEN: Final = struct.Struct(">QQ")
#: The same as earlier releases made it, without the revision.
_PAGE_TOKEN_BEFORE: Final = struct.Struct(">Q")
#: A page ends here too: with full environments 50 sandboxes would not fit into a message.
_PAGE_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX - 512 * limits.KIB
#: Pages that are kept until they are asked for; a list that is broken off leaves one behind.
_AHEAD_MAX: Final = 4
_STATES: Final = {int(state): state for state in SandboxState}


class _Query(NamedTuple):
    """What is listed: from which row on, and what a row must have (`keeps`)."""

    after: int
    size: int
    labels: frozenset[tuple[str, str]]
    states: frozenset[SandboxState]
    node: str


@dataclass(frozen=True, slots=True)
class _Page:
    #: Of the state that it shows.
    revision: int
    #: The encoded answer.
    data: bytes
    #: Where the next page begins; 0: it is the last.
    last: int


class Listing:
    """Serves ListSandboxes.

    Args:
        machine: The replicated state now.
    """

    def __init__(self, machine: Callable[[], Machine]) -> None:
        self._machine = machine
        #: Pages that will be asked for, the oldest first.
        self._ahead: dict[_Query, _Page] = {}

    async def page(
        self, request: sandbox_pb2.ListSandboxesRequest, fresh: Callable[[], Awaitable[Machine]]
    ) -> bytes:
        """Return a page, encoded.

        The first shows all that was acknowledged before it was asked for. The others show a state
        that is no older than the first's, which needs no word of the other members: a list of many
        pages is one read, and as fresh as its beginning.

        Args:
            request: What to list.
            fresh: Returns the state, as fresh as the request asks.

        Raises:
            InvalidArgumentError: A field of the request is wrong.
        """
        after, seen = decode_token(request.page_token)
        query = _query_of(request, after)
        machine = self._machine()
        if not seen or machine.revision < seen:
            machine = await fresh()
        page = self._ahead.pop(query, None)
        if page is None or page.revision != machine.revision:
            page = _page_of(machine, query)
        # Nothing has changed since the page before, so that this one's next is no waste.
        if page.last and seen == machine.revision:
            asyncio.get_running_loop().call_soon(self._read_ahead, query._replace(after=page.last))
        return page.data

    def _read_ahead(self, query: _Query) -> None:
        self._ahead.pop(query, None)
        while len(self._ahead) >= _AHEAD_MAX:
            del self._ahead[next(iter(self._ahead))]
        self._ahead[query] = _page_of(self._machine(), query)


def _query_of(request: sandbox_pb2.ListSandboxesRequest, after: int) -> _Query:
    for state in request.states:
        if state not in _STATES:
            raise InvalidArgumentError(f"states: {state} is not a state", field="states")
    labels = names.validate_labels(dict(request.label_selector), "label_selector")
    return _Query(
        after,
        validation.page_size(request.page_size),
        frozenset(labels.items()),
        frozenset(_STATES[state] for state in request.states),
        request.node,
    )


def _page_of(machine: Machine, query: _Query) -> _Page:
    keep = keeps(query.labels, query.states, query.node)
    tombstones = SandboxState.DELETED in query.states
    rows, last = machine.list_page(query.after, query.size, keep, tombstones=tombstones)
    fields, count = field_bytes(rows, _PAGE_BYTES_MAX)
    if count < len(rows):
        last = rows[count - 1].create_revision
    revision = machine.revision
    rest = sandbox_pb2.ListSandboxesResponse(
        next_page_token=encode_token(last, revision) if last else "", revision=revision
    )
    return _Page(revision, fields + rest.SerializeToString(), last)


def keeps(
    labels: frozenset[tuple[str, str]], states: frozenset[SandboxState], node: str
) -> Callable[[SandboxRow], bool] | None:
    """Return what keeps the rows that a request asks for; None: it asks for all.

    Args:
        labels: That a row must have.
        states: One of which it must be in; none: any.
        node: Id or name of its node; empty: any.
    """
    if not labels and not states and not node:
        return None
    last: Spec | None = None
    fits = False

    def keep(row: SandboxRow) -> bool:
        nonlocal last, fits
        if row.spec is not last:
            # Rows beside one another mostly share their spec.
            last, fits = row.spec, labels <= set(row.spec.labels)
        if not fits or (states and row.state not in states):
            return False
        return not node or node in (row.node_id, row.node_name)

    return keep


def encode_token(after: int, revision: int) -> str:
    """Return what a page says of the next."""
    return base64.urlsafe_b64encode(_PAGE_TOKEN.pack(after, revision)).decode().rstrip("=")


def decode_token(token: str) -> tuple[int, int]:
    """Return what a page token says; the second is 0 where it was made by an earlier release.

    Raises:
        InvalidArgumentError: It is none that a list has returned.
    """
    if not token:
        return 0, 0
    try:
        decoded = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        if len(decoded) == _PAGE_TOKEN_BEFORE.size:
            return int(_PAGE_TOKEN_BEFORE.unpack(decoded)[0]), 0
        after, revision = _PAGE_TOKEN.unpack(decoded)
    except (binascii.Error, struct.error, ValueError):
        raise InvalidArgumentError(
            f"page_token: {names.shorten(token)} is not one that a list returned",
            field="page_token",
        ) from None
    return int(after), int(revision)
