"""What lies in the directory that an agent shares with a sandbox's own kernel."""

import errno
import os
from pathlib import Path

import pytest

from prism_agent.runtime import host
from prism_agent.runtime.base import Shared
from prism_agent.shared_files import SharedFiles


def _shared(directory: Path) -> SharedFiles:
    return SharedFiles(Shared(directory, os.geteuid()), directory)


def test_what_an_earlier_agent_has_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in ("1.spec", "1.ring", "2.in", "3.port", "control", "other.spec"):
        (tmp_path / name).touch()
    _shared(tmp_path).sweep()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["control", "other.spec"]


def test_sweep_ends_however_much_lies_there(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number}.spec").touch()
    _shared(tmp_path).sweep()
    assert len(list(tmp_path.iterdir())) == 5000 - 4096


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_an_exec_that_has_no_room_takes_none(tmp_path: Path) -> None:
    host.mount_tmpfs(tmp_path, 64 * 1024, 0)
    try:
        with pytest.raises(OSError, match="No space left") as failed:
            _shared(tmp_path).put(1, bytes(1 << 20), with_input=False)
        assert failed.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []
    finally:
        host.unmount(tmp_path)
