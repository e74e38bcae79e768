"""`prismctl sandbox`: create, list, describe, start, stop and remove."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from prism_cli import quantities
from prism_cli.completion import complete_sandbox
from prism_cli.options import Format, Settings, command, new_app

if TYPE_CHECKING:
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client

app = new_app("Create sandboxes, run code in them, and remove them.")

#: As in the proto, which is not loaded for this list.
STATES: Final = (
    "PENDING", "SCHEDULED", "STARTING", "READY", "PAUSED", "STOPPING", "STOPPED", "FAILED",
    "LOST", "DELETING", "DELETED",
)  # fmt: skip


class SortKey(str, Enum):  # noqa: UP042
    """Orders of a list."""

    NAME = "name"
    AGE = "age"
    STATE = "state"
    NODE = "node"


class OnNodeLossChoice(str, Enum):  # noqa: UP042
    """What happens when a sandbox's node is lost."""

    LOST = "lost"
    RESCHEDULE = "reschedule"


def parse_state(text: str) -> str:
    """Return a state's name in capitals."""
    if text.upper() not in STATES:
        raise typer.BadParameter(f"{text!r} is not a state; use one of {', '.join(STATES).lower()}")
    return text.upper()


# ── Arguments and options that several commands share ────────────────────────────────────────

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name or id.", autocompletion=complete_sandbox, show_default=False
    ),
]
Image = Annotated[
    str, typer.Option("--image", metavar="IMAGE", help='Root filesystem; "host": the node\'s own.')
]
Cpu = Annotated[
    int | None,
    typer.Option(
        "--cpu", metavar="CPU", parser=quantities.parse_cpu, help="Cores: 500m, 2.  [default: 500m]"
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=quantities.parse_bytes,
        help="Memory, with the files in it: 256Mi, 1Gi.  [default: 256Mi]",
    ),
]
Disk = Annotated[
    int | None,
    typer.Option(
        "--disk",
        metavar="SIZE",
        parser=quantities.parse_bytes,
        help="Writable files.  [default: 256Mi]",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", metavar="N", min=1, max=2**31, help="Processes.  [default: 128]"),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="KEY=VALUE", help="Variable; may be given again."),
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label; may be given again."),
]
Ttl = Annotated[
    float | None,
    typer.Option(
        "--ttl",
        metavar="TIME",
        parser=quantities.parse_positive_duration,
        help="Remove it this long after its creation: 1h30m.",
    ),
]
IdleTimeout = Annotated[
    float | None,
    typer.Option(
        "--idle-timeout",
        metavar="TIME",
        parser=quantities.parse_positive_duration,
        help="Remove it after this long without an exec: 10m.",
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="RUNTIME", help="bubblewrap or gvisor; else the node's best."
    ),
]
NodeSelector = Annotated[
    list[str] | None,
    typer.Option(
        "--node-selector", metavar="KEY=VALUE", help="Label its node must have; may be given again."
    ),
]
OnNodeLoss = Annotated[
    OnNodeLossChoice,
    typer.Option("--on-node-loss", help="When its node is lost: lost, or placed again, empty."),
]
Priority = Annotated[
    int,
    typer.Option(
        "--priority",
        metavar="N",
        min=-1000,
        max=1000,
        help="Higher is placed first: -1000 to 1000.",
    ),
]
RequestId = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        metavar="ID",
        help="Idempotency key: a repeat within 24 h returns the first result.",
    ),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]


# ── Commands ─────────────────────────────────────────────────────────────────────────────────


@command(
    app,
    "create",
    examples=[
        "prismctl sandbox create",
        "prismctl sandbox create web --cpu 2 --memory 1Gi --ttl 1h",
        "prismctl sandbox create --env MODE=test --label team=search --no-wait",
        'NAME=$(prismctl sandbox create) && prismctl sandbox exec "$NAME" -- uname -a',
    ],
)
def create(
    settings: Settings,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name; without one, one is made.")
    ] = None,
    name_option: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The same as the argument.")
    ] = None,
    image: Image = "host",
    cpu: Cpu = None,
    memory: Memory = None,
    disk: Disk = None,
    processes: Processes = None,
    env: Env = None,
    label: Label = None,
    ttl: Ttl = None,
    idle_timeout: IdleTimeout = None,
    runtime: Runtime = "",
    node_selector: NodeSelector = None,
    on_node_loss: OnNodeLoss = OnNodeLossChoice.LOST,
    priority: Priority = 0,
    request_id: RequestId = None,
    wait: Wait = True,
) -> None:
    """Create a sandbox, and print its name once it is ready.

    With --no-wait it is printed once the decision is committed.
    """
    from prism_cli.client import Client
    from prism_cli.creation import create_sandbox, make_request
    from prism_cli.output import spinner
    from prism_cli.watching import READY, wait_until

    if name and name_option and name != name_option:
        raise typer.BadParameter(f"NAME is {name!r} already", param_hint="'--name'")
    request = make_request(
        name=name or name_option or "",
        image=image,
        cpu=cpu,
        memory=memory,
        disk=disk,
        processes=processes,
        env=env,
        label=label,
        ttl=ttl,
        idle_timeout=idle_timeout,
        runtime=runtime,
        node_selector=node_selector,
        on_node_loss=on_node_loss.value,
        priority=priority,
        request_id=request_id,
    )
    with Client(settings) as client, spinner("creating a sandbox") as show:
        sandbox = create_sandbox(client, request)
        if wait:
            sandbox = wait_until(
                client, sandbox, READY, on_change=lambda seen: show(_progress(seen))
            )
    _write_result(settings, sandbox)


@command(
    app,
    "ls",
    examples=[
        "prismctl sandbox ls",
        "prismctl sandbox ls --state ready --label team=search --sort node",
        "prismctl sandbox ls --watch",
        "prismctl -o json sandbox ls | jq '.[].name'",
    ],
)
def ls(
    settings: Settings,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on with each change.")] = False,
    label: Label = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            parser=parse_state,
            help="Only these: ready, pending, lost, …; may be given again.",
        ),
    ] = None,
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Only this node's.")] = "",
    sort: Annotated[SortKey, typer.Option("--sort", help="Order.")] = SortKey.AGE,
) -> None:
    """List sandboxes, in whatever state they are, the oldest first."""
    from prism_cli.client import Client
    from prism_cli.listing import Listing

    labels = quantities.parse_pairs(label, "--label", "team=search")
    with Client(settings) as client:
        listing = Listing(client, settings.format, labels, state or [], node, sort.value)
        listing.run(watch)


@command(
    app,
    "info",
    examples=["prismctl sandbox info web", "prismctl sandbox info web -o json"],
)
def info(settings: Settings, name: Name) -> None:
    """Describe a sandbox; of one that is pending, say for each node why it is not there.

    NAME may be a unique prefix of a name or an id.
    """
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.output import Column, write_one
    from prism_cli.sandbox_views import facts

    with Client(settings) as client:
        request = sandbox_pb2.GetSandboxRequest(sandbox=name)
        sandbox = client.call(lambda stubs: stubs.sandboxes.GetSandbox, request)
    columns = [Column(title, lambda _, text=text: text) for title, text in facts(sandbox)]  # type: ignore[misc]
    write_one(settings.format, sandbox, sandbox.name, columns)


@command(
    app,
    "start",
    examples=["prismctl sandbox start web"],
)
def start(settings: Settings, name: Name, wait: Wait = True) -> None:
    """Start a stopped sandbox again, with its files."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.creation import new_request_id
    from prism_cli.output import spinner
    from prism_cli.watching import READY, STOPPED, wait_until

    with Client(settings) as client, spinner(f"starting {name}") as show:
        request = sandbox_pb2.StartSandboxRequest(sandbox=name, request_id=new_request_id())
        sandbox = client.call(lambda stubs: stubs.sandboxes.StartSandbox, request)
        if wait:
            sandbox = wait_until(
                client, sandbox, READY, {STOPPED}, lambda seen: show(_progress(seen))
            )
    _write_result(settings, sandbox)


@command(
    app,
    "stop",
    examples=["prismctl sandbox stop web", "prismctl sandbox stop web --grace 30s"],
)
def stop(
    settings: Settings,
    name: Name,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="TIME",
            parser=quantities.parse_duration,
            help="From SIGTERM to SIGKILL.  [default: 5s]",
        ),
    ] = None,
    wait: Wait = True,
) -> None:
    """End all processes of a sandbox, and keep its files."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.creation import new_request_id, to_duration
    from prism_cli.output import spinner
    from prism_cli.watching import STOPPED, wait_until

    with Client(settings) as client, spinner(f"stopping {name}") as show:
        request = sandbox_pb2.StopSandboxRequest(
            sandbox=name, request_id=new_request_id(), grace_period=to_duration(grace)
        )
        sandbox = client.call(lambda stubs: stubs.sandboxes.StopSandbox, request)
        if wait:
            client.timeout_s += grace or 0.0  # what was asked for does not count as late
            sandbox = wait_until(
                client, sandbox, STOPPED, on_change=lambda seen: show(_progress(seen))
            )
    _write_result(settings, sandbox)


@command(app, "pause", examples=["prismctl sandbox pause web"])
def pause(settings: Settings, name: Name, wait: Wait = True) -> None:
    """Freeze all processes of a sandbox: they keep their memory and use no processor time."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.creation import new_request_id
    from prism_cli.output import spinner
    from prism_cli.watching import PAUSED, wait_until

    with Client(settings) as client, spinner(f"pausing {name}") as show:
        request = sandbox_pb2.PauseSandboxRequest(sandbox=name, request_id=new_request_id())
        sandbox = client.call(lambda stubs: stubs.sandboxes.PauseSandbox, request)
        if wait:
            sandbox = wait_until(
                client, sandbox, PAUSED, on_change=lambda seen: show(_progress(seen))
            )
    _write_result(settings, sandbox)


@command(app, "resume", examples=["prismctl sandbox resume web"])
def resume(settings: Settings, name: Name, wait: Wait = True) -> None:
    """Thaw a paused sandbox: its processes go on where they were."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.creation import new_request_id
    from prism_cli.output import spinner
    from prism_cli.watching import READY, wait_until

    with Client(settings) as client, spinner(f"resuming {name}") as show:
        request = sandbox_pb2.ResumeSandboxRequest(sandbox=name, request_id=new_request_id())
        sandbox = client.call(lambda stubs: stubs.sandboxes.ResumeSandbox, request)
        if wait:
            sandbox = wait_until(
                client, sandbox, READY, on_change=lambda seen: show(_progress(seen))
            )
    _write_result(settings, sandbox)


@command(
    app,
    "rm",
    examples=[
        "prismctl sandbox rm web",
        "prismctl sandbox rm --force web api worker",
        "prismctl sandbox ls -o name | xargs prismctl sandbox rm --no-wait",
    ],
)
def rm(
    settings: Settings,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Names or ids.", autocompletion=complete_sandbox),
    ],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Kill at once, with no grace period.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until nothing is left of it.")
    ] = True,
) -> None:
    """Remove sandboxes, in whatever state they are. Each is reported by itself."""
    from prism_cli.client import Client
    from prism_cli.errors import EXIT_FAILED, UnreachableError, report
    from prism_cli.output import as_data, spinner, write_data, write_lines
    from prism_common.errors import PrismError

    removed: list[object] = []
    failed = False
    with Client(settings) as client:
        for name in names:
            try:
                with spinner(f"removing {name}"):
                    sandbox = remove_sandbox(client, name, force=force, wait=wait)
            except UnreachableError:
                raise
            except PrismError as error:
                failed = True
                report(error, settings, about=name if len(names) > 1 else "")
                continue
            removed.append(as_data(sandbox))
            if settings.format in (Format.TABLE, Format.NAME):
                write_lines([name])
    if settings.format in (Format.JSON, Format.YAML):
        write_data(settings.format, removed)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def remove_sandbox(
    client: "Client", name: str, *, force: bool, wait: bool
) -> "sandbox_pb2.Sandbox":
    """Delete one sandbox; with `wait`, return once nothing is left of it."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id

    request = sandbox_pb2.DeleteSandboxRequest(
        sandbox=name, request_id=new_request_id(), force=force, wait=wait
    )
    return client.call(lambda stubs: stubs.sandboxes.DeleteSandbox, request)


def _progress(sandbox: "sandbox_pb2.Sandbox") -> str:
    from prism_cli.sandbox_views import node_of, state_of

    where = f" on {node_of(sandbox)}" if sandbox.node_id else ""
    return f"{sandbox.name}: {state_of(sandbox)}{where}"


def _write_result(settings: Settings, sandbox: "sandbox_pb2.Sandbox") -> None:
    """Write what a change came to: the name, so that a script can keep it."""
    from prism_cli.output import as_data, write_data, write_lines

    if settings.format in (Format.TABLE, Format.NAME):
        write_lines([sandbox.name])
    else:
        write_data(settings.format, as_data(sandbox))
