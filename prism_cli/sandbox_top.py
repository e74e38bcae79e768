"""`prismctl sandbox top`: what sandboxes use now."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from prism_cli import quantities
from prism_cli.completion import complete_sandbox
from prism_cli.options import Format, Settings, command
from prism_cli.sandbox import Selector, app

if TYPE_CHECKING:
    from prism_cli.sandbox_usage import Measured, Meter

_EVERY_S_DEFAULT: Final = 2.0
#: Processor time in use is the difference of two measurements so far apart.
_FIRST_S: Final = 1.0


class UsageKey(str, Enum):  # noqa: UP042
    """Orders of the list: the largest first."""

    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    PROCESSES = "processes"
    NAME = "name"


@command(
    app,
    "top",
    examples=[
        "prismctl sandbox top",
        "prismctl sandbox top web api",
        "prismctl sandbox top --watch --sort memory",
        "prismctl sandbox top --selector team=search -o json",
    ],
)
def top(
    settings: Settings,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Names or ids; none: all that have processes.",
            autocompletion=complete_sandbox,
            show_default=False,
        ),
    ] = None,
    selector: Selector = None,
    sort: Annotated[
        UsageKey, typer.Option("--sort", help="What comes first is largest in this.")
    ] = UsageKey.CPU,
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
    """Measure sandboxes now: CPU, memory, files and processes, each of what it may use.

    CPU is the average over the last second, or since the measurement before.
    """
    import time

    from prism_cli.client import Client
    from prism_cli.sandbox_usage import Meter

    every_s = every or _EVERY_S_DEFAULT
    with Client(settings) as client:
        meter = Meter(client, names or [], quantities.parse_selector(selector), sort.value)
        meter.measure()
        time.sleep(min(_FIRST_S, every_s) if watch else _FIRST_S)
        if not watch:
            _write(settings, meter.measure())
            meter.raise_missing()
            return
        _watch(settings, meter, every_s)


def _write(settings: Settings, found: "list[Measured]") -> None:
    from prism_cli.output import write_list
    from prism_cli.sandbox_usage import COLUMNS

    shown = found if settings.format is Format.TABLE else [one.as_data() for one in found]
    name = (lambda one: str(one.name)) if settings.format is Format.TABLE else _name_of_data
    write_list(settings.format, shown, COLUMNS, name, empty="no sandbox has processes")


def _name_of_data(data: dict[str, object]) -> str:
    return str(data["name"])


def _watch(settings: Settings, meter: "Meter", every_s: float) -> None:
    import sys
    import time

    from prism_cli.output import console, rich_table, write_record
    from prism_cli.sandbox_usage import COLUMNS

    if settings.format is not Format.TABLE or not sys.stdout.isatty():
        while True:
            found = meter.measure()
            if settings.format is Format.TABLE:
                _write(settings, found)
                sys.stdout.flush()
            else:
                for one in found:
                    write_record(settings.format, one.as_data(), one.name)
            time.sleep(every_s)
    from rich.live import Live

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            live.update(rich_table(meter.measure(), COLUMNS), refresh=True)
            time.sleep(every_s)
