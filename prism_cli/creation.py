"""Requests that create a sandbox, made from flags."""

import uuid

from google.protobuf.duration_pb2 import Duration
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import Client
from prism_cli.networks import make_network
from prism_cli.quantities import parse_pairs


def new_request_id() -> str:
    """Return a fresh idempotency key."""
    return str(uuid.uuid4())


def to_duration(seconds: float | None) -> Duration | None:
    """Return a protobuf duration; None stays None."""
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def make_request(
    *,
    name: str = "",
    image: str = "",
    cpu: int | None = None,
    memory: int | None = None,
    disk: int | None = None,
    processes: int | None = None,
    output_rate: int | None = None,
    env: list[str] | None = None,
    label: list[str] | None = None,
    ttl: float | None = None,
    idle_timeout: float | None = None,
    runtime: str = "",
    network: str = "",
    allow: list[str] | None = None,
    allow_dns: list[str] | None = None,
    node_selector: list[str] | None = None,
    on_node_loss: str = "lost",
    priority: int = 0,
    request_id: str | None = None,
) -> pb.CreateSandboxRequest:
    """Return the request that the flags ask for. It waits for the commit only.

    So the name is known at once, and what comes after is watched, shown, and can be undone.
    """
    reschedule = on_node_loss == "reschedule"
    spec = pb.SandboxSpec(
        image="" if image == "host" else image,
        limits=pb.Limits(
            cpu_millicores=cpu or 0,
            memory_bytes=memory or 0,
            disk_bytes=disk or 0,
            processes_max=processes or 0,
            output_bytes_per_second=output_rate or 0,
        ),
        env=parse_pairs(env, "--env", "MODE=test"),
        labels=parse_pairs(label, "--label", "team=search"),
        ttl=to_duration(ttl),
        idle_timeout=to_duration(idle_timeout),
        runtime=runtime,
        network=make_network(network, allow, allow_dns),
        on_node_loss=pb.ON_NODE_LOSS_RESCHEDULE if reschedule else pb.ON_NODE_LOSS_LOST,
        priority=priority,
        node_selector=parse_pairs(node_selector, "--node-selector", "disk=ssd"),
    )
    return pb.CreateSandboxRequest(
        request_id=request_id or new_request_id(),
        name=name,
        spec=spec,
        wait_until=pb.WAIT_UNTIL_COMMITTED,
    )


def create_sandbox(client: Client, request: pb.CreateSandboxRequest) -> pb.Sandbox:
    """Create, and return the sandbox as it was committed."""
    return client.call(lambda stubs: stubs.sandboxes.CreateSandbox, request)
