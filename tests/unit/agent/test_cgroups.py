"""Cgroups on trees of plain files: what is written where, for both versions."""

import errno
import shutil
from pathlib import Path

import pytest

from prism_agent import cgroups
from prism_agent.cgroup_mounts import CONTROLLERS, CgroupMounts, read_mounts
from prism_agent.cgroups import CgroupLimits, CgroupsV1, CgroupsV2

LIMITS = CgroupLimits(memory_bytes=64 << 20, processes_max=10, cpu_millicores=500)

V1 = """25 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
33 25 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_mounts_of_version_1_and_2_are_told_apart() -> None:
    mounts = read_mounts(V1, "9:memory:/x\n0::/user.slice\n")
    assert mounts.v1 == {
        "memory": Path("/sys/fs/cgroup/memory"),
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "pids": Path("/sys/fs/cgroup/pids"),
    }
    assert mounts.v2 == Path("/sys/fs/cgroup/unified")
    assert mounts.own_v2 == "/user.slice"


def tree_v2(root: Path, controllers: str = "cpuset cpu io memory pids") -> CgroupMounts:
    """A fake of the unified mount: files where the kernel would have them."""
    for path in (root, root / "prism", root / "prism" / "node"):
        path.mkdir(exist_ok=True)
        (path / "cgroup.subtree_control").write_text("")
        (path / "cgroup.controllers").write_text(controllers)
    return CgroupMounts({}, root)


def test_version_2_writes_every_limit(tmp_path: Path) -> None:
    groups, problem = cgroups.find(tree_v2(tmp_path), "node")
    assert problem == ""
    assert isinstance(groups, CgroupsV2)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    group = tmp_path / "prism" / "node" / "sb"
    group.mkdir()
    (group / "memory.swap.max").write_text("max")
    groups.create("sb", LIMITS)
    written = {path.name: path.read_text() for path in group.iterdir()}
    assert written == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "pids.max": "12",
        "cpu.max": "50000 100000",
    }


def test_version_2_reads_usage(tmp_path: Path) -> None:
    groups, _ = cgroups.find(tree_v2(tmp_path), "node")
    assert groups is not None
    group = tmp_path / "prism" / "node" / "sb"
    group.mkdir()
    (group / "memory.current").write_text("4096\n")
    (group / "pids.current").write_text("3\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n")
    (group / "cpu.stat").write_text("usage_usec 25\nuser_usec 20\n")
    (group / "memory.max").write_text("8192\n")
    assert groups.usage("sb") == cgroups.CgroupUsage(4096, 3, 1, 25_000, 8192)
    (group.parent / "memory.current").write_text("5000\n")
    (group.parent / "memory.events").write_text("oom_kill 6\n")
    (group.parent / "cpu.stat").write_text("usage_usec 30\n")
    assert groups.total() == cgroups.CgroupUsage(5000, 0, 6, 30_000)
    assert groups.usage("none") == cgroups.CgroupUsage()
    assert groups.names() == {"sb"}
    assert list(groups.procs_files("sb")) == [group / "cgroup.procs"]


def test_version_2_without_the_controllers_is_not_taken(tmp_path: Path) -> None:
    groups, problem = cgroups.find(tree_v2(tmp_path, "cpuset io"), "node")
    assert groups is None
    assert "no memory controller" in problem


def test_version_1_writes_every_limit(tmp_path: Path) -> None:
    mounts = {name: tmp_path / name for name in CONTROLLERS}
    groups = CgroupsV1(mounts, "node")
    (tmp_path / "memory/prism/node/sb").mkdir(parents=True)
    groups.create("sb", LIMITS)
    assert (tmp_path / "memory/prism/node/sb/memory.limit_in_bytes").read_text() == str(64 << 20)
    assert (tmp_path / "pids/prism/node/sb/pids.max").read_text() == "12"
    assert (tmp_path / "cpu/prism/node/sb/cpu.cfs_quota_us").read_text() == "50000"
    (tmp_path / "memory/prism/node/sb/memory.oom_control").write_text("under_oom 0\noom_kill 4\n")
    assert groups.usage("sb").oom_kills == 4


def test_version_1_counts_all_sandboxes_also_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = CgroupsV1({name: tmp_path / name for name in (*CONTROLLERS, "cpuacct")}, "node")
    (tmp_path / "cpuacct/prism/node").mkdir(parents=True)
    (tmp_path / "cpuacct/prism/node/cpuacct.usage").write_text("7000\n")
    for name, kills in (("a", 2), ("b", 3)):
        groups.create(name, LIMITS)
        (tmp_path / f"memory/prism/node/{name}/memory.oom_control").write_text(f"oom_kill {kills}")
        (tmp_path / f"cpuacct/prism/node/{name}/cpuacct.usage").write_text("500\n")
    (tmp_path / "memory/prism/node/memory.usage_in_bytes").write_text("4096\n")
    assert groups.total() == cgroups.CgroupUsage(memory_bytes=4096, oom_kills=5, cpu_ns=7000)
    usage = groups.usage("a")
    assert (usage.cpu_ns, usage.memory_limit_bytes) == (500, 64 << 20)
    monkeypatch.setattr(cgroups, "_remove_directory", shutil.rmtree)  # the kernel's have no files
    groups.remove("a")
    assert (groups.names(), groups.total().oom_kills) == ({"b"}, 5)


def test_version_1_changes_both_memory_limits_in_the_order_that_the_kernel_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = CgroupsV1({name: tmp_path / name for name in CONTROLLERS}, "node")
    groups.create("sb", LIMITS)
    memory = tmp_path / "memory/prism/node/sb"
    (memory / "memory.memsw.limit_in_bytes").write_text(str(64 << 20))
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(cgroups, "_write", lambda path, text: written.append((path.name, text)))
    for size in (128 << 20, 32 << 20):
        written.clear()
        groups.limit("sb", CgroupLimits(size, 10, 500))
        names = [name for name, text in written if text == str(size)]
        both = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        assert names == (both if size < 64 << 20 else both[::-1])


def test_version_1_says_that_memory_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = CgroupsV1({name: tmp_path / name for name in CONTROLLERS}, "node")

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(cgroups, "_write", refuse)
    with pytest.raises(OSError, match="it uses more memory than 64 MiB"):
        groups.limit("sb", LIMITS)


def test_version_1_freezes_by_its_own_controller(tmp_path: Path) -> None:
    mounts = {name: tmp_path / name for name in (*CONTROLLERS, "freezer")}
    groups = CgroupsV1(mounts, "node")
    state = tmp_path / "freezer/prism/node/sb/freezer.state"
    groups.create("sb", LIMITS)
    state.write_text("THAWED")
    groups.freeze("sb")
    assert state.read_text() == "FROZEN"
    groups.create("sb", LIMITS)
    assert state.read_text() == "THAWED"
    assert str(state.parent / "tasks") in map(str, groups.procs_files("sb"))


def test_version_1_without_a_freezer_says_so(tmp_path: Path) -> None:
    groups = CgroupsV1({name: tmp_path / name for name in CONTROLLERS}, "node")
    groups.create("sb", LIMITS)
    with pytest.raises(OSError, match="no freezer"):
        groups.freeze("sb")
    groups.thaw("sb")


def test_version_2_thaws_what_does_not_freeze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, _ = cgroups.find(tree_v2(tmp_path), "node")
    assert groups is not None
    group = tmp_path / "prism" / "node" / "sb"
    group.mkdir()
    (group / "cgroup.freeze").write_text("0")
    (group / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    groups.freeze("sb")
    assert (group / "cgroup.freeze").read_text() == "1"
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    monkeypatch.setattr(cgroups, "_FREEZE_TIMEOUT_S", 0.01)
    with pytest.raises(OSError, match="do not freeze"):
        groups.freeze("sb")
    assert (group / "cgroup.freeze").read_text() == "0"


def test_nothing_usable_says_what_is_missing(tmp_path: Path) -> None:
    groups, problem = cgroups.find(CgroupMounts({}, None), "node")
    assert groups is None
    assert "run as root" in problem


@pytest.mark.parametrize("line", ["", "garbage", "1 2 3 4", "1 2 3 4 / rw - cgroup"])
def test_malformed_mountinfo_is_skipped(line: str) -> None:
    assert read_mounts(line, "") == CgroupMounts({}, None)
