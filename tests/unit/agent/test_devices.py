"""Network devices of the host, which others may remove at any moment."""

import shutil

import pytest

from prism_agent.network import devices


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_nothing_lies_behind_a_device_that_is_gone() -> None:
    assert devices.addresses_of("pr00000000none") == []
