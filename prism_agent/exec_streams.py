"""What clients see of execs: output from any point on, the end, and logs."""

import asyncio
from collections.abc import AsyncIterator, Callable

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.exec_record import Exec
from prism_agent.execs import Execs
from prism_agent.supervisor.protocol import Output, State
from prism_agent.supervisor.ring import Ring
from prism_common.errors import NotFoundError, SandboxGoneError


async def follow(
    execs: Execs, each: Exec, after_sequence: int, check: Callable[[], None]
) -> AsyncIterator[sandbox_pb2.ExecResponse]:
    """Yield an exec's output after a sequence number, then how it ended.

    The caller takes the next piece when the client has room for it; until then the exec may write
    as much as its ring holds, and not more. `check` is called whenever the exec has changed, and
    may raise.

    Raises:
        SandboxGoneError: The sandbox ended first: there is no exit status.
    """
    try:
        ring = Ring.open(each.ring_path)
    except FileNotFoundError:
        ring = None
    token = object()
    try:
        if ring is not None:
            async for output in _follow_ring(execs, each, ring, token, check):
                piece = _after(output, after_sequence)
                if piece is not None:
                    yield sandbox_pb2.ExecResponse(output=piece)
        elif each.running:
            raise NotFoundError("the exec's output is gone")
        status = each.exit()
        if status is None:
            raise SandboxGoneError("the sandbox ended before the exec did")
        yield sandbox_pb2.ExecResponse(exit=status)
    finally:
        execs.let_go(each, token)
        if ring is not None:
            ring.close()


async def _follow_ring(
    execs: Execs, each: Exec, ring: Ring, token: object, check: Callable[[], None]
) -> AsyncIterator[Output]:
    """Yield output until the exec has ended and all that it wrote before was yielded."""
    offset = ring.header().tail
    execs.hold(each, token, offset)
    while True:
        changed = each.changed
        check()
        outputs, offset = ring.read(offset)
        for output in outputs:
            yield output
        if outputs:
            execs.hold(each, token, offset)
            continue
        header = ring.header()
        if header.state is State.DRAINED and offset >= header.drained_head:
            # The supervisor's word of it may still be on its way.
            each.refresh()
            execs.settle(each)
            return
        if offset < header.head:
            continue
        if each.lost:
            return
        execs.want_more(each, offset)
        await changed.wait()


def _after(output: Output, sequence: int) -> sandbox_pb2.ExecOutput | None:
    """Return what of a piece lies after a sequence number; None: nothing."""
    missing = output.sequence - sequence
    if missing <= 0:
        return None
    return sandbox_pb2.ExecOutput(
        sequence=output.sequence,
        stream=sandbox_pb2.OutputStream.ValueType(output.stream),
        data=output.data[-missing:] if missing < len(output.data) else output.data,
    )


async def logs(
    execs: Execs, since_s: float, follow_on: bool
) -> AsyncIterator[sandbox_pb2.StreamLogsResponse]:
    """Yield what the sandbox's execs have written, exec after exec, then what they go on to write.

    A reader of logs holds nobody up: what an exec overwrites before it was read is skipped.

    Raises:
        SandboxGoneError: With `follow_on`, when the sandbox ends.
    """
    offsets: dict[str, int] = {}
    while True:
        changed = execs.changed
        found = False
        for each in execs.all():
            async for response in _new_logs(each, since_s, offsets):
                found = True
                yield response
        if not follow_on:
            return
        if found:
            continue
        if not execs.connected:
            raise SandboxGoneError("the sandbox ended")
        for each in execs.all():
            execs.want_more(each, offsets.get(each.record.exec_id, 0))
        await changed.wait()


async def _new_logs(
    each: Exec, since_s: float, offsets: dict[str, int]
) -> AsyncIterator[sandbox_pb2.StreamLogsResponse]:
    exec_id = each.record.exec_id
    try:
        ring = Ring.open(each.ring_path)
    except FileNotFoundError:
        return
    try:
        while True:
            outputs, offsets[exec_id] = ring.read(offsets.get(exec_id, 0))
            if not outputs:
                return
            for output in outputs:
                if output.time_s >= since_s:
                    yield _log_of(exec_id, output)
            await asyncio.sleep(0)
    finally:
        ring.close()


def _log_of(exec_id: str, output: Output) -> sandbox_pb2.StreamLogsResponse:
    response = sandbox_pb2.StreamLogsResponse(
        exec_id=exec_id,
        stream=sandbox_pb2.OutputStream.ValueType(output.stream),
        data=output.data,
    )
    response.time.FromNanoseconds(int(output.time_s * 1e9))
    return response
