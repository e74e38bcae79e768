"""`sandbox ls`: one list, or a list that goes on with each change."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import grpc
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.client import Client, list_sandboxes
from prism_cli.options import Format
from prism_cli.output import (
    console,
    rich_table,
    rows_of,
    table_lines,
    write_list,
    write_record,
)
from prism_cli.sandbox_views import COLUMNS, SORT_KEYS, state_of
from prism_cli.watching import watch
from prism_common.status import RemoteError

#: A burst of changes is one frame.
_FRAMES_PER_S: Final = 4

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable


class Listing:
    """The sandboxes that some filters keep, in some order."""

    def __init__(
        self,
        client: Client,
        output: Format,
        labels: dict[str, str],
        states: list[str],
        node: str,
        sort: str,
    ) -> None:
        self._client = client
        self._output = output
        self._labels = labels
        self._states = states
        self._node = node
        self._key = SORT_KEYS[sort]
        self._sandboxes: dict[str, pb.Sandbox] = {}

    def run(self, follow: bool) -> None:
        """Write the list; with `follow`, go on until interrupted."""
        if not follow:
            self._list()
            write_list(
                self._output,
                self._sorted(),
                COLUMNS,
                lambda sandbox: sandbox.name,
                empty="no sandboxes; make one: prismctl sandbox create",
            )
        elif self._output is Format.TABLE and sys.stdout.isatty():
            self._live()
        elif self._output is Format.TABLE:
            self._lines()
        else:
            for sandbox in self._changes():
                write_record(self._output, sandbox, sandbox.name)

    def _list(self) -> int:
        """Read all pages; return the revision to watch from."""
        request = pb.ListSandboxesRequest(
            label_selector=self._labels,
            states=[pb.SandboxState.Value(f"SANDBOX_STATE_{name}") for name in self._states],
            node=self._node,
        )
        found, revision = list_sandboxes(self._client, request)
        self._sandboxes = {sandbox.id: sandbox for sandbox in found}
        return revision

    def _sorted(self) -> list[pb.Sandbox]:
        shown = list(self._sandboxes.values())  # at once: the live table draws in its own thread
        shown.sort(key=self._key)
        return shown

    def _keeps(self, sandbox: pb.Sandbox) -> bool:
        """Return whether the filters that a watch does not know keep a sandbox."""
        if self._states and state_of(sandbox) not in self._states:
            return False
        return not self._node or self._node in (sandbox.node_id, sandbox.node_name)

    def _changes(self, on_list: Callable[[], None] = lambda: None) -> Iterator[pb.Sandbox]:
        """Yield the list, and then each change. A sandbox that leaves the filters is shown once.

        Where the revision is compacted it lists again and yields what differs.
        """
        known: dict[str, pb.Sandbox] = {}
        while True:
            revision = self._list()
            on_list()
            for sandbox in self._sorted():
                before = known.pop(sandbox.id, None)
                if before is None or before.revision != sandbox.revision:
                    yield sandbox
            for gone in known.values():
                yield pb.Sandbox(id=gone.id, name=gone.name, state=pb.SANDBOX_STATE_DELETED)
            request = pb.WatchSandboxesRequest(revision=revision, label_selector=self._labels)
            try:
                for response in watch(self._client, request):
                    sandbox = response.sandbox
                    if not response.HasField("sandbox") or not self._apply(sandbox):
                        continue
                    yield sandbox
            except RemoteError as error:
                if error.status_code is not grpc.StatusCode.OUT_OF_RANGE:
                    raise
            known = dict(self._sandboxes)

    def _apply(self, sandbox: pb.Sandbox) -> bool:
        """Take a change; return whether it concerns this listing."""
        before = self._sandboxes.get(sandbox.id)
        if before is not None and before.revision >= sandbox.revision:
            return False  # a resumed stream may repeat
        deleted = sandbox.state == pb.SANDBOX_STATE_DELETED
        if self._keeps(sandbox) and not deleted:
            self._sandboxes[sandbox.id] = sandbox
            return True
        return self._sandboxes.pop(sandbox.id, None) is not None or (
            deleted and self._keeps(sandbox)
        )

    def _lines(self) -> None:
        """Write the list as a table, and then a line a change under the same columns."""
        titles = [column.title for column in COLUMNS]
        widths: list[int] = []

        def write(sandboxes: Iterable[pb.Sandbox]) -> None:
            for row in rows_of(sandboxes, COLUMNS):
                cells = zip(row, widths, strict=True)
                sys.stdout.write(
                    "  ".join(f"{cell:<{width}}" for cell, width in cells).rstrip() + "\n"
                )
            sys.stdout.flush()

        def begin() -> None:
            if widths:
                return
            rows = rows_of(self._sorted(), COLUMNS)
            least = (24, 9, 12, 10, 4, 0)  # room for what comes later
            widths.extend(
                max(width, *map(len, cells))
                for width, cells in zip(least, zip(titles, *rows, strict=True), strict=True)
            )
            header = next(table_lines([[" " * width for width in widths]], titles))
            sys.stdout.write(header + "\n")

        for sandbox in self._changes(begin):
            write([sandbox])

    def _live(self) -> None:
        """Draw the list four times a second, so that ages move too."""
        from rich.live import Live

        def draw() -> "ConsoleRenderable":
            return rich_table(self._sorted(), COLUMNS)

        with Live(
            get_renderable=draw,
            console=console(),
            refresh_per_second=_FRAMES_PER_S,
            vertical_overflow="visible",
        ):
            for _ in self._changes():
                pass
