"""`prismctl sandbox`: create, list and describe; and the options that other verbs share."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prism_cli import quantities
from prism_cli.completion import complete_sandbox
from prism_cli.options import Format, Settings, command, new_app

if TYPE_CHECKING:
    from prism.sandbox.v1 import sandbox_pb2

app = new_app("Create sandboxes, run code in them, and remove them.")

#: As in the proto, which is not loaded for this list.
STATES: Final = (
    "PENDING", "SCHEDULED", "STARTING", "READY", "PAUSED", "STOPPING", "STOPPED", "FAILED",
    "LOST", "DELETING", "DELETED",
)  # fmt: skip


#: Past it a number is a typing error: more than the largest cluster that was measured.
COUNT_MAX: Final = 100_000


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


class NetworkChoice(str, Enum):  # noqa: UP042
    """What of a network a sandbox has."""

    NONE = "none"
    EGRESS = "egress"


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
NewName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="Name; without one, one is made.")
]
NewNameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="The same as the argument.")
]
Count = Annotated[
    int | None,
    typer.Option("--count", metavar="N", min=1, max=COUNT_MAX, help="So many: NAME-1 to NAME-N."),
]
SpecFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="YAML or JSON, one or many, with the flags' names as keys; -: standard input.",
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
OutputRate = Annotated[
    int | None,
    typer.Option(
        "--output-rate",
        metavar="SIZE",
        parser=quantities.parse_bytes,
        help="Output a second, of all execs: 10Mi.  [default: no bound]",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="KEY=VALUE", help="Variable; may be given again."),
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label; may be given again."),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        "--selector",
        "--label",
        "-l",
        metavar="KEY=VALUE[,…]",
        help="Only those with all of these labels; may be given again.",
    ),
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
Network = Annotated[
    NetworkChoice | None,
    typer.Option(
        "--network", help="none, or egress: to what is allowed.  [default: egress if --allow is]"
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="IP[/BITS][:PORTS][/tcp|/udp]",
        help="It may connect there: 203.0.113.0/24:443; may be given again.",
    ),
]
AllowDns = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-dns",
        metavar="NAME[:PORTS][/tcp|/udp]",
        help="It may look up and connect to example.org or *.example.org:443; may be given again.",
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
        "prismctl sandbox create --count 1000 --name worker --label job=42",
        "prismctl sandbox create -f sandboxes.yaml",
        "prismctl sandbox create --allow-dns pypi.org:443 --allow 10.1.2.3:5432",
        'NAME=$(prismctl sandbox create) && prismctl sandbox exec "$NAME" -- uname -a',
    ],
)
def create(
    settings: Settings,
    name: NewName = None,
    name_option: NewNameOption = None,
    count: Count = None,
    file: SpecFile = None,
    image: Image = "host",
    cpu: Cpu = None,
    memory: Memory = None,
    disk: Disk = None,
    processes: Processes = None,
    output_rate: OutputRate = None,
    env: Env = None,
    label: Label = None,
    ttl: Ttl = None,
    idle_timeout: IdleTimeout = None,
    runtime: Runtime = "",
    network: Network = None,
    allow: Allow = None,
    allow_dns: AllowDns = None,
    node_selector: NodeSelector = None,
    on_node_loss: OnNodeLoss = OnNodeLossChoice.LOST,
    priority: Priority = 0,
    request_id: RequestId = None,
    wait: Wait = True,
) -> None:
    """Create a sandbox, or many, and print each name once it is ready.

    With --no-wait a name is printed once the decision is committed. Of many, those that fail are
    listed with the reason, and the exit status is 1; the others are kept.
    """
    from prism_cli.creation import make_request
    from prism_cli.fleet import create_many, create_one, numbered, refuse_flags_beside_file

    if name and name_option and name != name_option:
        raise typer.BadParameter(f"NAME is {name!r} already", param_hint="'--name'")
    flags: dict[str, Any] = {
        "name": name or name_option or "",
        "image": image,
        "cpu": cpu,
        "memory": memory,
        "disk": disk,
        "processes": processes,
        "output_rate": output_rate,
        "env": env,
        "label": label,
        "ttl": ttl,
        "idle_timeout": idle_timeout,
        "runtime": runtime,
        "network": network.value if network else "",
        "allow": allow,
        "allow_dns": allow_dns,
        "node_selector": node_selector,
        "on_node_loss": on_node_loss.value,
        "priority": priority,
        "request_id": request_id,
    }
    if file is not None:
        from prism_cli.specs import read_specs

        refuse_flags_beside_file({**flags, "count": count})
        specs = read_specs(file)
        create_many(settings, [make_request(**spec.values) for spec in specs], wait)
    elif count is not None:
        create_many(settings, numbered(make_request(**flags), count), wait)
    else:
        write_result(settings, create_one(settings, make_request(**flags), wait))


@command(
    app,
    "ls",
    examples=[
        "prismctl sandbox ls",
        "prismctl sandbox ls --state ready --selector team=search,env=test --sort node",
        "prismctl sandbox ls --watch",
        "prismctl -o json sandbox ls | jq '.[].name'",
    ],
)
def ls(
    settings: Settings,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on with each change.")] = False,
    selector: Selector = None,
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

    labels = quantities.parse_selector(selector)
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
        request = sandbox_pb2.GetSandboxRequest(sandbox=name, with_usage=True)
        sandbox = client.call(lambda stubs: stubs.sandboxes.GetSandbox, request)
    columns = [Column(title, lambda _, text=text: text) for title, text in facts(sandbox)]  # type: ignore[misc]
    write_one(settings.format, sandbox, sandbox.name, columns)


def progress_of(sandbox: "sandbox_pb2.Sandbox") -> str:
    """Return where a sandbox is, for people who wait for it."""
    from prism_cli.sandbox_views import node_of, state_of

    where = f" on {node_of(sandbox)}" if sandbox.node_id else ""
    return f"{sandbox.name}: {state_of(sandbox)}{where}"


def write_result(settings: Settings, sandbox: "sandbox_pb2.Sandbox") -> None:
    """Write what a change came to: the name, so that a script can keep it."""
    from prism_cli.output import as_data, write_data, write_lines

    if settings.format in (Format.TABLE, Format.NAME):
        write_lines([sandbox.name])
    else:
        write_data(settings.format, as_data(sandbox))
