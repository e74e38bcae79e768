"""Connections to ports that are still being made when their sandbox ends."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from prism_agent.network.relayed import Relayed
from prism_agent.runtime.base import Shared
from prism_common.errors import SandboxGoneError


async def test_who_waits_for_a_connection_is_told_at_once_that_the_sandbox_ends(
    tmp_path: Path,
) -> None:
    asked: list[tuple[int, int]] = []

    def ask(number: int, port: int) -> None:
        """Take what is asked, and never connect."""
        asked.append((number, port))
        asyncio.get_running_loop().call_soon(forward.end)

    forward = Relayed(
        Shared(tmp_path, 0), 7, ask, lambda _: None, contextlib.nullcontext()
    )  # fmt: skip
    # Sooner than it would be given up.
    async with asyncio.timeout(4), forward:
        with pytest.raises(SandboxGoneError):
            await forward.connect(8000)
        # One that begins only then does not even ask.
        with pytest.raises(SandboxGoneError):
            await forward.connect(8000)
    assert asked == [(7, 8000)]
    assert os.listdir(tmp_path) == []
