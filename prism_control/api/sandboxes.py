"""SandboxService: the lifecycle. The data path is in `data_path.py`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias, TypeVar

import grpc.aio
from prism.sandbox.v1 import sandbox_pb2

from prism_common import names
from prism_common.errors import InvalidArgumentError
from prism_control.api import validation
from prism_control.api.batches import Batches, Encoded, check_batch, version_of_batch
from prism_control.api.context import ApiContext
from prism_control.api.data_path import DataPath
from prism_control.api.lifecycle import (
    Waits,
    check_create,
    create_command,
    delete_command,
    pause_command,
    resume_command,
    row_of,
    start_command,
    stop_command,
    update_command,
)
from prism_control.api.listing import Listing, keeps
from prism_control.row_bytes import EventBytes
from prism_control.rows import sandbox_proto
from prism_control.state.commands import Command, version_of
from prism_control.state.events import SandboxChanged
from prism_control.state.model import SandboxRow

#: A request that names a sandbox and has an idempotency key.
Changing = TypeVar(
    "Changing",
    sandbox_pb2.StopSandboxRequest,
    sandbox_pb2.StartSandboxRequest,
    sandbox_pb2.PauseSandboxRequest,
    sandbox_pb2.ResumeSandboxRequest,
    sandbox_pb2.UpdateSandboxRequest,
)
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_SERVICE: Final = "/prism.sandbox.v1.SandboxService/"
#: A watcher hears at least this often that nothing happened.
_PROGRESS_INTERVAL_S: Final = 10.0
_EVENTS_A_TURN: Final = 500


class SandboxServicer(DataPath):
    """Serves SandboxService on one control node."""

    def __init__(self, api: ApiContext) -> None:
        super().__init__(api)
        self._waits = Waits(api)
        self._batches = Batches(api, self._waits)
        self._listing = Listing(api.machine)
        self._events = EventBytes()

    # ── Writes ───────────────────────────────────────────────────────────────────────────────

    async def CreateSandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Create one sandbox."""
        check_create(request)
        request.request_id = validation.request_id(request.request_id)
        return await self._api.forwarder.call(
            _SERVICE + "CreateSandbox",
            request,
            sandbox_pb2.Sandbox,
            context,
            self._create,
            lambda: version_of(create_command(request)),
        )

    async def _create(
        self, request: sandbox_pb2.CreateSandboxRequest, left_s: float
    ) -> sandbox_pb2.Sandbox:
        command = create_command(request)
        ends = asyncio.get_running_loop().time() + left_s
        row = await self._submit(command, request.ByteSize())
        if request.wait_until == sandbox_pb2.WAIT_UNTIL_READY:
            row = await self._waits.ready(row.id, ends)
        return sandbox_proto(row)

    async def StopSandbox(
        self, request: sandbox_pb2.StopSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """End a sandbox's processes and keep its files."""
        return await self._change("StopSandbox", request, context, stop_command)

    async def StartSandbox(
        self, request: sandbox_pb2.StartSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Start a stopped sandbox again."""
        return await self._change("StartSandbox", request, context, start_command)

    async def PauseSandbox(
        self, request: sandbox_pb2.PauseSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Freeze a sandbox's processes."""
        return await self._change("PauseSandbox", request, context, pause_command)

    async def ResumeSandbox(
        self, request: sandbox_pb2.ResumeSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Thaw a sandbox's processes."""
        return await self._change("ResumeSandbox", request, context, resume_command)

    async def UpdateSandbox(
        self, request: sandbox_pb2.UpdateSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Change labels, the deadline or limits."""
        return await self._change("UpdateSandbox", request, context, update_command)

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
        command = delete_command(request)
        ends = asyncio.get_running_loop().time() + left_s
        row = await self._submit(command, request.ByteSize())
        if request.wait:
            row = await self._waits.deleted(row, ends)
        return sandbox_proto(row)

    async def BatchCreateSandboxes(  # type: ignore[override]  # encoded already
        self, request: sandbox_pb2.BatchCreateSandboxesRequest, context: Context
    ) -> bytes:
        """Create many."""
        check_batch(request)
        return await self._api.forwarder.call(
            _SERVICE + "BatchCreateSandboxes",
            request,
            Encoded,
            context,
            self._batches.create,
            lambda: version_of_batch(request),
        )

    async def BatchDeleteSandboxes(  # type: ignore[override]  # encoded already
        self, request: sandbox_pb2.BatchDeleteSandboxesRequest, context: Context
    ) -> bytes:
        """Delete many."""
        check_batch(request)
        return await self._api.forwarder.call(
            _SERVICE + "BatchDeleteSandboxes",
            request,
            Encoded,
            context,
            self._batches.delete,
        )

    async def _change(
        self,
        method: str,
        request: Changing,
        context: Context,
        make: Callable[[Changing], Command],
    ) -> sandbox_pb2.Sandbox:
        """Serve a call that changes a sandbox and waits for nothing but the decision.

        Args:
            method: Its name.
            request: What to change.
            context: Of the call.
            make: What to propose; InvalidArgumentError if a field is nonsense.
        """
        validation.reference(request.sandbox, "sandbox")
        request.request_id = validation.request_id(request.request_id)
        command = make(request)

        async def propose(again: Changing, left_s: float) -> sandbox_pb2.Sandbox:
            return sandbox_proto(await self._submit(command, again.ByteSize()))

        return await self._api.forwarder.call(
            _SERVICE + method,
            request,
            sandbox_pb2.Sandbox,
            context,
            propose,
            lambda: version_of(command),
        )

    async def _submit(self, command: Command, size: int) -> SandboxRow:
        return row_of(await self._api.submit(command, size), command)

    # ── Reads ────────────────────────────────────────────────────────────────────────────────

    async def GetSandbox(
        self, request: sandbox_pb2.GetSandboxRequest, context: Context
    ) -> sandbox_pb2.Sandbox:
        """Return one sandbox."""
        reference = validation.reference(request.sandbox, "sandbox")
        machine = await self._fresh(request.consistency, context)
        row = machine.find_sandbox(reference)
        proto = sandbox_proto(row)
        return await self._with_usage(row, proto) if request.with_usage else proto

    async def ListSandboxes(  # type: ignore[override]  # encoded already
        self, request: sandbox_pb2.ListSandboxesRequest, context: Context
    ) -> bytes:
        """Return a page of sandboxes, encoded."""
        return await self._listing.page(request, lambda: self._fresh(request.consistency, context))

    async def WatchSandboxes(  # type: ignore[override]  # mostly encoded already
        self, request: sandbox_pb2.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[bytes | sandbox_pb2.WatchSandboxesResponse]:
        """Stream every change after a revision, and a sign of life while there is none."""
        labels = names.validate_labels(dict(request.label_selector), "label_selector")
        keep = keeps(frozenset(labels.items()), frozenset(), "")
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
                    if named and (keep is None or keep(row)):
                        progress_at = loop.time() + _PROGRESS_INTERVAL_S
                        yield self._events.of(row)
            # Also while there is only what the filter hides: the watcher resumes from here.
            if loop.time() >= progress_at:
                progress_at = loop.time() + _PROGRESS_INTERVAL_S
                yield sandbox_pb2.WatchSandboxesResponse(revision=revision)
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(progress_at):
                        await self._api.changed.wait()
