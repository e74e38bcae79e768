"""What the node has, what is used, what is promised, and how well it would take one more."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
from prism.node.v1 import node_pb2

from prism_agent.sandboxes import Sandboxes
from prism_common import limits


@dataclass(frozen=True, slots=True)
class CapacityFlags:
    """What --cpu, --memory, --disk and --slots say; None: measure."""

    cpu_millicores: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    slots: int | None = None


#: The rest is left to the agent, the control plane and the system when nothing is said.
_MEMORY_SHARE = 0.8
_DISK_SHARE = 0.8
#: Processor time is lent and taken back, unlike memory, and a sandbox mostly waits for its user: so
#: much is offered for each core that is there. A sandbox's own limit still holds.
_CPU_OVERCOMMIT = 8


def capacity(flags: CapacityFlags, data_dir: Path) -> node_pb2.ResourceAmounts:
    """Return what the node offers to sandboxes."""
    total = measure_total(data_dir)
    memory_bytes = flags.memory_bytes or int(total.memory_bytes * _MEMORY_SHARE)
    # A sandbox of the smallest size is the least that a slot can be.
    slots = flags.slots or max(1, min(memory_bytes // limits.MEMORY_BYTES_MIN, 4096))
    return node_pb2.ResourceAmounts(
        cpu_millicores=flags.cpu_millicores or total.cpu_millicores * _CPU_OVERCOMMIT,
        memory_bytes=memory_bytes,
        disk_bytes=flags.disk_bytes or int(psutil.disk_usage(str(data_dir)).free * _DISK_SHARE),
        slots=slots,
    )


def measure_total(data_dir: Path) -> node_pb2.ResourceAmounts:
    """Return what the machine has."""
    return node_pb2.ResourceAmounts(
        cpu_millicores=_cores() * 1000,
        memory_bytes=psutil.virtual_memory().total,
        disk_bytes=psutil.disk_usage(str(data_dir)).total,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class Resources:
    """Measures one node.

    Args:
        node_id: The node.
        name: Its name.
        data_dir: Whose file system counts.
        offered: What is offered to sandboxes.
        runtimes: How they were found at the start.
        sandboxes: Knows what is promised.
    """

    def __init__(
        self,
        node_id: str,
        name: str,
        data_dir: Path,
        offered: node_pb2.ResourceAmounts,
        runtimes: list[node_pb2.RuntimeStatus],
        sandboxes: Sandboxes,
    ) -> None:
        self.node_id = node_id
        self.name = name
        self._data_dir = data_dir
        self._offered = offered
        self._runtimes = runtimes
        self._sandboxes = sandboxes
        # The first measurement is of the time since the process began: throw it away.
        psutil.cpu_percent(interval=None)

    def allocated(self) -> node_pb2.ResourceAmounts:
        """Return what is promised to live sandboxes."""
        amounts = node_pb2.ResourceAmounts()
        for _, spec in self._sandboxes.live():
            amounts.cpu_millicores += spec.limits.cpu_millicores or limits.CPU_MILLICORES_DEFAULT
            amounts.memory_bytes += spec.limits.memory_bytes or limits.MEMORY_BYTES_DEFAULT
            amounts.disk_bytes += spec.limits.disk_bytes or limits.DISK_BYTES_DEFAULT
            amounts.slots += 1
        return amounts

    def used(self) -> node_pb2.ResourceAmounts:
        """Return what is used on the machine, by anyone."""
        memory = psutil.virtual_memory()
        return node_pb2.ResourceAmounts(
            cpu_millicores=int(psutil.cpu_percent(interval=None) * 10 * _cores()),
            memory_bytes=memory.total - memory.available,
            disk_bytes=psutil.disk_usage(str(self._data_dir)).used,
            slots=len(self._sandboxes.live()),
        )

    def load(self) -> tuple[node_pb2.ResourceAmounts, float]:
        """Return what is used, and the load per core, for a heartbeat."""
        return self.used(), psutil.getloadavg()[0] / _cores()

    def measure(self) -> node_pb2.GetResourcesResponse:
        """Return all of it, measured now."""
        total, used, allocated = measure_total(self._data_dir), self.used(), self.allocated()
        response = node_pb2.GetResourcesResponse(
            node_id=self.node_id,
            node_name=self.name,
            total=total,
            used=used,
            capacity=self._offered,
            allocated=allocated,
            load_average=psutil.getloadavg(),
            runtimes=self._runtimes,
            score=score(total, used, self._offered, allocated, psutil.getloadavg()[0] / _cores()),
        )
        response.measure_time.GetCurrentTime()
        return response


def score(
    total: node_pb2.ResourceAmounts,
    used: node_pb2.ResourceAmounts,
    offered: node_pb2.ResourceAmounts,
    allocated: node_pb2.ResourceAmounts,
    load_per_core: float,
) -> float:
    """Return 0 to 100: how well the node would take one more sandbox.

    CPU 30 %, memory 40 %, disk 20 %, load 10 %. Of each, the scarcer counts: what is not promised,
    or what is not used. A node without a free slot scores 0.
    """
    if allocated.slots >= offered.slots:
        return 0.0
    cpu = min(
        _free(allocated.cpu_millicores, offered.cpu_millicores),
        _free(used.cpu_millicores, total.cpu_millicores),
    )
    memory = min(
        _free(allocated.memory_bytes, offered.memory_bytes),
        _free(used.memory_bytes, total.memory_bytes),
    )
    disk = min(
        _free(allocated.disk_bytes, offered.disk_bytes),
        _free(used.disk_bytes, total.disk_bytes),
    )
    load = max(0.0, 1.0 - load_per_core)
    return round(100 * (0.3 * cpu + 0.4 * memory + 0.2 * disk + 0.1 * load), 1)


def _free(taken: int, whole: int) -> float:
    return max(0.0, 1.0 - taken / whole) if whole > 0 else 0.0
