"""`prismctl sandbox cp`: files and trees, into a sandbox and out of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from prism_cli.options import Format, Settings, command
from prism_cli.sandbox import app

if TYPE_CHECKING:
    from prism_cli.copying import Copied

_STANDARD: Final = "-"
_HOME: Final = "/workspace"


@dataclass(frozen=True, slots=True)
class Place:
    """One end of a copy.

    Attributes:
        sandbox: Name or id; empty: this machine.
        path: Absolute in a sandbox; `-` is standard input or output.
    """

    sandbox: str
    path: str


def parse_place(text: str) -> Place:
    """Read NAME:PATH, a path of this machine, or `-`."""
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name or name.startswith("."):
        return Place("", text)
    return Place(name, path if path.startswith("/") else f"{_HOME}/{path}")


@command(
    app,
    "cp",
    examples=[
        "prismctl sandbox cp main.py web:",
        "prismctl sandbox cp ./project web:/workspace/project",
        "prismctl sandbox cp web:/workspace/out ./results",
        "prismctl sandbox cp ./data/. web:/workspace/data",
        "tar c src | prismctl sandbox cp - web:/tmp/src.tar",
        "prismctl sandbox cp web:/workspace/report.csv - | head",
    ],
)
def cp(
    settings: Settings,
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="PATH, NAME:PATH, or - for standard input."),
    ],
    destination: Annotated[
        str,
        typer.Argument(metavar="DST", help="NAME:PATH, PATH, or - for standard output."),
    ],
) -> None:
    """Copy a file or a tree into a sandbox, or out of one.

    One end is NAME:PATH. A path in a sandbox that does not begin with / is below /workspace. A
    path of this machine with a colon is written ./a:b.

    SRC is copied into DST if DST is a directory, and else to the name DST, whose directory must
    exist. With /. at its end a directory's contents are copied and not the directory itself; they
    join what DST holds. A link named by SRC or DST is followed; those in a tree are copied as
    links, except out of a sandbox where they lead outside of what is copied: those are reported.

    Permissions and the times of files are kept; owners, and the times of directories, are not.
    Each file takes its place once it is complete. What cannot be copied is reported and the rest
    is copied; the exit status is then 1.
    """
    here, there = parse_place(source), parse_place(destination)
    if bool(here.sandbox) == bool(there.sandbox):
        which = "both ends name a sandbox" if here.sandbox else "neither end names a sandbox"
        raise typer.BadParameter(
            f"{which}; write one of SRC and DST as NAME:PATH, such as web:/tmp"
        )
    if "" in (here.path, there.path):
        raise typer.BadParameter("a path is empty")
    _report(settings, _copy(settings, here, there))


def _copy(settings: Settings, here: Place, there: Place) -> "Copied":
    from prism_cli.copying import Copier

    copier = Copier(settings)
    if there.sandbox and here.path == _STANDARD:
        return copier.from_stdin(there.sandbox, there.path)
    if there.sandbox:
        return copier.upload(here.path, there.sandbox, there.path)
    if there.path == _STANDARD:
        return copier.to_stdout(here.sandbox, here.path)
    return copier.download(here.sandbox, here.path, there.path)


def _report(settings: Settings, copied: "Copied") -> None:
    from prism_cli.batches import report_failures
    from prism_cli.errors import EXIT_FAILED
    from prism_cli.output import write_data

    if settings.format in (Format.JSON, Format.YAML):
        write_data(
            settings.format,
            {"files": copied.files, "bytes": copied.bytes, "failed": len(copied.failures)},
        )
    if copied.failures:
        report_failures(settings, copied.failures)
        raise typer.Exit(EXIT_FAILED)
