"""What clients see of execs: output from any point on, the end, and logs."""

import asyncio
from collections.abc import AsyncIterator, Callable

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.exec_record import Exec
from prism_agent.execs import Execs
from prism_agent.output_bytes import encode_outputs
from prism_agent.supervisor.protocol import Output, State
from prism_agent.supervisor.ring import Ring
from prism_common.errors import NotFoundError, SandboxGoneError


async def follow(
    execs: Execs, each: Exec, after_sequence: int, check: Callable[[], None]
) -> AsyncIterator[sandbox_pb2.ExecResponse | bytes]:
    """Yield an exec's output after a sequence number, encoded, then how it ended.

    The caller takes the next piece when the client has room for it; until then the exec may write
    as much as its ring holds, and not more. `check` is called whenever the exec has changed, and
    may raise.

    Raises:
        SandboxGoneError: The sandbox ended first: there is no exit status.
    """
    ring = each.open_ring()
    token = object()
    try:
        if ring is not None:
            async for outputs in _follow_ring(execs, each, ring, token, check):
                is_new = False
                for response in encode_outputs(outputs, after_sequence):
                    is_new = True
                    yield response
                if not is_new:
                    # Nobody is waited for while what the client has is passed over, and whoever has
                    # taken over the sandbox's own kernel can make that endless.
                    await asyncio.sleep(0)
        status = each.exit()
        if status is None and ring is None:
            raise NotFoundError("what came of the exec is no longer kept", field="exec_id")
        if status is None:
            raise SandboxGoneError("the sandbox ended before the exec did")
        yield sandbox_pb2.ExecResponse(exit=status)
    finally:
        execs.let_go(each, token)
        if ring is not None:
            ring.close()


async def _follow_ring(
    execs: Execs, each: Exec, ring: Ring, token: object, check: Callable[[], None]
) -> AsyncIterator[list[Output]]:
    """Yield what each read gives until the exec has ended and all that it wrote was yielded."""
    offset = ring.header().tail
    execs.hold(each, token, offset)
    while True:
        changed = each.changed
        check()
        outputs, offset = ring.read(offset)
        if outputs:
            yield outputs
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
        if each.lost or each.forgotten:
            # Its supervisor says no more of it.
            return
        execs.want_more(each, offset)
        await changed.wait()


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
    ring = each.open_ring()
    if ring is None:
        return
    each.log_readers += 1
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
        each.log_readers -= 1
        ring.close()


def _log_of(exec_id: str, output: Output) -> sandbox_pb2.StreamLogsResponse:
    response = sandbox_pb2.StreamLogsResponse(
        exec_id=exec_id,
        stream=sandbox_pb2.OutputStream.ValueType(output.stream),
        data=bytes(output.data),
    )
    response.time.FromNanoseconds(int(output.time_s * 1e9))
    return response
