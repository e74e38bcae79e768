"""The mount namespace that starts are made from."""

import os
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from prism_agent.runtime import host
from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.runtime.mount_namespace import MountNamespace, needless

MOUNTINFO = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw - proc proc rw
23 22 0:6 / /proc/sys/fs/binfmt_misc rw - binfmt_misc none rw
24 21 8:2 / /usr/local rw - ext4 /dev/sda2 rw
25 21 8:3 / /home rw - ext4 /dev/sda3 rw
26 25 8:4 / /home/a\\040b rw - ext4 /dev/sda4 rw
27 21 8:5 / /usrx rw - ext4 /dev/sda5 rw
28 21 8:6 / /opt rw - ext4 /dev/sda6 rw
29 21 0:9 / /home/ü rw - tmpfs prism rw
"""


def test_what_holds_or_is_in_a_needed_path_stays() -> None:
    needed = [PurePosixPath(each) for each in ("/usr", "/proc", "/opt/tools/bwrap")]
    assert needless(MOUNTINFO, needed) == ["/home/ü", "/usrx", "/home/a b", "/home"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
def test_it_has_no_files_of_sandboxes(tmp_path: Path) -> None:
    files = tmp_path / "a sandbox's"
    files.mkdir()
    host.mount_tmpfs(files, 1 << 20, 12345)
    try:
        namespace = MountNamespace(SUPERVISOR, Path(shutil.which("bwrap") or ""))
        number = namespace.descriptor
        mounts = subprocess.run(
            ["nsenter", f"--mount=/proc/self/fd/{number}", "cat", "/proc/self/mountinfo"],
            pass_fds=[number], capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        namespace.close()
        points = [line.split()[4] for line in mounts.splitlines()]
        assert "/proc" in points
        assert str(files).replace(" ", "\\040") not in points
        # Ours is as it was.
        assert os.path.ismount(files)
    finally:
        host.unmount(files)


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match="no such luck"):
        MountNamespace(program, Path("/usr/bin/bwrap"))
