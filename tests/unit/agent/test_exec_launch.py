"""An exec is handed over whole, or not at all."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_agent.exec_launch import launch
from prism_agent.exec_record import Exec, ExecRecord, digest_of
from prism_agent.output_room import OutputRoom
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Message


class _Supervisor(SupervisorClient):
    """One that is told nothing: what it would be told is kept."""

    def __init__(self) -> None:
        super().__init__(lambda _: None, lambda: None)
        self.sent: list[Message] = []

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self.sent.append(message)


def _exec(directory: Path, start: sandbox_pb2.ExecStart) -> Exec:
    record = ExecRecord(
        exec_id="ex-1", number=1, request_id="rq-1", digest=digest_of(start),
        argv=list(start.argv), start_time_s=0.0, oom_kills=0, stdin=start.stdin,
    )  # fmt: skip
    each = Exec(OutputRoom(directory), record)
    each.ring_bytes = 128 * 1024
    return each


def test_an_exec_that_lacks_a_descriptor_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its caller forgets it, and would run it again for the same request.
    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    start = sandbox_pb2.ExecStart(argv=["cat"], stdin=True)
    supervisor, each = _Supervisor(), _exec(tmp_path, start)
    with monkeypatch.context() as patch:
        patch.setattr("prism_agent.exec_launch.os.dup", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            launch(each, start, {}, supervisor, None)
    assert not supervisor.sent
    each.remove()
    launch(each, start, {}, supervisor, None)
    assert [message.exec_number for message in supervisor.sent] == [1]
    each.input.close()
