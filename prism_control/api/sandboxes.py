"""SandboxService: the lifecycle. The data path is in `data_path.py`."""

import asyncio
import base64
import binascii
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc.aio
from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits, names
from prism_common.errors import (
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    NotServedError,
    WrongStateError,
)
from prism_control.api import validation
from prism_control.api.context import ApiContext
from prism_control.api.data_path import DataPath
from prism_control.rows import sandbox_proto
from prism_control.state import commands
from prism_control.state.commands import Command
from prism_control.state.events import SandboxChanged
from prism_control.state.model import SandboxRow, SandboxState, is_placed
from prism_control.state.results import Ok, Refused, Result

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_SERVICE: Final = "/prism.sandbox.v1.SandboxService/"
_PAGE_TOKEN: Final = struct.Struct(">Q")
#: A watcher hears at least this often that nothing happened.
_PROGRESS_INTERVAL_S: Final = 10.0
_EVENTS_A_TURN: Final = 500
#: A page ends here too: with full environments 50 sandboxes would not fit into a message.
_PAGE_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX - 512 * limits.KIB
#: Answered before the call's own deadline, so that the caller gets a reason and not a bare timeout.
_DEADLINE_MARGIN_S: Final = 0.05
_WAITS: Final = frozenset(sandbox_pb2.WaitUntil.values())
#: States from which READY does not follow by itself.
_NEVER_READY: Final = frozenset(
    {
        SandboxState.STOPPING,
        SandboxState.STOPPED,
        SandboxState.FAILED,
        SandboxState.LOST,
        SandboxState.DELETING,
        SandboxState.DELETED,
    }
)


class SandboxServicer(DataPath):
    """Serves SandboxService on one control node."""

    def __init__(self, api: ApiContext) -> None:
        super().__init__(api)

    # ── Writes ───────────────────────────────────────────────────────────────────────────────

    async def CreateSandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Create one sandbox."""
        if request.name:
            names.validate_name(request.name, "name")
        validation.spec_of(request.spec)
        if request.wait_until not in _WAITS:
            raise InvalidArgumentError(
                f"wait_until: {request.wait_until} is not COMMITTED or READY", field="wait_until"
            )
        request.request_id = validation.request_id(request.request_id)
        return await self._api.forwarder.call(
            _SERVICE + "CreateSandbox", request, sandbox_pb2.Sandbox, context, self._create
        )

    async def _create(
        self, request: sandbox_pb2.CreateSandboxRequest, left_s: float
    ) -> sandbox_pb2.Sandbox:
        command = commands.CreateSandbox(
            request_id=request.request_id,
            fingerprint=validation.fingerprint(request, "wait_until"),
            sandbox_id=names.generate_id("sb"),
            name=request.name or names.generate_name(),
            spec=validation.spec_of(request.spec),
        )
        ends = asyncio.get_running_loop().time() + left_s
        row = await self._submit(command, request.ByteSize())
        if request.wait_until == sandbox_pb2.WAIT_UNTIL_READY:
            row = await self._wait_ready(row.id, ends)
        return sandbox_proto(row)

    async def StopSandbox(
        self, request: sandbox_pb2.StopSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """End a sandbox's processes and keep its files."""
        validation.reference(request.sandbox, "sandbox")
        self._grace_ms(request)
        request.request_id = validation.request_id(request.request_id)
        return await self._api.forwarder.call(
            _SERVICE + "StopSandbox", request, sandbox_pb2.Sandbox, context, self._stop
        )

    async def _stop(
        self, request: sandbox_pb2.StopSandboxRequest, left_s: float
    ) -> sandbox_pb2.Sandbox:
        command = commands.StopSandbox(
            request_id=request.request_id,
            fingerprint=validation.fingerprint(request),
            sandbox=request.sandbox,
            grace_ms=self._grace_ms(request),
        )
        return sandbox_proto(await self._submit(command, request.ByteSize()))

    async def StartSandbox(
        self, request: sandbox_pb2.StartSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Start a stopped sandbox again."""
        validation.reference(request.sandbox, "sandbox")
        request.request_id = validation.request_id(request.request_id)
        return await self._api.forwarder.call(
            _SERVICE + "StartSandbox", request, sandbox_pb2.Sandbox, context, self._start
        )

    async def _start(
        self, request: sandbox_pb2.StartSandboxRequest, left_s: float
    ) -> sandbox_pb2.Sandbox:
        command = commands.StartSandbox(
            request_id=request.request_id,
            fingerprint=validation.fingerprint(request),
            sandbox=request.sandbox,
        )
        return sandbox_proto(await self._submit(command, request.ByteSize()))

    async def DeleteSandbox(
        self, request: sandbox_pb2.DeleteSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Remove a sandbox from any state."""
        validation.reference(request.sandbox, "sandbox")
        request.request_id = validation.request_id(request.request_id)
        return await self._api.forwarder.call(
            _SERVICE + "DeleteSandbox", request, sandbox_pb2.Sandbox, context, self._delete
        )

    async def _delete(
        self, request: sandbox_pb2.DeleteSandboxRequest, left_s: float
    ) -> sandbox_pb2.Sandbox:
        command = commands.DeleteSandbox(
            request_id=request.request_id,
            fingerprint=validation.fingerprint(request, "wait"),
            sandbox=request.sandbox,
            force=request.force,
            grace_ms=int(limits.GRACE_S_DEFAULT * 1000),
        )
        ends = asyncio.get_running_loop().time() + left_s
        row = await self._submit(command, request.ByteSize())
        if request.wait:
            row = await self._wait_deleted(row, ends)
        return sandbox_proto(row)

    async def _submit(self, command: Command, size: int) -> SandboxRow:
        result: Result = await self._api.submit(command, size)
        if isinstance(result, Refused):
            raise result.error()
        if not isinstance(result, Ok):
            raise TypeError(f"{type(command).__name__} was answered by {type(result).__name__}")
        return result.sandbox

    @staticmethod
    def _grace_ms(request: sandbox_pb2.StopSandboxRequest) -> int:
        return validation.duration_ms(
            request.grace_period if request.HasField("grace_period") else None,
            "grace_period",
            limits.GRACE_S_DEFAULT,
            limits.GRACE_S_MAX,
        )

    # ── Waiting ──────────────────────────────────────────────────────────────────────────────

    async def _wait_ready(self, sandbox_id: str, ends: float) -> SandboxRow:
        while True:
            row = self._api.machine().sandbox(sandbox_id)
            if row is None or row.state in _NEVER_READY:
                raise _not_ready(sandbox_id, row)
            if row.state in (SandboxState.READY, SandboxState.PAUSED):
                return row
            await self._wait_change(ends, row)

    async def _wait_deleted(self, row: SandboxRow, ends: float) -> SandboxRow:
        while True:
            latest = self._api.machine().sandbox(row.id)
            if latest is None or not is_placed(latest):
                return latest or row
            await self._wait_change(ends, latest)

    async def _wait_change(self, ends: float, row: SandboxRow) -> None:
        """Wait for a change of a sandbox.

        Args:
            ends: The loop's time at the call's deadline.
            row: The sandbox as it is.

        Raises:
            DeadlineError: There is no time left; the sandbox goes on as it was told.
        """
        try:
            async with asyncio.timeout_at(ends - _DEADLINE_MARGIN_S):
                await self._api.sandbox_changed.wait(row.id)
        except TimeoutError:
            why = "; ".join(f"{r.node_name}: {r.reason}" for r in row.placement)
            raise DeadlineError(
                f"sandbox {row.name} is {row.state.name} at the call's deadline, and goes on"
                + (f": {why}" if why else ""),
                metadata={"sandbox": row.id},
            ) from None

    # ── Reads ────────────────────────────────────────────────────────────────────────────────

    async def GetSandbox(
        self, request: sandbox_pb2.GetSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Return one sandbox."""
        reference = validation.reference(request.sandbox, "sandbox")
        machine = await self._fresh(request.consistency, context)
        return sandbox_proto(machine.find_sandbox(reference))

    async def ListSandboxes(
        self, request: sandbox_pb2.ListSandboxesRequest, context: Context
    ) -> sandbox_pb2.ListSandboxesResponse:
        """Return a page of sandboxes."""
        size = validation.page_size(request.page_size)
        after = _decode_token(request.page_token)
        labels = set(names.validate_labels(dict(request.label_selector), "label_selector").items())
        states = {SandboxState(state) for state in self._states(request)}
        node = request.node

        def keep(row: SandboxRow) -> bool:
            if states and row.state not in states:
                return False
            if node and node not in (row.node_id, row.node_name):
                return False
            return not labels or labels <= set(row.spec.labels)

        machine = await self._fresh(request.consistency, context)
        tombstones = SandboxState.DELETED in states
        rows, last = machine.list_page(after, size, keep, tombstones=tombstones)
        response = sandbox_pb2.ListSandboxesResponse(revision=machine.revision)
        size_bytes = 0
        for position, row in enumerate(rows):
            proto = sandbox_proto(row)
            size_bytes += proto.ByteSize()
            if position and size_bytes > _PAGE_BYTES_MAX:
                last = rows[position - 1].create_revision
                break
            response.sandboxes.append(proto)
        response.next_page_token = _encode_token(last) if last else ""
        return response

    @staticmethod
    def _states(request: sandbox_pb2.ListSandboxesRequest) -> list[int]:
        known = {int(state) for state in SandboxState}
        for state in request.states:
            if int(state) not in known:
                raise InvalidArgumentError(f"states: {state} is not a state", field="states")
        return list(request.states)

    async def WatchSandboxes(
        self, request: sandbox_pb2.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[sandbox_pb2.WatchSandboxesResponse]:
        """Stream every change after a revision, and a sign of life while there is none."""
        labels = set(names.validate_labels(dict(request.label_selector), "label_selector").items())
        if request.revision < 0:
            raise InvalidArgumentError(f"revision: {request.revision} is below 0", field="revision")
        await self._fresh(sandbox_pb2.CONSISTENCY_LINEARIZABLE, context)
        revision = request.revision or self._api.machine().revision
        yield sandbox_pb2.WatchSandboxesResponse(revision=revision)
        loop = asyncio.get_running_loop()
        progress_at = loop.time() + _PROGRESS_INTERVAL_S
        while True:
            events = self._api.machine().changes_since(revision, _EVENTS_A_TURN)
            for event in events:
                revision = event.revision
                if isinstance(event, SandboxChanged):
                    row = event.row
                    named = request.sandbox in ("", row.id, row.name)
                    if named and labels <= set(row.spec.labels):
                        progress_at = loop.time() + _PROGRESS_INTERVAL_S
                        yield sandbox_pb2.WatchSandboxesResponse(
                            sandbox=sandbox_proto(row), revision=revision
                        )
            # Also while there is only what the filter hides: the watcher resumes from here.
            if loop.time() >= progress_at:
                progress_at = loop.time() + _PROGRESS_INTERVAL_S
                yield sandbox_pb2.WatchSandboxesResponse(revision=revision)
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(progress_at):
                        await self._api.changed.wait()

    # ── Not served yet ───────────────────────────────────────────────────────────────────────

    async def BatchCreateSandboxes(
        self, request: sandbox_pb2.BatchCreateSandboxesRequest, context: Context
    ) -> sandbox_pb2.BatchCreateSandboxesResponse:
        """Not served yet."""
        raise NotServedError("BatchCreateSandboxes")

    async def BatchDeleteSandboxes(
        self, request: sandbox_pb2.BatchDeleteSandboxesRequest, context: Context
    ) -> sandbox_pb2.BatchDeleteSandboxesResponse:
        """Not served yet."""
        raise NotServedError("BatchDeleteSandboxes")

    async def UpdateSandbox(
        self, request: sandbox_pb2.UpdateSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Not served yet."""
        raise NotServedError("UpdateSandbox")

    async def PauseSandbox(
        self, request: sandbox_pb2.PauseSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Not served yet."""
        raise NotServedError("PauseSandbox")

    async def ResumeSandbox(
        self, request: sandbox_pb2.ResumeSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Not served yet."""
        raise NotServedError("ResumeSandbox")


def _not_ready(sandbox_id: str, row: SandboxRow | None) -> WrongStateError | NotFoundError:
    if row is None:
        return NotFoundError(f"sandbox {sandbox_id} is gone", reason="SANDBOX_NOT_FOUND")
    why = row.message or row.reason
    return WrongStateError(
        f"sandbox {row.name} is {row.state.name}" + (f": {why}" if why else ""),
        metadata={"sandbox": row.id, "state": row.state.name, "cause": row.reason},
    )


def _encode_token(revision: int) -> str:
    return base64.urlsafe_b64encode(_PAGE_TOKEN.pack(revision)).decode().rstrip("=")


def _decode_token(token: str) -> int:
    if not token:
        return 0
    try:
        decoded = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        (revision,) = _PAGE_TOKEN.unpack(decoded)
    except (binascii.Error, struct.error, ValueError):
        raise InvalidArgumentError(
            f"page_token: {names.shorten(token)} is not one that a list returned",
            field="page_token",
        ) from None
    return int(revision)
