"""Watches that survive broken streams, and waiting for a sandbox to come to a state."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

import grpc
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import Backoff, Client, Deadline, list_sandboxes, resume_wait_s
from prism_cli.errors import CliError, UnreachableError
from prism_cli.output import state_name
from prism_common.errors import PrismError
from prism_common.status import RemoteError

READY: Final = pb.SANDBOX_STATE_READY
STOPPED: Final = pb.SANDBOX_STATE_STOPPED
PAUSED: Final = pb.SANDBOX_STATE_PAUSED
_ENDS: Final = frozenset(
    {
        pb.SANDBOX_STATE_STOPPED,
        pb.SANDBOX_STATE_FAILED,
        pb.SANDBOX_STATE_LOST,
        pb.SANDBOX_STATE_DELETING,
        pb.SANDBOX_STATE_DELETED,
    }
)


def watch(
    client: Client, request: pb.WatchSandboxesRequest, deadline: Deadline | None = None
) -> Iterator[pb.WatchSandboxesResponse]:
    """Yield changes, and go on from the last revision after a broken stream.

    Raises:
        RemoteError: OUT_OF_RANGE where the revision is compacted (list again), DEADLINE_EXCEEDED,
            or the stream stays broken for as long as a call may take.
    """
    backoff, patience = Backoff(), None
    while True:
        broken: PrismError = CliError("the server ends each watch at once")
        try:
            time_s = None if deadline is None else max(deadline.left_s, 0.001)
            for response in client.stream(
                lambda stubs: stubs.sandboxes.WatchSandboxes, request, time_s
            ):
                backoff, patience = Backoff(), None
                request.revision = response.revision or request.revision
                yield response
        except (RemoteError, UnreachableError) as error:
            broken = error
        patience = patience or Deadline(client.timeout_s)
        wait_s = resume_wait_s(broken, backoff)
        if wait_s is None or wait_s > patience.left_s:
            raise broken
        client.try_next_address()
        time.sleep(wait_s)


def wait_until(
    client: Client,
    sandbox: pb.Sandbox,
    wanted: int,
    passing: Collection[int] = (),
    on_change: Callable[[pb.Sandbox], None] = lambda _: None,
) -> pb.Sandbox:
    """Return the sandbox once it is in the wanted state.

    Args:
        client: Its timeout bounds the wait.
        sandbox: As the last reply showed it.
        wanted: The state.
        passing: Ends that it may be in for now: STOPPED when it is being started.
        on_change: Told of each change on the way.

    Raises:
        CliError: It came to another end, or the time is up; it says why.
    """
    deadline = Deadline(client.timeout_s)
    while True:
        try:
            for seen in _states(client, sandbox, deadline):
                sandbox = seen
                on_change(sandbox)
                if sandbox.state == wanted:
                    return sandbox
                if sandbox.state in _ENDS and sandbox.state not in passing:
                    raise CliError(f"sandbox {sandbox.name} is {_why(sandbox)}")
        except RemoteError as error:
            if error.status_code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _late(client, sandbox, wanted) from None
            if error.status_code is not grpc.StatusCode.OUT_OF_RANGE:
                raise
        request = pb.GetSandboxRequest(sandbox=sandbox.id)
        sandbox = client.call(lambda stubs: stubs.sandboxes.GetSandbox, request)


def wait_for_all(
    client: Client, sandboxes: Sequence[pb.Sandbox], wanted: int
) -> Iterator[tuple[pb.Sandbox, PrismError | None]]:
    """Yield each sandbox once it is in the wanted state, or cannot come to it, with why.

    It gives up on the rest once none has changed for as long as a call may take.
    """
    left = {sandbox.id: sandbox for sandbox in sandboxes}
    patience = Deadline(client.timeout_s)
    while left:
        found, revision = list_sandboxes(client, pb.ListSandboxesRequest())
        late = patience.left_s <= 0.0
        now = {sandbox.id: sandbox for sandbox in found if sandbox.id in left}
        for sandbox in list(left.values()):
            gone = pb.Sandbox(id=sandbox.id, name=sandbox.name, state=pb.SANDBOX_STATE_DELETED)
            seen = now.get(sandbox.id, gone)
            settled, failure = _settled(seen, wanted)
            if late and not settled:
                settled, failure = True, _too_late(client, seen, wanted)
            if settled:
                del left[sandbox.id]
                patience = Deadline(client.timeout_s)
                yield seen, failure
        request = pb.WatchSandboxesRequest(revision=revision)
        try:
            for response in watch(client, request, patience) if left else ():
                sandbox = response.sandbox
                if sandbox.id not in left:
                    continue
                patience = Deadline(client.timeout_s)
                settled, failure = _settled(sandbox, wanted)
                if settled:
                    del left[sandbox.id]
                    yield sandbox, failure
                if not left:
                    return
        except RemoteError as error:
            again = (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if error.status_code not in again:
                raise


def _settled(sandbox: pb.Sandbox, wanted: int) -> tuple[bool, PrismError | None]:
    """Return whether there is nothing more to wait for, and why not what was wanted."""
    if sandbox.state == wanted:
        return True, None
    if sandbox.state in _ENDS:
        return True, CliError(f"sandbox {sandbox.name} is {_why(sandbox)}")
    return False, None


def _states(client: Client, sandbox: pb.Sandbox, deadline: Deadline) -> Iterator[pb.Sandbox]:
    yield sandbox
    request = pb.WatchSandboxesRequest(sandbox=sandbox.id, revision=sandbox.revision)
    for response in watch(client, request, deadline):
        if response.HasField("sandbox"):
            yield response.sandbox


def _why(sandbox: pb.Sandbox) -> str:
    words = sandbox.message or sandbox.reason
    return f"{state_name(sandbox.state)}: {words}" if words else state_name(sandbox.state)


def _late(client: Client, sandbox: pb.Sandbox, wanted: int) -> CliError:
    """Return the failure of a wait that took too long, with what the sandbox waits for."""
    try:
        request = pb.GetSandboxRequest(sandbox=sandbox.id)
        sandbox = client.call(lambda stubs: stubs.sandboxes.GetSandbox, request, 2.0)
    except RemoteError:
        pass  # what was seen last has to do
    return _too_late(client, sandbox, wanted)


def _too_late(client: Client, sandbox: pb.Sandbox, wanted: int) -> CliError:
    refusals = ", ".join(f"{one.node_name}: {one.reason}" for one in sandbox.placement)
    if sandbox.state == pb.SANDBOX_STATE_PENDING and not refusals:
        refusals = sandbox.message or "no node takes it"
    because = f" ({refusals})" if refusals else ""
    return CliError(
        f"sandbox {sandbox.name} is still {state_name(sandbox.state)} after {client.timeout_s:g} s"
        f"{because} and not {state_name(wanted)}; it goes on: prismctl sandbox info {sandbox.name}"
    )
