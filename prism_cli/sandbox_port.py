"""`prismctl sandbox port`: a sandbox's ports on this machine."""

import re
from typing import Annotated

import typer

from prism_cli.options import Settings, command
from prism_cli.sandbox import Name, app
from prism_common.names import shorten

_PORT_MAX = 65_535
_PORTS_MAX = 64


def parse_ports(text: str) -> tuple[int, int]:
    """Return the local and the sandbox's port of [LOCAL:]REMOTE; local 0 is any that is free."""
    match = re.fullmatch(r"(?:(\d{1,5}):)?(\d{1,5})", text, re.ASCII)
    remote = int(match[2]) if match else 0
    local = int(match[1]) if match and match[1] is not None else remote
    if not 1 <= remote <= _PORT_MAX or local > _PORT_MAX:
        raise typer.BadParameter(
            f"{shorten(text)} is not [LOCAL:]REMOTE, of ports 1 to {_PORT_MAX}; write it as 8000, "
            "8080:8000, or 0:8000 for any local port that is free"
        )
    return local, remote


@command(
    app,
    "port",
    examples=[
        "prismctl sandbox port web 8000",
        "prismctl sandbox port web 8080:80 5432",
        "prismctl sandbox port web 0:8000 -o name",
        "prismctl sandbox port web 8000 --address 192.0.2.1",
    ],
)
def port(
    settings: Settings,
    name: Name,
    ports: Annotated[
        list[str],
        typer.Argument(metavar="[LOCAL:]REMOTE...", help="Ports; LOCAL 0: any that is free."),
    ],
    address: Annotated[
        str,
        typer.Option(
            "--address", metavar="IP", help="Where to listen; others reach you there, too."
        ),
    ] = "127.0.0.1",
) -> None:
    """Bring ports of a sandbox to this machine, until Ctrl-C.

    It prints where it listens, and passes each connection on to 127.0.0.1 in the sandbox, which
    needs no network for this. While a connection is open the sandbox is not idle.
    """
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.errors import CliError
    from prism_cli.forwarding import Forwarder, run
    from prism_cli.output import state_name

    wanted = list(dict.fromkeys(parse_ports(each) for each in ports))
    if len(wanted) > _PORTS_MAX:
        raise typer.BadParameter(f"{len(wanted)} ports; at most {_PORTS_MAX}")
    with Client(settings) as client:
        request = sandbox_pb2.GetSandboxRequest(sandbox=name)
        sandbox = client.call(lambda stubs: stubs.sandboxes.GetSandbox, request)
        if name not in (sandbox.name, sandbox.id):
            raise CliError(f"there is no sandbox {name!r}; did you mean {sandbox.name}?")
        if sandbox.state != sandbox_pb2.SANDBOX_STATE_READY:
            raise CliError(
                f"sandbox {name} is {state_name(sandbox.state)}; its ports can be reached when it "
                "is READY"
            )
        first = client.addresses.index(client.address)
        addresses = client.addresses[first:] + client.addresses[:first]
    run(Forwarder(addresses, sandbox.id, sandbox.name), wanted, address, settings.format)
