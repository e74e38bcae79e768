"""`prismctl peer`: the control nodes that hold the replicated state."""

from typing import TYPE_CHECKING, Annotated

import typer

from prism_cli.errors import CliError
from prism_cli.options import Settings, command, new_app

if TYPE_CHECKING:
    from prism.cluster.v1 import cluster_pb2

app = new_app("See and change the control nodes that hold the replicated state.")


@command(app, "ls", examples=["prismctl peer ls", "prismctl --api node2:8008 peer ls"])
def ls(settings: Settings) -> None:
    """List the control nodes, as the one that answers sees them. Works without a leader too."""
    from prism_cli.cluster_views import PEER_COLUMNS
    from prism_cli.output import write_list

    peers = _list_peers(settings)
    write_list(settings.format, peers, PEER_COLUMNS, lambda peer: str(peer.name))


@command(app, "info", examples=["prismctl peer info node1", "prismctl peer info node1 -o json"])
def info(
    settings: Settings,
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Name, id, or a unique prefix.")],
) -> None:
    """Describe one control node."""
    from prism_cli.cluster_views import PEER_FACTS
    from prism_cli.output import write_one

    found = _find(_list_peers(settings), peer)
    write_one(settings.format, found, found.name, PEER_FACTS)


@command(app, "add", examples=["prismctl peer add node4:4200"])
def add(
    settings: Settings,
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Raft address of the node that waits.")
    ],
) -> None:
    """Take in a node that waits to join: one started with `prismd --join=… --name=…`.

    It receives the log first, and votes by itself once it has caught up.
    """
    from prism.cluster.v1 import cluster_pb2

    from prism_cli.client import Client
    from prism_cli.cluster_views import PEER_FACTS
    from prism_cli.output import write_one

    with Client(settings) as client:
        request = cluster_pb2.AddPeerRequest(raft_address=address)
        peer = client.call(lambda stubs: stubs.cluster.AddPeer, request)
    write_one(settings.format, peer, peer.name, PEER_FACTS)


@command(app, "rm", examples=["prismctl peer rm node2"])
def rm(
    settings: Settings,
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Exact name or id.")],
) -> None:
    """Remove a control node. It may be stopped, or lead; then stop it and wipe its directory."""
    from prism.cluster.v1 import cluster_pb2

    from prism_cli.client import Client

    with Client(settings) as client:
        request = cluster_pb2.RemovePeerRequest(peer=peer)
        client.call(lambda stubs: stubs.cluster.RemovePeer, request)
    typer.echo(peer)


@command(
    app,
    "transfer-leader",
    examples=["prismctl peer transfer-leader", "prismctl peer transfer-leader node2"],
)
def transfer_leader(
    settings: Settings,
    peer: Annotated[
        str,
        typer.Argument(metavar="[PEER]", help="Exact name or id; default: the most up to date."),
    ] = "",
) -> None:
    """Hand leadership to another control node, before its machine is taken down."""
    from prism.cluster.v1 import cluster_pb2

    from prism_cli.client import Client

    with Client(settings) as client:
        request = cluster_pb2.TransferLeadershipRequest(peer=peer)
        answer = client.call(lambda stubs: stubs.cluster.TransferLeadership, request)
    names = {one.id: one.name for one in _list_peers(settings)}
    typer.echo(names.get(answer.leader_id, answer.leader_id))


def _list_peers(settings: Settings) -> "list[cluster_pb2.Peer]":
    from prism.cluster.v1 import cluster_pb2

    from prism_cli.client import Client

    with Client(settings) as client:
        request = cluster_pb2.ListPeersRequest()
        return list(client.call(lambda stubs: stubs.cluster.ListPeers, request).peers)


def _find(peers: "list[cluster_pb2.Peer]", text: str) -> "cluster_pb2.Peer":
    for peer in peers:
        if text in (peer.id, peer.name):
            return peer
    fitting = [peer for peer in peers if peer.id.startswith(text) or peer.name.startswith(text)]
    names = ", ".join(peer.name for peer in fitting or peers)
    if not fitting:
        raise CliError(f"PEER: no control node is named {text!r}; there are: {names}")
    if len(fitting) > 1:
        raise CliError(f"PEER: {text!r} fits more than one: {names}")
    return fitting[0]
