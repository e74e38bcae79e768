"""Following an exec whose ring whoever has taken over its sandbox's own kernel has written."""

import asyncio
import os
import struct
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2
from prometheus_client import CollectorRegistry

from prism_agent.exec_record import Exec, ExecRecord
from prism_agent.exec_streams import follow
from prism_agent.execs import Execs
from prism_agent.metrics import AgentMetrics
from prism_agent.output_room import OutputRoom
from prism_agent.supervisor.protocol import MAGIC, RING_HEADER_BYTES, State
from prism_agent.supervisor.ring import Ring

_HEADER = struct.Struct("=QIIQQQQQQQiiiiiiQ")
_RECORD = struct.Struct("=IIQQ")


async def test_output_without_end_and_without_bytes_does_not_hold_the_loop_up(
    tmp_path: Path,
) -> None:
    execs = Execs(
        tmp_path, sandbox_pb2.SandboxSpec(), lambda: 0, lambda: None,
        AgentMetrics(CollectorRegistry()),
    )  # fmt: skip
    execs.directory.mkdir()
    record = ExecRecord(
        exec_id="ex-1", number=1, request_id="rq-1", digest="", argv=["true"],
        start_time_s=0.0, oom_kills=0, stdin=False,
    )  # fmt: skip
    each = Exec(OutputRoom(execs.directory), record)
    capacity = 1000 * _RECORD.size
    ring = Ring.create(each.ring_path, capacity)
    numbers = (2, MAGIC, State.RUNNING, capacity, 1 << 62, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
    os.pwrite(ring.fileno(), _HEADER.pack(*numbers), 0)
    os.pwrite(ring.fileno(), _RECORD.pack(0, 1, 0, 0) * 1000, RING_HEADER_BYTES)
    ring.close()

    async def read_all() -> list[sandbox_pb2.ExecResponse | bytes]:
        return [response async for response in follow(execs, each, 0, lambda: None)]

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read_all(), 0.2)
    execs.detach()
