"""Cgroups of version 2 on the kernel's own tree, with what of it is there on any machine.

Memory, processes and processor time are most often controllers of the one version that the machine
uses. Freezing, killing, accounting, and how a tree is handed on, are not: they are the tree's own.
So they are tried wherever one is mounted; `test_cgroups.py` has the rest, on plain files.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

from prism_agent import cgroups
from prism_agent.cgroup_mounts import read_mounts
from prism_agent.cgroups import CgroupsV2

#: A controller that version 1 seldom has, and that may come and go without harm.
_SPARE: Final = "hugetlb"
#: An agent of a plain user, in a cgroup that is its own: prints where it finds its sandboxes'.
_DELEGATED: Final = f"""
import encodings.ascii, os, sys
from pathlib import Path
from prism_agent import cgroups
from prism_agent.cgroup_mounts import CgroupMounts
cgroups.CONTROLLERS = ({_SPARE!r},)
root, own = Path(sys.argv[1]), sys.argv[2]
(root / own / "cgroup.procs").write_text("0")
os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)
groups = cgroups._find_v2(CgroupMounts({{}}, root, "/" + own), "node")
made = root / own / "prism" / "node" / "sb"
made.mkdir()
print(made.joinpath("cgroup.controllers").read_text().strip())
print(Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip())
print(sorted(groups.names()))
groups.remove("sb")
groups.close()
"""


@pytest.fixture
def tree() -> Iterator[Path]:
    """The root of the kernel's tree, where this test may make cgroups."""
    mountinfo = Path("/proc/self/mountinfo").read_text()
    root = read_mounts(mountinfo, "").v2
    if root is None:
        pytest.skip("no cgroup v2 is mounted")
    probe = root / f"prism-test-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError as error:
        pytest.skip(f"cgroup v2 is not ours to use: {error.strerror}")
    try:
        yield probe
    finally:
        for path in sorted((each for each in probe.rglob("*") if each.is_dir()), reverse=True):
            path.rmdir()
        probe.rmdir()


@pytest.fixture
def group(tree: Path) -> Iterator[CgroupsV2]:
    """Cgroups of an agent, with one sandbox's, "sb"."""
    (tree / "sb").mkdir()
    groups = CgroupsV2(tree)
    yield groups
    groups.remove("sb")


def _spawn(groups: CgroupsV2, program: str) -> "subprocess.Popen[bytes]":
    """Run a program that has entered the sandbox's cgroup as a launcher does; it says "up"."""
    (file,) = groups.procs_files("sb")
    script = f"echo 0 > {file} && echo up && {program}"
    child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


def test_what_is_frozen_does_not_run_and_goes_on_when_thawed(group: CgroupsV2) -> None:
    with _spawn(group, "while :; do :; done") as child:
        assert child.pid in group.pids("sb")
        group.freeze("sb")
        process = psutil.Process(child.pid)
        before = sum(process.cpu_times()[:2])
        used = group.usage("sb").cpu_ns
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        # A clock tick that was under way may be counted late.
        assert sum(process.cpu_times()[:2]) - before <= 0.02
        group.thaw("sb")
        while sum(process.cpu_times()[:2]) - before < 0.1:
            assert child.poll() is None
        assert used is not None
        assert (group.usage("sb").cpu_ns or 0) > used
        group.kill("sb")
        assert child.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("frozen", [False, True])
def test_kill_ends_all_also_what_forks_or_is_frozen(group: CgroupsV2, frozen: bool) -> None:
    # Four that are replaced all the time, each by a child of its own.
    fork = "f() { sleep 0.01; f & }; sleep 100 & sleep 100 & f & f & f & f & sleep 100; wait"
    with _spawn(group, fork) as child:
        while len(group.pids("sb")) < 8:
            assert child.poll() is None
        if frozen:
            group.freeze("sb")
        group.kill("sb")
        assert group.pids("sb") == set()
        assert child.wait(5) == -signal.SIGKILL
    group.remove("sb")
    assert group.names() == set()


def test_a_delegated_cgroup_is_handed_on_below_a_leaf_of_the_agents_own(tree: Path) -> None:
    root = tree.parent
    control = root / "cgroup.subtree_control"
    if _SPARE not in (root / "cgroup.controllers").read_text().split():
        pytest.skip(f"cgroup v2 has no controller to spare: {_SPARE}")
    if os.geteuid() != 0 or _SPARE in control.read_text().split():
        pytest.skip(f"{_SPARE} is not ours to turn on")
    control.write_text(f"+{_SPARE}")
    try:
        for path in (tree, tree / "cgroup.procs", tree / "cgroup.subtree_control"):
            os.chown(path, 65_534, 65_534)
        argv = [sys.executable, "-c", _DELEGATED, str(root), tree.name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines() == [_SPARE, f"/{tree.name}/prism-agent", "['sb']"], done
        # It ends tidily: nothing but the leaf that it was in.
        assert [each.name for each in tree.iterdir() if each.is_dir()] == ["prism-agent"]
        cgroups._remove_directory(tree / "prism-agent")
        (tree / "cgroup.subtree_control").write_text(f"-{_SPARE}")
    finally:
        control.write_text(f"-{_SPARE}")
