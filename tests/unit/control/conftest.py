"""A clock for the batcher, and a leader for agents' sessions."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from prism_control import batcher
from tests.unit.control.batching import Clock
from tests.unit.control.sessions import Control


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(batcher, "time", made)
    return made


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    async with asyncio.timeout(10):
        yield Control()
