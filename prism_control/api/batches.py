"""BatchCreateSandboxes and BatchDeleteSandboxes: one group of proposals, one result an item."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias, TypeVar

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
from prism_control.rows import sandbox_proto
from prism_control.state.commands import Command, version_of
from prism_control.state.model import SandboxRow

#: The answer repeats each spec with its defaults filled in, and is a message of 4 MiB as well.
_BATCH_BYTES_MAX: Final = 3 * limits.MIB
#: What is left to encode a thousand results in, once the items' own waiting is over.
_ANSWER_S: Final = 0.2
#: About a millisecond of work.
_SLICE_ITEMS: Final = 50

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

    async def map(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Return what `do` makes of each item."""
        done: list[U] = []
        for begin in range(0, len(items), _SLICE_ITEMS):
            async with self._turns:
                done += map(do, items[begin : begin + _SLICE_ITEMS])
                await asyncio.sleep(0)
        return done


class Batches:
    """The two batch calls, on the leader."""

    def __init__(self, api: ApiContext, waits: Waits) -> None:
        self._api = api
        self._waits = waits
        self._slices = _Slices()

    async def create(
        self, request: sandbox_pb2.BatchCreateSandboxesRequest, left_s: float
    ) -> sandbox_pb2.BatchCreateSandboxesResponse:
        """Create many."""
        ends = asyncio.get_running_loop().time() + left_s - _ANSWER_S
        items = await self._slices.map(_create_of, request.requests)
        outcomes = await self._submit(items, [one.ByteSize() for one in request.requests])
        for position, one in enumerate(request.requests):
            if one.wait_until == sandbox_pb2.WAIT_UNTIL_READY:
                outcomes[position] = await _after(outcomes[position], self._ready, ends)
        return sandbox_pb2.BatchCreateSandboxesResponse(
            results=await self._slices.map(_result, outcomes)
        )

    async def delete(
        self, request: sandbox_pb2.BatchDeleteSandboxesRequest, left_s: float
    ) -> sandbox_pb2.BatchDeleteSandboxesResponse:
        """Delete many."""
        ends = asyncio.get_running_loop().time() + left_s - _ANSWER_S
        items = await self._slices.map(_delete_of, request.requests)
        outcomes = await self._submit(items, [one.ByteSize() for one in request.requests])
        for position, one in enumerate(request.requests):
            if one.wait:
                outcomes[position] = await _after(outcomes[position], self._waits.deleted, ends)
        return sandbox_pb2.BatchDeleteSandboxesResponse(
            results=await self._slices.map(_result, outcomes)
        )

    async def _ready(self, row: SandboxRow, ends: float) -> SandboxRow:
        return await self._waits.ready(row.id, ends)

    async def _submit(
        self, items: Sequence[Command | PrismError], sizes: Sequence[int]
    ) -> list[_Outcome]:
        """Propose what is valid; return each item's own outcome.

        Raises:
            PrismError: The whole must be sent again, which its request ids make safe.
        """
        group = [
            (item, size)
            for item, size in zip(items, sizes, strict=True)
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


def _create_of(request: sandbox_pb2.CreateSandboxRequest) -> Command | PrismError:
    try:
        validation.request_id(request.request_id)
        check_create(request)
        return create_command(request)
    except PrismError as error:
        return error


def _delete_of(request: sandbox_pb2.DeleteSandboxRequest) -> Command | PrismError:
    try:
        validation.request_id(request.request_id)
        validation.reference(request.sandbox, "sandbox")
        return delete_command(request)
    except PrismError as error:
        return error


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
    items = map(_create_of, request.requests)
    return max((version_of(item) for item in items if not isinstance(item, PrismError)), default=1)


async def _after(outcome: _Outcome, wait: _Wait, ends: float) -> _Outcome:
    """Wait for what an item asked to wait for; the others' waits run out at the same time."""
    if isinstance(outcome, PrismError):
        return outcome
    try:
        return await wait(outcome, ends)
    except PrismError as error:
        return error


def _result(outcome: _Outcome) -> sandbox_pb2.ItemResult:
    if isinstance(outcome, PrismError):
        status = status_of(outcome)
        return sandbox_pb2.ItemResult(code=status.code, reason=outcome.code, message=status.message)
    return sandbox_pb2.ItemResult(sandbox=sandbox_proto(outcome))
