"""The supervisor survives whatever is said to it, under the address and the undefined sanitiser."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from prism_agent.supervisor import protocol
from prism_agent.supervisor.protocol import Message, Request
from prism_agent.supervisor.ring import Ring
from tests.unit.agent.supervised import Supervised
from tests.unit.agent.supervisor_fuzz import fuzz

_DURATION_S = 3.0
_LEAST = 100


@pytest.fixture
def program(sanitised: Path | None) -> Path:
    if shutil.which("bwrap") is None:
        pytest.skip("needs bwrap")
    if sanitised is None:
        pytest.skip("the compiler has no sanitisers")
    return sanitised


async def test_random_requests_end_and_leak_nothing(tmp_path: Path, program: Path) -> None:
    supervised = Supervised(tmp_path, program)
    try:
        done = await asyncio.to_thread(fuzz, supervised, 20, 10_000, _DURATION_S)
        await supervised.client.connect(supervised.socket_path)
        # It may have been told to let nothing through, and to open no files.
        supervised.client.send(Message(Request.LIMITS, 0, 256, 0))
        header, output = await supervised.run(1, ["echo", "alive"])
        assert (header.exit_code, output) == (0, b"alive\n")
    finally:
        said = supervised.end()
    assert said == ""
    assert done >= _LEAST


async def test_a_ring_smaller_than_one_record_is_refused(tmp_path: Path, program: Path) -> None:
    """Else a record of 64 KiB overwrites its own beginning, and readers find nonsense."""
    supervised = Supervised(tmp_path, program)
    try:
        await supervised.client.connect(supervised.socket_path)
        ring = Ring.create(tmp_path / "small.ring", 64 * 1024)
        spec = os.memfd_create("spec")
        os.write(spec, protocol.encode_spec("/", ["true"], {"PATH": "/usr/bin:/bin"}))
        supervised.client.send(Message(Request.EXEC, 2), [spec, ring.fileno()])
        os.close(spec)
        ring.close()
        assert (await supervised.error()).a == 74  # EBADMSG
    finally:
        assert supervised.end() == ""
