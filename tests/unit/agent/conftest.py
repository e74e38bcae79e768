"""The supervisor under the sanitisers, built once."""

from pathlib import Path

import pytest

from tests.unit.agent.supervised import build_sanitised


@pytest.fixture(scope="session")
def sanitised(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return build_sanitised(tmp_path_factory.mktemp("sanitised"))
