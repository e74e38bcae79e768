"""What a sandbox is given: its limits with the defaults, the sizes of its files, its names."""

from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.cgroups import CgroupLimits
from prism_common import limits
from prism_common.limits import MIB

#: Shown inside as /etc/hosts and /etc/hostname.
HOSTS: Final = "hosts"
HOSTNAME: Final = "hostname"


def limits_of(spec: sandbox_pb2.SandboxSpec) -> sandbox_pb2.Limits:
    """Return a sandbox's limits with the defaults filled in."""
    asked = spec.limits
    return sandbox_pb2.Limits(
        cpu_millicores=asked.cpu_millicores or limits.CPU_MILLICORES_DEFAULT,
        memory_bytes=asked.memory_bytes or limits.MEMORY_BYTES_DEFAULT,
        disk_bytes=asked.disk_bytes or limits.DISK_BYTES_DEFAULT,
        processes_max=asked.processes_max or limits.PROCESSES_DEFAULT,
        open_files_max=asked.open_files_max or limits.OPEN_FILES_DEFAULT,
    )


def small_bytes(asked: sandbox_pb2.Limits) -> int:
    """Return the size of /tmp, and of /dev/shm."""
    return min(asked.disk_bytes, max(MIB, asked.memory_bytes // 4))


def cgroup_limits(asked: sandbox_pb2.Limits) -> CgroupLimits:
    """Return what its cgroup is to hold it to."""
    return CgroupLimits(asked.memory_bytes, asked.processes_max, asked.cpu_millicores)


def names(name: str) -> dict[str, str]:
    """Return what the files below /etc say that hold a sandbox's name."""
    return {HOSTS: f"127.0.0.1 localhost {name}\n::1 localhost\n", HOSTNAME: f"{name}\n"}


def write_names(directory: Path, name: str) -> None:
    """Write /etc/hosts and /etc/hostname of a sandbox, in place."""
    for file, text in names(name).items():
        (directory / file).write_text(text)


def workspace_bytes(asked: sandbox_pb2.Limits) -> int:
    """Return the size of /workspace: its pages are memory of the sandbox, so never all of it."""
    return min(asked.disk_bytes, asked.memory_bytes // 2)
