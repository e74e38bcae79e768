"""What the calls that change sandboxes share: requests to commands, results to rows, waiting."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits, names
from prism_common.errors import (
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    WrongStateError,
)
from prism_control.api import validation
from prism_control.api.context import ApiContext
from prism_control.state import commands
from prism_control.state.commands import Command
from prism_control.state.model import SandboxRow, SandboxState, Spec, is_placed, pairs
from prism_control.state.results import Ok, Refused, Result

#: Answered before the call's own deadline, so that the caller gets a reason and not a bare timeout.
DEADLINE_MARGIN_S: Final = 0.05
_WAITS: Final = frozenset(sandbox_pb2.WaitUntil.values())
_READY: Final = (SandboxState.READY, SandboxState.PAUSED)
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


def check_create(request: sandbox_pb2.CreateSandboxRequest) -> Spec:
    """Return a create's spec; raise InvalidArgumentError if it cannot be proposed."""
    if request.name:
        names.validate_name(request.name, "name")
    spec = validation.spec_of(request.spec)
    if request.wait_until not in _WAITS:
        raise InvalidArgumentError(
            f"wait_until: {request.wait_until} is not COMMITTED or READY", field="wait_until"
        )
    return spec


def create_command(
    request: sandbox_pb2.CreateSandboxRequest, spec: Spec | None = None
) -> commands.CreateSandbox:
    """Return what to propose for a create that was checked, with what that has returned."""
    return commands.CreateSandbox(
        request_id=request.request_id,
        fingerprint=validation.fingerprint_of_create(request),
        sandbox_id=names.generate_id("sb"),
        name=request.name or names.generate_name(),
        spec=spec or validation.spec_of(request.spec),
    )


def delete_command(request: sandbox_pb2.DeleteSandboxRequest) -> commands.DeleteSandbox:
    """Return what to propose for a delete."""
    return commands.DeleteSandbox(
        request_id=request.request_id,
        fingerprint=validation.fingerprint(request, "wait"),
        sandbox=request.sandbox,
        force=request.force,
        grace_ms=int(limits.GRACE_S_DEFAULT * 1000),
    )


def stop_command(request: sandbox_pb2.StopSandboxRequest) -> commands.StopSandbox:
    """Return what to propose for a stop; InvalidArgumentError if it is nonsense."""
    return commands.StopSandbox(
        request_id=request.request_id,
        fingerprint=validation.fingerprint(request),
        sandbox=request.sandbox,
        grace_ms=validation.duration_ms(
            request.grace_period if request.HasField("grace_period") else None,
            "grace_period",
            limits.GRACE_S_DEFAULT,
            limits.GRACE_S_MAX,
        ),
    )


def start_command(request: sandbox_pb2.StartSandboxRequest) -> commands.StartSandbox:
    """Return what to propose for a start."""
    return commands.StartSandbox(
        request.request_id, validation.fingerprint(request), request.sandbox
    )


def pause_command(request: sandbox_pb2.PauseSandboxRequest) -> commands.PauseSandbox:
    """Return what to propose for a pause."""
    return commands.PauseSandbox(
        request.request_id, validation.fingerprint(request), request.sandbox
    )


def resume_command(request: sandbox_pb2.ResumeSandboxRequest) -> commands.ResumeSandbox:
    """Return what to propose for the end of a pause."""
    return commands.ResumeSandbox(
        request.request_id, validation.fingerprint(request), request.sandbox
    )


def update_command(request: sandbox_pb2.UpdateSandboxRequest) -> commands.UpdateSandbox:
    """Return what to propose for an update; InvalidArgumentError if it is nonsense."""
    return commands.UpdateSandbox(
        request_id=request.request_id,
        fingerprint=validation.fingerprint(request),
        sandbox=request.sandbox,
        labels=pairs(names.validate_labels(dict(request.labels), "labels")),
        expire_ms=validation.expire_ms(request),
        **validation.new_limits(request.limits),
    )


def row_of(result: Result, command: Command) -> SandboxRow:
    """Return the sandbox that a user's command was answered with.

    Raises:
        PrismError: The command was refused.
    """
    if isinstance(result, Refused):
        raise result.error()
    if not isinstance(result, Ok):
        raise TypeError(f"{type(command).__name__} was answered by {type(result).__name__}")
    return result.sandbox


class Waits:
    """Waiting for what becomes of a sandbox, until the loop's time `ends`."""

    def __init__(self, api: ApiContext) -> None:
        self._api = api

    async def ready(self, sandbox_id: str, ends: float) -> SandboxRow:
        """Return a sandbox once it is READY.

        Raises:
            NotFoundError, WrongStateError: It never will be by itself.
            DeadlineError: There is no time left; the sandbox goes on as it was told.
        """

        def is_ready(row: SandboxRow | None) -> bool:
            if row is None or row.state in _NEVER_READY:
                raise _not_ready(sandbox_id, row)
            return row.state in _READY

        return cast("SandboxRow", await self._until(sandbox_id, is_ready, ends))

    async def deleted(self, row: SandboxRow, ends: float) -> SandboxRow:
        """Return a sandbox once no node has anything of it.

        Raises:
            DeadlineError: There is no time left; its removal goes on.
        """

        def is_gone(latest: SandboxRow | None) -> bool:
            return latest is None or not is_placed(latest)

        return await self._until(row.id, is_gone, ends) or row

    def ready_now(self, sandbox_id: str) -> SandboxRow | None:
        """Return a sandbox if it is READY already."""
        row = self._api.machine().sandbox(sandbox_id)
        return row if row is not None and row.state in _READY else None

    def deleted_now(self, row: SandboxRow) -> SandboxRow | None:
        """Return a sandbox if no node has anything of it already."""
        latest = self._api.machine().sandbox(row.id) or row
        return None if is_placed(latest) else latest

    async def _until(
        self, sandbox_id: str, done: Callable[[SandboxRow | None], bool], ends: float
    ) -> SandboxRow | None:
        """Return a sandbox once it is as wanted; under one timer, since thousands wait at once."""
        row = self._api.machine().sandbox(sandbox_id)
        if done(row):
            return row  # no timer: a batch asks for a thousand
        try:
            async with asyncio.timeout_at(ends - DEADLINE_MARGIN_S):
                while not done(row):
                    await self._api.sandbox_changed.wait(sandbox_id)
                    row = self._api.machine().sandbox(sandbox_id)
        except TimeoutError:
            raise _too_late(sandbox_id, row) from None
        return row


def _too_late(sandbox_id: str, row: SandboxRow | None) -> DeadlineError:
    if row is None:
        return DeadlineError(f"sandbox {sandbox_id}: the call's deadline has passed")
    why = "; ".join(f"{r.node_name}: {r.reason}" for r in row.placement)
    return DeadlineError(
        f"sandbox {row.name} is {row.state.name} at the call's deadline, and goes on"
        + (f": {why}" if why else ""),
        metadata={"sandbox": row.id},
    )


def _not_ready(sandbox_id: str, row: SandboxRow | None) -> WrongStateError | NotFoundError:
    if row is None:
        return NotFoundError(f"sandbox {sandbox_id} is gone", reason="SANDBOX_NOT_FOUND")
    why = row.message or row.reason
    return WrongStateError(
        f"sandbox {row.name} is {row.state.name}" + (f": {why}" if why else ""),
        metadata={"sandbox": row.id, "state": row.state.name, "cause": row.reason},
    )
