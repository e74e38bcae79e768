"""What sandboxes use: asked of all their nodes at once, and how it is shown."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import Client, Deadline, list_sandboxes
from prism_cli.errors import CliError
from prism_cli.output import Column, plain, state_name
from prism_cli.quantities import format_cpu
from prism_cli.sandbox_views import disk_of, memory_of, node_of, processes_of

#: Measuring takes a node milliseconds; one that needs longer is shown as not answering.
_MEASURE_TIMEOUT_S: Final = 5.0
#: Calls under way at once on the one connection.
_IN_FLIGHT_MAX: Final = 64
#: Ids in one call: its bound is 1,000.
_IDS_MAX: Final = 1000
_HAVE_PROCESSES: Final = (pb.SANDBOX_STATE_READY, pb.SANDBOX_STATE_PAUSED)


@dataclass(frozen=True, slots=True)
class Measured:
    """One sandbox: what it uses, and between two measurements how much CPU."""

    sandbox: pb.Sandbox
    usage: pb.SandboxUsage | None
    cpu_millicores: int | None
    error: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.sandbox.name

    def as_data(self) -> dict[str, Any]:
        """Return what JSON and YAML show."""
        return {
            "name": self.sandbox.name,
            "id": self.sandbox.id,
            "node_name": node_of(self.sandbox),
            "state": state_name(self.sandbox.state),
            "cpu_millicores": self.cpu_millicores,
            "usage": None if self.usage is None else _data_of(self.usage),
            "error": self.error or None,
        }


def _data_of(usage: pb.SandboxUsage) -> dict[str, Any]:
    """Return a usage as data, in which a number that is not known is null."""
    data = plain(usage)
    for field in ("memory_bytes", "processes", "disk_bytes", "oom_kills"):
        if not usage.HasField(field):
            data[field] = None
    return data


def _show(value: Callable[[pb.SandboxUsage], str]) -> Callable[[Measured], str]:
    return lambda one: "-" if one.usage is None else value(one.usage)


def _cpu(one: Measured) -> str:
    if one.cpu_millicores is None:
        return "-"
    return f"{format_cpu(one.cpu_millicores)}/{format_cpu(one.sandbox.spec.limits.cpu_millicores)}"


COLUMNS: Final = (
    Column("NAME", lambda one: one.name),
    Column("STATE", lambda one: state_name(one.sandbox.state)),
    Column("NODE", lambda one: node_of(one.sandbox)),
    Column("CPU", _cpu),
    Column("MEMORY", _show(memory_of)),
    Column("DISK", _show(disk_of)),
    Column("PROCESSES", _show(processes_of)),
    Column("OOM KILLS", _show(lambda usage: str(usage.oom_kills or "-"))),
    Column("ERROR", lambda one: one.error),
)

_AMOUNT: Final[Mapping[str, Callable[[Measured], int]]] = {
    "cpu": lambda one: one.cpu_millicores or 0,
    "memory": lambda one: one.usage.memory_bytes if one.usage else 0,
    "disk": lambda one: one.usage.disk_bytes if one.usage else 0,
    "processes": lambda one: one.usage.processes if one.usage else 0,
    "name": lambda _: 0,
}


class Meter:
    """Measures the same sandboxes again and again.

    Args:
        client: To the control plane.
        names: Names or ids; empty: all that have processes.
        labels: Only those with all of these.
        sort: A key of `_AMOUNT`.
    """

    def __init__(
        self, client: Client, names: Sequence[str], labels: Mapping[str, str], sort: str
    ) -> None:
        self._client = client
        self._names = set(names)
        self._labels = labels
        self._amount = _AMOUNT[sort]
        #: What was measured last, by id.
        self._before: dict[str, pb.SandboxUsage] = {}
        self._missing: set[str] = set()

    def measure(self) -> list[Measured]:
        """Return them in order; CPU is known from the second time on."""
        sandboxes = self._list()
        usages, errors = self._ask(sandboxes)
        found = []
        for sandbox in sandboxes:
            usage = usages.get(sandbox.id)
            cpu = None if usage is None else _millicores(self._before.get(sandbox.id), usage)
            error = errors.get(sandbox.node_id, "")
            found.append(Measured(sandbox, usage, cpu, "" if usage is not None else error))
        self._before = usages
        found.sort(key=lambda one: (-self._amount(one), one.name))
        return found

    def raise_missing(self) -> None:
        """Raise CliError if one that was named has no processes."""
        if self._missing:
            listed = ", ".join(sorted(self._missing))
            raise CliError(f"no sandbox of this name is READY or PAUSED: {listed}")

    def _list(self) -> list[pb.Sandbox]:
        request = pb.ListSandboxesRequest(states=_HAVE_PROCESSES, label_selector=self._labels)
        sandboxes, _ = list_sandboxes(self._client, request)
        if not self._names:
            return sandboxes
        found = [one for one in sandboxes if {one.name, one.id} & self._names]
        self._missing = self._names - {text for one in found for text in (one.name, one.id)}
        return found

    def _ask(
        self, sandboxes: Sequence[pb.Sandbox]
    ) -> tuple[dict[str, pb.SandboxUsage], dict[str, str]]:
        """Return usages by sandbox, and by node why it did not answer."""
        by_node: dict[str, list[str]] = defaultdict(list)
        for sandbox in sandboxes:
            by_node[sandbox.node_id].append(sandbox.id)
        requests = [
            pb.MeasureSandboxesRequest(node=node, sandbox_ids=ids[first : first + _IDS_MAX])
            for node, ids in by_node.items()
            for first in range(0, len(ids), _IDS_MAX)
        ]
        usages: dict[str, pb.SandboxUsage] = {}
        errors: dict[str, str] = {}
        stubs = self._client.connect(Deadline(self._client.timeout_s))
        for first in range(0, len(requests), _IN_FLIGHT_MAX):
            group = requests[first : first + _IN_FLIGHT_MAX]
            calls = [
                stubs.sandboxes.MeasureSandboxes.future(one, timeout=_MEASURE_TIMEOUT_S)
                for one in group
            ]
            for request, call in zip(group, calls, strict=True):
                try:
                    usages |= {usage.sandbox_id: usage for usage in call.result().usages}
                except grpc.RpcError as error:
                    errors[request.node] = self._why(error)
        return usages, errors

    def _why(self, error: grpc.RpcError) -> str:
        failure = self._client.failure(error)
        if failure.status_code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"its node gives no answer within {_MEASURE_TIMEOUT_S:g} s"
        return failure.message


def _millicores(before: pb.SandboxUsage | None, now: pb.SandboxUsage) -> int | None:
    """Return how much CPU was used between two measurements, by the node's own clocks."""
    if before is None or not (before.HasField("cpu_time") and now.HasField("cpu_time")):
        return None
    elapsed_ns = now.measure_time.ToNanoseconds() - before.measure_time.ToNanoseconds()
    used_ns = now.cpu_time.ToNanoseconds() - before.cpu_time.ToNanoseconds()
    # Below 0 it was made anew meanwhile, or the node's clock was set.
    return round(1000 * used_ns / elapsed_ns) if elapsed_ns > 0 and used_ns >= 0 else None
