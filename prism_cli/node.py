"""`prismctl node`: the machines that run sandboxes."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prism_cli import quantities
from prism_cli.completion import complete_node
from prism_cli.options import Format, Settings, command, new_app

if TYPE_CHECKING:
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client

_EVERY_S_DEFAULT: Final = 2.0

app = new_app("See and steer the machines that run sandboxes.")

Node = Annotated[
    str,
    typer.Argument(metavar="NODE", help="Name or id.", autocompletion=complete_node),
]


@command(app, "ls", examples=["prismctl node ls", "prismctl node ls -o json"])
def ls(settings: Settings) -> None:
    """List the nodes, with what they offer and what is promised."""
    from prism_cli.client import Client
    from prism_cli.node_views import COLUMNS
    from prism_cli.output import write_list

    with Client(settings) as client:
        nodes = list_nodes(client)
    write_list(
        settings.format,
        nodes,
        COLUMNS,
        lambda node: str(node.name),
        empty="no nodes; start an agent: prism-agent --help",
    )


@command(app, "info", examples=["prismctl node info agent-1", "prismctl node info agent-1 -o yaml"])
def info(settings: Settings, node: Node) -> None:
    """Describe a node, with its runtimes and health checks.

    NODE may be a unique prefix of a name or an id.
    """
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client
    from prism_cli.node_views import facts, health_facts
    from prism_cli.output import Column, write_one
    from prism_common.errors import PrismError

    lines: list[tuple[str, str]] = []
    with Client(settings) as client:
        found = client.call(lambda stubs: stubs.nodes.GetNode, node_pb2.GetNodeRequest(node=node))
        if settings.format is Format.TABLE:
            lines = facts(found)
            try:
                request = node_pb2.GetHealthRequest(node=found.id)
                health = client.call(lambda stubs: stubs.nodes.GetHealth, request, 5.0)
                lines += health_facts(health)
            except PrismError as error:
                lines.append(("Health", f"not known: {error.message}"))
    columns = [Column(title, lambda _, text=text: text) for title, text in lines]  # type: ignore[misc]
    write_one(settings.format, found, found.name, columns)


@command(
    app,
    "top",
    examples=["prismctl node top", "prismctl node top --watch", "prismctl node top -w --every 5s"],
)
def top(
    settings: Settings,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Measure again and again.")] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            metavar="TIME",
            parser=quantities.parse_positive_duration,
            help=f"Time between measurements with --watch.  [default: {_EVERY_S_DEFAULT:.0f}s]",
        ),
    ] = None,
) -> None:
    """Measure all nodes now: CPU, memory, disk and load of the machines."""
    import sys
    import time

    from prism_cli.client import Client
    from prism_cli.node_views import TOP_COLUMNS
    from prism_cli.output import console, rich_table, write_list, write_record

    every_s = every or _EVERY_S_DEFAULT
    with Client(settings) as client:
        if not watch:
            write_list(settings.format, measure(client), TOP_COLUMNS, _name_of_measurement)
            return
        if settings.format is not Format.TABLE or not sys.stdout.isatty():
            while True:
                measured = measure(client)
                if settings.format is Format.TABLE:
                    write_list(settings.format, measured, TOP_COLUMNS, _name_of_measurement)
                    sys.stdout.flush()
                else:
                    for one in measured:
                        write_record(settings.format, one, _name_of_measurement(one))
                time.sleep(every_s)
        from rich.live import Live

        with Live(console=console(), auto_refresh=False) as live:
            while True:
                live.update(rich_table(measure(client), TOP_COLUMNS), refresh=True)
                time.sleep(every_s)


def list_nodes(client: "Client") -> "list[node_pb2.Node]":
    """Return all nodes, over all pages."""
    from prism.node.v1 import node_pb2

    nodes: list[node_pb2.Node] = []
    request = node_pb2.ListNodesRequest(page_size=500)
    while True:
        page = client.call(lambda stubs: stubs.nodes.ListNodes, request)
        nodes += page.nodes
        if not page.next_page_token:
            return nodes
        request.page_token = page.next_page_token


def measure(client: "Client") -> list[dict[str, Any]]:
    """Ask every node what it has; one that does not answer is in the result with why."""
    from prism_cli.client import Deadline
    from prism_cli.node_views import ask_all
    from prism_cli.output import plain

    nodes = list_nodes(client)
    stubs = client.connect(Deadline(client.timeout_s))
    measured = []
    for node, answer in ask_all(client, stubs, nodes):
        data: dict[str, Any] = {"node_name": node.name, "node_id": node.id, "error": None}
        if isinstance(answer, str):
            data["error"] = answer
        else:
            data |= plain(answer)
        measured.append(data)
    return measured


def _name_of_measurement(measured: dict[str, Any]) -> str:
    return str(measured["node_name"])


@command(app, "cordon", examples=["prismctl node cordon agent-1"])
def cordon(settings: Settings, node: Node) -> None:
    """Place nothing new on a node; what runs there goes on."""
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client

    with Client(settings) as client:
        request = node_pb2.CordonNodeRequest(node=node)
        found = client.call(lambda stubs: stubs.nodes.CordonNode, request)
    typer.echo(found.name)


@command(app, "uncordon", examples=["prismctl node uncordon agent-1"])
def uncordon(settings: Settings, node: Node) -> None:
    """Place sandboxes on a node again, and end its drain."""
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client

    with Client(settings) as client:
        request = node_pb2.UncordonNodeRequest(node=node)
        found = client.call(lambda stubs: stubs.nodes.UncordonNode, request)
    typer.echo(found.name)


@command(
    app,
    "drain",
    examples=["prismctl node drain agent-1", "prismctl node drain agent-1 --deadline 10m"],
)
def drain(
    settings: Settings,
    node: Node,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            metavar="TIME",
            parser=quantities.parse_duration,
            help="What cannot be placed elsewhere may run for so long.  [default: 0s]",
        ),
    ] = None,
) -> None:
    """Empty a node: cordon it, move what may be placed again, and end the rest by a deadline."""
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client
    from prism_cli.creation import to_duration

    with Client(settings) as client:
        request = node_pb2.DrainNodeRequest(node=node, deadline=to_duration(deadline))
        found = client.call(lambda stubs: stubs.nodes.DrainNode, request)
    typer.echo(found.name)
