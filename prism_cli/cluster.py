"""`prismctl info`: how the cluster is, in words."""

import typer

from prism_cli.options import Settings, command


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @command(app, "info", examples=["prismctl info", "prismctl info -o json"])
    def info(settings: Settings) -> None:
        """Say how the cluster is: its leader, members, nodes, sandboxes, and what is wrong.

        Answers without a leader too.
        """
        from prism.cluster.v1 import cluster_pb2

        from prism_cli.client import Client
        from prism_cli.cluster_views import facts
        from prism_cli.output import Column, write_one

        with Client(settings) as client:
            request = cluster_pb2.GetClusterRequest()
            cluster = client.call(lambda stubs: stubs.cluster.GetCluster, request)
        columns = [Column(title, lambda _, text=text: text) for title, text in facts(cluster)]  # type: ignore[misc]
        write_one(settings.format, cluster, cluster.id, columns)
