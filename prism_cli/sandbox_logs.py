"""`prismctl sandbox logs`: what a sandbox's commands have written."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from prism_cli.options import Settings, command
from prism_cli.quantities import parse_since
from prism_cli.sandbox import Name, app

if TYPE_CHECKING:
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client


@command(
    app,
    "logs",
    examples=[
        "prismctl sandbox logs web",
        "prismctl sandbox logs -f web --since 10m",
        "prismctl sandbox logs web --since 2025-01-31T12:00:00Z",
        "prismctl sandbox logs web --timestamps",
    ],
)
def logs(
    settings: Settings,
    name: Name,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the sandbox ends.")
    ] = False,
    since: Annotated[
        datetime | None,
        typer.Option(
            "--since",
            metavar="TIME",
            parser=parse_since,
            help="Only what was written this long ago or later (10m), or since a moment.",
        ),
    ] = None,
    timestamps: Annotated[
        bool,
        typer.Option("--timestamps", "-t", help="Begin each line with when its node got it (UTC)."),
    ] = False,
) -> None:
    """Show what the commands in a sandbox have written, each stream to its own."""
    from google.protobuf.timestamp_pb2 import Timestamp
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client

    request = sandbox_pb2.StreamLogsRequest(sandbox=name, follow=follow)
    if since is not None:
        moment = Timestamp()
        moment.FromDatetime(since)
        request.since.CopyFrom(moment)
    with Client(settings) as client:
        _copy(client, request, Stamper() if timestamps else None)


class Stamper:
    """Begins each line with its time; a piece of another command never goes on with its line."""

    def __init__(self) -> None:
        #: Whose line is not ended yet, by the stream that it is written to.
        self._open: dict[int, str] = {}

    def stamp(self, piece: "sandbox_pb2.StreamLogsResponse") -> bytes:
        """Return what to write for a piece."""
        if not piece.data:
            return b""
        begun = self._open.pop(piece.stream, "")
        goes_on = begun == piece.exec_id
        time = b"" if goes_on else self._time(piece)
        *lines, rest = piece.data.split(b"\n")
        if rest:
            self._open[piece.stream] = piece.exec_id
            lines.append(rest)
        text = (b"\n" + self._time(piece)).join(lines) + (b"" if rest else b"\n")
        return (b"\n" if begun and not goes_on else b"") + time + text

    @staticmethod
    def _time(piece: "sandbox_pb2.StreamLogsResponse") -> bytes:
        moment = piece.time.ToDatetime()
        return f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z ".encode()


def _copy(
    client: "Client", request: "sandbox_pb2.StreamLogsRequest", stamper: Stamper | None
) -> None:
    """Write pieces as they come; after a broken stream go on from the last one's time.

    The server then sends the pieces of that same moment again: as many as were seen are skipped.
    """
    import time

    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Backoff, Deadline, resume_wait_s
    from prism_cli.errors import UnreachableError
    from prism_cli.streams import write_all
    from prism_common.status import RemoteError

    backoff, patience = Backoff(), None
    seen_at_moment = 0
    while True:
        skip = seen_at_moment
        try:
            time_s = None if request.follow else client.timeout_s
            for piece in client.stream(lambda stubs: stubs.sandboxes.StreamLogs, request, time_s):
                same = piece.time == request.since and piece.HasField("time")
                if same and skip:
                    skip -= 1
                    continue
                data = piece.data if stamper is None else stamper.stamp(piece)
                write_all(2 if piece.stream == sandbox_pb2.OUTPUT_STREAM_STDERR else 1, data)
                seen_at_moment = seen_at_moment + 1 if same else 1
                if piece.HasField("time"):
                    request.since.CopyFrom(piece.time)
                backoff, patience = Backoff(), None
        except (RemoteError, UnreachableError) as error:
            if isinstance(error, UnreachableError) and patience is None and not seen_at_moment:
                raise
            patience = patience or Deadline(client.timeout_s)
            wait_s = resume_wait_s(error, backoff)
            if wait_s is None or wait_s > patience.left_s:
                raise
            client.try_next_address()
            time.sleep(wait_s)
        else:
            return
