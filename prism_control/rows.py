"""Rows of the state to protos."""

import functools
from typing import Final

from google.protobuf import duration_pb2, timestamp_pb2
from prism.node.v1 import node_pb2
from prism.sandbox.v1 import sandbox_pb2

from prism_control.state.model import (
    EGRESS_LABEL,
    EGRESS_READY,
    Amounts,
    Egress,
    EgressRow,
    NodeRow,
    Pairs,
    RuntimeRow,
    SandboxRow,
    Spec,
    pairs,
)

#: Sandboxes are mostly made of a few specs, and building a proto costs ten times encoding it.
_SPECS_MAX: Final = 256
_WHY_NOT_LENGTH_MAX: Final = 200


def timestamp(ms: int) -> timestamp_pb2.Timestamp | None:
    """Return a time in milliseconds since 1970 as a proto; None for 0, which is "not yet"."""
    if not ms:
        return None
    return timestamp_pb2.Timestamp(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


def duration(ms: int) -> duration_pb2.Duration | None:
    """Return a length of time in milliseconds as a proto; None for 0, which is "none"."""
    if not ms:
        return None
    return duration_pb2.Duration(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


@functools.lru_cache(maxsize=_SPECS_MAX)
def spec_proto(spec: Spec) -> sandbox_pb2.SandboxSpec:
    """Return the proto of a spec. It is shared: never change it."""
    return sandbox_pb2.SandboxSpec(
        image=spec.image,
        limits=sandbox_pb2.Limits(
            cpu_millicores=spec.cpu_millicores,
            memory_bytes=spec.memory_bytes,
            disk_bytes=spec.disk_bytes,
            processes_max=spec.processes_max,
            open_files_max=spec.open_files_max,
            output_bytes_per_second=spec.output_bytes_per_second,
        ),
        env=dict(spec.env),
        labels=dict(spec.labels),
        ttl=duration(spec.ttl_ms),
        idle_timeout=duration(spec.idle_timeout_ms),
        runtime=spec.runtime,
        on_node_loss=sandbox_pb2.OnNodeLoss.ValueType(spec.on_node_loss),
        priority=spec.priority,
        node_selector=dict(spec.node_selector),
        network=None if spec.egress is None else _network_proto(spec.egress),
    )


def _network_proto(egress: Egress) -> sandbox_pb2.Network:
    return sandbox_pb2.Network(
        mode=sandbox_pb2.NETWORK_MODE_EGRESS,
        rules=[
            sandbox_pb2.EgressRule(cidr=row.target, ports=_ports(row), protocol=_protocol(row))
            for row in egress.rules
        ],
        names=[
            sandbox_pb2.EgressName(name=row.target, ports=_ports(row), protocol=_protocol(row))
            for row in egress.names
        ],
    )


def _ports(row: EgressRow) -> list[sandbox_pb2.PortRange]:
    return [sandbox_pb2.PortRange(first=first, last=last) for first, last in row.ports]


def _protocol(row: EgressRow) -> sandbox_pb2.TransportProtocol.ValueType:
    return sandbox_pb2.TransportProtocol.ValueType(row.protocol)


def sandbox_proto(row: SandboxRow) -> sandbox_pb2.Sandbox:
    """Return the proto of a sandbox. What is not there is not set: most rows are young."""
    proto = sandbox_pb2.Sandbox(
        id=row.id,
        name=row.name,
        spec=spec_proto(row.spec),
        state=sandbox_pb2.SandboxState.ValueType(row.state),
        generation=row.generation,
        revision=row.revision,
        create_time=timestamp(row.create_ms),
    )
    if row.node_id:
        proto.node_id, proto.node_name = row.node_id, row.node_name
    if row.runtime:
        proto.runtime = row.runtime
    if row.reason:
        proto.reason = row.reason
    if row.message:
        proto.message = row.message
    for name, ms in (
        ("schedule_time", row.schedule_ms),
        ("ready_time", row.ready_ms),
        ("end_time", row.end_ms),
        ("expire_time", row.expire_ms),
        ("last_seen_time", row.last_seen_ms),
    ):
        if ms:
            time = getattr(proto, name)
            time.seconds, time.nanos = ms // 1000, ms % 1000 * 1_000_000
    for refusal in row.placement:
        proto.placement.add(
            node_id=refusal.node_id, node_name=refusal.node_name, reason=refusal.reason
        )
    return proto


def amounts_proto(amounts: Amounts) -> node_pb2.ResourceAmounts:
    """Return the proto of an amount."""
    return node_pb2.ResourceAmounts(
        cpu_millicores=amounts.cpu_millicores,
        memory_bytes=amounts.memory_bytes,
        disk_bytes=amounts.disk_bytes,
        slots=amounts.slots,
    )


def amounts_of(proto: node_pb2.ResourceAmounts) -> Amounts:
    """Return the amount of a proto."""
    return Amounts(
        cpu_millicores=proto.cpu_millicores,
        memory_bytes=proto.memory_bytes,
        disk_bytes=proto.disk_bytes,
        slots=proto.slots,
    )


def runtime_of(proto: node_pb2.RuntimeStatus) -> RuntimeRow:
    """Return the runtime of a proto."""
    return RuntimeRow(
        name=proto.name, ready=proto.ready, message=proto.message, version=proto.version
    )


def node_labels(labels: dict[str, str], egress: node_pb2.EgressStatus) -> Pairs:
    """Return what a node's row keeps as labels: the agent's, and whether it gives networks."""
    why_not = egress.message[:_WHY_NOT_LENGTH_MAX] or "its agent does not say that it can"
    return pairs(labels | {EGRESS_LABEL: EGRESS_READY if egress.ready else why_not})


def _egress_status(row: NodeRow) -> node_pb2.EgressStatus:
    told = dict(row.labels).get(EGRESS_LABEL, "")
    ready = told == EGRESS_READY
    return node_pb2.EgressStatus(ready=ready, message="" if ready else told)


def node_proto(row: NodeRow, allocated: Amounts, last_seen_ms: int) -> node_pb2.Node:
    """Return the proto of a node.

    Args:
        row: The node.
        allocated: What is promised there.
        last_seen_ms: When the leader last heard it; the row's own is older.
    """
    return node_pb2.Node(
        id=row.id,
        name=row.name,
        state=node_pb2.NodeState.ValueType(row.state),
        cordoned=row.cordoned,
        address=row.address,
        capacity=amounts_proto(row.capacity),
        allocated=amounts_proto(allocated),
        runtimes=[
            node_pb2.RuntimeStatus(
                name=runtime.name,
                ready=runtime.ready,
                message=runtime.message,
                version=runtime.version,
            )
            for runtime in row.runtimes
        ],
        labels={key: value for key, value in row.labels if key != EGRESS_LABEL},
        egress=_egress_status(row),
        sandboxes=allocated.slots,
        version=row.version,
        last_seen_time=timestamp(last_seen_ms),
        create_time=timestamp(row.create_ms),
        incarnation=row.incarnation,
        drain_time=timestamp(row.drain_ms),
    )
