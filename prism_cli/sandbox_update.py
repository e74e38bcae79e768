"""`prismctl sandbox update`: limits, labels and the end of life of sandboxes that live."""

from typing import Annotated, Any

import typer

from prism_cli import quantities
from prism_cli.options import Settings, command
from prism_cli.sandbox import app
from prism_cli.sandbox_verbs import Names, end_with, write_results


@command(
    app,
    "update",
    examples=[
        "prismctl sandbox update web --memory 1Gi",
        "prismctl sandbox update web api --cpu 2 --processes 500",
        "prismctl sandbox update web --ttl 2h",
        "prismctl sandbox update web --label team=search --label old=",
    ],
)
def update(
    settings: Settings,
    names: Names,
    cpu: Annotated[
        int | None,
        typer.Option("--cpu", metavar="CPU", parser=quantities.parse_cpu, help="Cores: 500m, 2."),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory", metavar="SIZE", parser=quantities.parse_bytes, help="Memory: 256Mi, 1Gi."
        ),
    ] = None,
    disk: Annotated[
        int | None,
        typer.Option(
            "--disk", metavar="SIZE", parser=quantities.parse_bytes, help="Writable files: 512Mi."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, max=2**31, help="Processes and threads."),
    ] = None,
    ttl: Annotated[
        float | None,
        typer.Option(
            "--ttl",
            metavar="TIME",
            parser=quantities.parse_positive_duration,
            help="Remove it this long from now: 1h30m.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", metavar="KEY=[VALUE]", help="Set a label; an empty value removes it."
        ),
    ] = None,
) -> None:
    """Change the limits, labels or end of life of sandboxes, also of those that run.

    Limits hold within moments, without a restart. The node must have room for what is added.
    Memory may go below what is in use: with cgroup v2 the kernel then frees what it can and kills
    processes where that is not enough; with version 1 the limit stays as it was, the sandbox says
    LIMITS_NOT_HELD, and it is tried again every few seconds. /workspace is as large as --disk, and
    half of --memory at most; it never goes below what its files take.
    """
    from prism.sandbox.v1 import sandbox_pb2

    limits = sandbox_pb2.Limits(
        cpu_millicores=cpu or 0,
        memory_bytes=memory or 0,
        disk_bytes=disk or 0,
        processes_max=processes or 0,
    )
    labels = quantities.parse_pairs(label, "--label", "team=search")
    if not limits.ByteSize() and not labels and ttl is None:
        raise typer.BadParameter(
            "nothing to change; give one of --cpu, --memory, --disk, --processes, --ttl, --label"
        )
    _update(settings, names, {"limits": limits, "labels": labels, "expire_time": _after(ttl)})


def _after(ttl_s: float | None) -> Any:
    if ttl_s is None:
        return None
    import time

    from google.protobuf.timestamp_pb2 import Timestamp

    moment = Timestamp()
    moment.FromNanoseconds(time.time_ns() + round(ttl_s * 1e9))
    return moment


def _update(settings: Settings, names: list[str], changes: dict[str, Any]) -> None:
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.creation import new_request_id
    from prism_cli.errors import UnreachableError
    from prism_cli.sandbox import write_result
    from prism_common.errors import PrismError

    updated: list[sandbox_pb2.Sandbox] = []
    failures: list[tuple[str, PrismError]] = []
    with Client(settings) as client:
        for name in names:
            request = sandbox_pb2.UpdateSandboxRequest(
                sandbox=name, request_id=new_request_id(), **changes
            )
            try:
                updated.append(client.call(lambda stubs: stubs.sandboxes.UpdateSandbox, request))
            except UnreachableError:
                raise
            except PrismError as error:
                failures.append((name, error))
    if len(names) == 1 and updated:
        write_result(settings, updated[0])
    elif len(names) > 1:
        write_results(settings, updated, [one.name for one in updated])
    end_with(settings, failures, len(names))
