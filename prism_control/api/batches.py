"""BatchCreateSandboxes and BatchDeleteSandboxes: one group of proposals, one result an item."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeAlias, TypeVar

from google.protobuf.message import Message
from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits
from prism_common.errors import InvalidArgumentError, PrismError
from prism_common.status import status_of
from prism_control.api import validation
from prism_control.api.context import ApiContext
from prism_control.api.forward import SAFE_TO_RESEND
from prism_control.api.lifecycle import (
    Waits,
    check_create,
    create_command,
    delete_command,
    row_of,
)
from prism_control.row_bytes import result_bytes
from prism_control.state.commands import Command, version_of
from prism_control.state.model import SandboxRow

#: The answer repeats each spec with its defaults filled in, and is a message of 4 MiB as well.
_BATCH_BYTES_MAX: Final = 3 * limits.MIB
#: What is left to encode a thousand results in, once the items' own waiting is over.
_ANSWER_S: Final = 0.2
#: About a millisecond of work. Smaller ones leave a batch waiting: under load a turn of the loop
#: takes some milliseconds, and ten batches of a thousand items share the turns.
_SLICE_ITEMS: Final = 200

T = TypeVar("T")
U = TypeVar("U")
_Outcome: TypeAlias = SandboxRow | PrismError
_Wait: TypeAlias = Callable[[SandboxRow, float], Awaitable[SandboxRow]]


class _Slices:
    """Does long work bit by bit: one bit, of whichever batch's turn it is, in a turn of the loop.

    So a call that comes beside ten batches waits for some bits, and not for all ten thousand items.
    """

    def __init__(self) -> None:
        self._turns = asyncio.Lock()

    async def map(self, do: Callable[[Sequence[T]], Iterable[U]], items: Sequence[T]) -> list[U]:
        """Return what `do` makes of the items, of some of them at a time."""
        done: list[U] = []
        for begin in range(0, len(items), _SLICE_ITEMS):
            async with self._turns:
                done += do(items[begin : begin + _SLICE_ITEMS])
                await asyncio.sleep(0)
        return done


class Encoded:
    """How a follower reads what the leader answers to a batch: it hands the bytes on."""

    @staticmethod
    def FromString(data: bytes, /) -> bytes:
        """Return what came."""
        return data


class Batches:
    """The two batch calls, on the leader. Answers are encoded already."""

    def __init__(self, api: ApiContext, waits: Waits) -> None:
        self._api = api
        self._waits = waits
        self._slices = _Slices()

    async def create(
        self, request: sandbox_pb2.BatchCreateSandboxesRequest, left_s: float
    ) -> bytes:
        """Create many; return a BatchCreateSandboxesResponse."""
        ends = asyncio.get_running_loop().time() + left_s - _ANSWER_S
        requests = list(request.requests)
        outcomes = await self._submit(await self._slices.map(_creates_of, requests), requests)
        for position, one in enumerate(requests):
            outcome = outcomes[position]
            if one.wait_until == sandbox_pb2.WAIT_UNTIL_READY and isinstance(outcome, SandboxRow):
                # Most are READY when the first of them is waited for no more.
                outcomes[position] = self._waits.ready_now(outcome.id) or await _after(
                    outcome, self._ready, ends
                )
        return b"".join(await self._slices.map(_results_of, outcomes))

    async def delete(
        self, request: sandbox_pb2.BatchDeleteSandboxesRequest, left_s: float
    ) -> bytes:
        """Delete many; return a BatchDeleteSandboxesResponse."""
        ends = asyncio.get_running_loop().time() + left_s - _ANSWER_S
        requests = list(request.requests)
        outcomes = await self._submit(await self._slices.map(_deletes_of, requests), requests)
        for position, one in enumerate(requests):
            outcome = outcomes[position]
            if one.wait and isinstance(outcome, SandboxRow):
                outcomes[position] = self._waits.deleted_now(outcome) or await _after(
                    outcome, self._waits.deleted, ends
                )
        return b"".join(await self._slices.map(_results_of, outcomes))

    async def _ready(self, row: SandboxRow, ends: float) -> SandboxRow:
        return await self._waits.ready(row.id, ends)

    async def _submit(
        self, items: Sequence[Command | PrismError], requests: Sequence[Message]
    ) -> list[_Outcome]:
        """Propose what is valid; return each item's own outcome.

        Raises:
            PrismError: The whole must be sent again, which its request ids make safe.
        """
        group = [
            (item, request.ByteSize())
            for item, request in zip(items, requests, strict=True)
            if not isinstance(item, PrismError)
        ]
        results = iter(await self._api.submit_all(group))
        outcomes: list[_Outcome] = []
        for item in items:
            if isinstance(item, PrismError):
                outcomes.append(item)
                continue
            result = next(results)
            if isinstance(result, PrismError):
                if result.code in SAFE_TO_RESEND:
                    raise result
                outcomes.append(result)
                continue
            try:
                outcomes.append(row_of(result, item))
            except PrismError as error:
                outcomes.append(error)
        return outcomes


def _creates_of(
    requests: Iterable[sandbox_pb2.CreateSandboxRequest],
) -> list[Command | PrismError]:
    made: list[Command | PrismError] = []
    for request in requests:
        try:
            validation.request_id(request.request_id)
            made.append(create_command(request, check_create(request)))
        except PrismError as error:
            made.append(error)
    return made


def _deletes_of(
    requests: Iterable[sandbox_pb2.DeleteSandboxRequest],
) -> list[Command | PrismError]:
    made: list[Command | PrismError] = []
    for request in requests:
        try:
            validation.request_id(request.request_id)
            validation.reference(request.sandbox, "sandbox")
            made.append(delete_command(request))
        except PrismError as error:
            made.append(error)
    return made


def check_batch(
    request: sandbox_pb2.BatchCreateSandboxesRequest | sandbox_pb2.BatchDeleteSandboxesRequest,
) -> None:
    """Refuse a batch that is too large as a whole, and give each item a request id.

    Raises:
        InvalidArgumentError: It has no items, too many, or too many bytes.
    """
    count = len(request.requests)
    if not 1 <= count <= limits.BATCH_ITEMS_MAX:
        raise InvalidArgumentError(
            f"requests: {count} items are not 1 to {limits.BATCH_ITEMS_MAX}", field="requests"
        )
    size = request.ByteSize()
    if size > _BATCH_BYTES_MAX:
        raise InvalidArgumentError(
            f"requests: {size} bytes; at most {_BATCH_BYTES_MAX}: send fewer items a call",
            field="requests",
        )
    for one in request.requests:
        if not one.request_id:
            one.request_id = validation.request_id("")


def version_of_batch(request: sandbox_pb2.BatchCreateSandboxesRequest) -> int:
    """Return the lowest version of commands by which all of a batch can be proposed."""
    items = _creates_of(request.requests)
    return max((version_of(item) for item in items if not isinstance(item, PrismError)), default=1)


async def _after(row: SandboxRow, wait: _Wait, ends: float) -> _Outcome:
    """Wait for what an item asked to wait for; the others' waits run out at the same time."""
    try:
        return await wait(row, ends)
    except PrismError as error:
        return error


def _results_of(outcomes: Iterable[_Outcome]) -> tuple[bytes]:
    """Return the results of some items, encoded: in both answers they are the same field."""
    return (result_bytes(map(_result_of, outcomes)),)


def _result_of(outcome: _Outcome) -> SandboxRow | bytes:
    if not isinstance(outcome, PrismError):
        return outcome
    status = status_of(outcome)
    result = sandbox_pb2.ItemResult(code=status.code, reason=outcome.code, message=status.message)
    return result.SerializeToString()
