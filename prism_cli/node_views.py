"""How a node is shown: columns, facts, and measurements of all nodes at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
from prism.node.v1 import node_pb2 as pb

from prism_cli.client import Client, Stubs
from prism_cli.output import Column, age, enum_name, when
from prism_cli.quantities import format_bytes, format_cpu
from prism_cli.sandbox_views import runtime_name

#: Measuring takes an agent milliseconds; one that needs longer is shown as not answering.
_MEASURE_TIMEOUT_S: Final = 5.0
#: Calls under way at once on the one connection.
_IN_FLIGHT_MAX: Final = 64


def state_of(node: pb.Node) -> str:
    """Return what the control plane thinks of it."""
    state = enum_name(pb.NodeState.DESCRIPTOR, node.state)
    return f"{state},CORDONED" if node.cordoned else state


def _promised(kind: str, show: Callable[[int], str]) -> Callable[[pb.Node], str]:
    def value(node: pb.Node) -> str:
        return f"{show(getattr(node.allocated, kind))}/{show(getattr(node.capacity, kind))}"

    return value


def _runtimes(node: pb.Node) -> str:
    return ", ".join(runtime_name(one.name) for one in node.runtimes if one.ready) or "none ready"


COLUMNS: Final = (
    Column("NAME", lambda node: node.name),
    Column("STATE", state_of),
    Column("SANDBOXES", lambda node: str(node.sandboxes)),
    Column("CPU", _promised("cpu_millicores", format_cpu)),
    Column("MEMORY", _promised("memory_bytes", format_bytes)),
    Column("DISK", _promised("disk_bytes", format_bytes)),
    Column("RUNTIMES", _runtimes),
    Column("SEEN", lambda node: age(node.last_seen_time)),
    Column("VERSION", lambda node: node.version),
)


def facts(node: pb.Node) -> list[tuple[str, str]]:
    """Return what `node info` says, as lines with titles."""
    lines = [
        ("Name", node.name),
        ("Id", node.id),
        ("State", state_of(node)),
        ("Last seen", when(node.last_seen_time)),
        ("Address", node.address),
        ("Version", node.version),
        ("Registered", when(node.create_time)),
        ("Sandboxes", f"{node.sandboxes} of {node.capacity.slots}"),
        ("CPU", f"{_promised('cpu_millicores', format_cpu)(node)} cores promised"),
        ("Memory", f"{_promised('memory_bytes', format_bytes)(node)} promised"),
        ("Disk", f"{_promised('disk_bytes', format_bytes)(node)} promised"),
    ]
    for position, one in enumerate(node.runtimes):
        words = f"{runtime_name(one.name)} {one.version}".rstrip()
        words += " ready" if one.ready else " not ready"
        words += f": {one.message}" if one.message else ""
        lines.append(("" if position else "Runtimes", words))
    if node.HasField("egress"):
        lines.append(("Networks", "ready" if node.egress.ready else f"none: {node.egress.message}"))
    for position, key in enumerate(sorted(node.labels)):
        lines.append(("" if position else "Labels", f"{key}={node.labels[key]}"))
    return lines


def health_facts(health: pb.GetHealthResponse) -> list[tuple[str, str]]:
    """Return the overall health and each check."""
    lines = [("Health", enum_name(pb.HealthStatus.DESCRIPTOR, health.status))]
    for check in health.checks:
        status = enum_name(pb.HealthStatus.DESCRIPTOR, check.status)
        words = f"{status} {check.name}"
        lines.append(("", f"{words}: {check.message}" if check.message else words))
    return lines


# ── Measurements ─────────────────────────────────────────────────────────────────────────────


def ask_all(
    client: Client, stubs: Stubs, nodes: Sequence[pb.Node]
) -> Iterator[tuple[pb.Node, pb.GetResourcesResponse | str]]:
    """Yield each node with what it has, or with why it did not answer."""
    for first in range(0, len(nodes), _IN_FLIGHT_MAX):
        group = nodes[first : first + _IN_FLIGHT_MAX]
        calls = [
            stubs.nodes.GetResources.future(
                pb.GetResourcesRequest(node=node.id), timeout=_MEASURE_TIMEOUT_S
            )
            for node in group
        ]
        for node, call in zip(group, calls, strict=True):
            try:
                yield node, call.result()
            except grpc.RpcError as error:
                yield node, client.failure(error).message


def _used(kind: str, show: Callable[[int], str]) -> Callable[[dict[str, Any]], str]:
    def value(measured: dict[str, Any]) -> str:
        used, total = measured.get("used"), measured.get("total")
        if not used or not total or not total[kind]:
            return "-"
        share = 100 * used[kind] / total[kind]
        return f"{show(used[kind])}/{show(total[kind])} ({share:.0f}%)"

    return value


def _load(measured: dict[str, Any]) -> str:
    return " ".join(f"{load:.2f}" for load in measured.get("load_average", ()))


TOP_COLUMNS: Final = (
    Column("NODE", lambda measured: measured["node_name"]),
    Column("CPU", _used("cpu_millicores", format_cpu)),
    Column("MEMORY", _used("memory_bytes", format_bytes)),
    Column("DISK", _used("disk_bytes", format_bytes)),
    Column(
        "SANDBOXES",
        lambda measured: str(measured["used"]["slots"]) if measured.get("used") else "-",
    ),
    Column("LOAD", _load),
    Column("SCORE", lambda measured: f"{measured['score']:.0f}" if "score" in measured else "-"),
    Column("ERROR", lambda measured: measured["error"] or ""),
)
