"""`prismctl info`: how the cluster is, in words. `prismctl backup`: a copy of its state."""

from pathlib import Path
from typing import Annotated

import typer

from prism_cli.errors import CliError
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

    @command(app, "backup", examples=["prismctl backup prism.backup"])
    def backup(
        settings: Settings,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    ) -> None:
        """Write a consistent copy of the cluster's state to a file, for `prismd restore`.

        The file appears whole or not at all. It holds no contents of sandboxes.
        """
        from prism.cluster.v1 import cluster_pb2

        from prism_cli.client import Client

        partial = file.with_name(f"{file.name}.partial")
        size = 0
        try:
            with Client(settings) as client, partial.open("wb") as output:
                request = cluster_pb2.BackupRequest()
                for part in client.stream(lambda stubs: stubs.cluster.Backup, request):
                    size += output.write(part.data)
            partial.rename(file)
        except OSError as error:
            raise CliError(f"FILE: {file}: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
        typer.echo(f"{file}: {size} bytes", err=True)
