"""A short run of the random kills; `random_kills.py` is for the long ones."""

from pathlib import Path

import pytest

from tests.integration.agent.random_kills import run_kills


@pytest.mark.timeout(240)
async def test_random_kills_leave_nothing(needs_sandboxes: None, tmp_path: Path) -> None:
    figures = await run_kills(tmp_path, kills=16, seed=3)
    assert figures.kills >= 16
    assert figures.agent_kills
    assert figures.supervisor_kills
    assert figures.execs
