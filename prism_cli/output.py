"""Results on standard output, as a table, JSON, YAML or names. Rich is loaded on terminals only."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from prism.sandbox.v1 import sandbox_pb2

from prism_cli.errors import printable
from prism_cli.options import Format
from prism_cli.quantities import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES: Final = {
    "READY": "green",
    "OK": "green",
    "LEADER": "green",
    "running": "green",
    "PENDING": "yellow",
    "SCHEDULED": "yellow",
    "STARTING": "yellow",
    "STOPPING": "yellow",
    "DELETING": "yellow",
    "SUSPECT": "yellow",
    "WARNING": "yellow",
    "STOPPED": "dim",
    "DELETED": "dim",
    "FAILED": "red",
    "LOST": "red",
    "CRITICAL": "red",
    "UNREACHABLE": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, or one line of a single result."""

    title: str
    value: Callable[[Any], str]


# ── Values ───────────────────────────────────────────────────────────────────────────────────


def plain(message: Message) -> dict[str, Any]:
    """Return a message as JSON knows it.

    Names are those of the protos; every field is there; a message that is not set is null; 64-bit
    numbers are numbers; states are without their prefix (READY).
    """
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {str(key): value[key] for key in sorted(value)}
    if field.is_repeated:
        return [_scalar(one, field) for one in value]
    if kind is not None and not message.HasField(field.name):
        return None
    return _scalar(value, field)


def _scalar(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp | Duration):
        return value.ToJsonString()
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return enum_name(field.enum_type, value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def enum_name(kind: Any, number: int) -> str:
    """Return a value's name without its enum's prefix; the number where it is not known."""
    known = kind.values_by_number.get(number)
    if known is None:
        return str(number)
    zero = kind.values_by_number[0].name
    return str(known.name).removeprefix(zero.removesuffix("UNSPECIFIED"))


def state_name(number: int) -> str:
    """Return a sandbox state's name, such as READY."""
    return enum_name(sandbox_pb2.SandboxState.DESCRIPTOR, number)


def age(moment: Timestamp) -> str:
    """Return the time since, such as 3m; `-` where it is not set."""
    if not moment.seconds and not moment.nanos:
        return "-"
    seconds = (datetime.now(UTC) - moment.ToDatetime(UTC)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (unit == "m" and seconds >= length):
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def when(moment: Timestamp) -> str:
    """Return local time and how long ago, or from now."""
    if not moment.seconds and not moment.nanos:
        return "-"
    local = moment.ToDatetime(UTC).astimezone()
    seconds = (datetime.now(UTC) - moment.ToDatetime(UTC)).total_seconds()
    ago = f"in {format_duration(-seconds)}" if seconds < 0 else f"{age(moment)} ago"
    return f"{local:%Y-%m-%d %H:%M:%S} ({ago})"


# ── Writing ──────────────────────────────────────────────────────────────────────────────────


def write_list(
    output: Format,
    items: Sequence[Any],
    columns: Sequence[Column],
    name: Callable[[Any], str],
    empty: str = "",
) -> None:
    """Write many results; JSON and YAML are an array, also where it holds nothing."""
    if output is Format.TABLE:
        write_table(items, columns)
        if not items and empty and sys.stdout.isatty():
            sys.stderr.write(f"{empty}\n")
    elif output is Format.NAME:
        write_lines(name(item) for item in items)
    else:
        write_data(output, [as_data(item) for item in items])


def write_one(output: Format, item: Any, name: str, columns: Sequence[Column]) -> None:
    """Write one result; a table is a line a fact."""
    if output is Format.TABLE:
        write_facts([(column.title, column.value(item)) for column in columns])
    elif output is Format.NAME:
        write_lines([name])
    else:
        write_data(output, as_data(item))


def as_data(item: Any) -> Any:
    """Return what JSON and YAML show of a message, or of data."""
    return plain(item) if isinstance(item, Message) else item


def write_data(output: Format, data: Any) -> None:
    """Write JSON or YAML."""
    if output is Format.YAML:
        import yaml

        yaml.safe_dump(data, sys.stdout, sort_keys=False, allow_unicode=True)
    else:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_record(output: Format, item: Any, name: str) -> None:
    """Write one of a stream of results: a line of JSON, a document of YAML, or a name."""
    if output is Format.NAME:
        sys.stdout.write(f"{name}\n")
    elif output is Format.JSON:
        sys.stdout.write(json.dumps(as_data(item), ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("---\n")
        write_data(output, as_data(item))
    sys.stdout.flush()


def write_lines(lines: Iterable[str]) -> None:
    """Write lines, without what a terminal would obey."""
    for line in lines:
        sys.stdout.write(printable(line) + "\n")


def write_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Write `title: value` lines, aligned; an empty title goes on with the line above."""
    width = max((len(title) for title, _ in facts), default=0) + 1
    colours = sys.stdout.isatty()
    for title, value in facts:
        label = f"{title}:" if title else ""
        text = printable(value)
        first, _, rest = text.partition(" ")
        if colours and (style := _STYLES.get(first.rstrip(":,"))) and not no_colour():
            text = f"{_ansi(style)}{first}\x1b[0m {rest}"
        sys.stdout.write(f"{label:<{width}} {text}".rstrip() + "\n")


def _ansi(style: str) -> str:
    return {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m", "dim": "\x1b[2m"}[style]


def no_colour() -> bool:
    """Return whether the user wants no colours."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def write_table(items: Sequence[Any], columns: Sequence[Column]) -> None:
    """Write a table: with colours and to the terminal's width, or plain and whole."""
    if sys.stdout.isatty():
        if items:
            console().print(rich_table(items, columns))
        return
    for line in table_lines(rows_of(items, columns), [column.title for column in columns]):
        sys.stdout.write(f"{line}\n")


def rows_of(items: Iterable[Any], columns: Sequence[Column]) -> list[list[str]]:
    """Return the cells."""
    return [[printable(column.value(item)) or "-" for column in columns] for item in items]


def table_lines(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> Iterator[str]:
    """Yield a plain table's lines, as wide as they need to be."""
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()


def rich_table(items: Iterable[Any], columns: Sequence[Column]) -> "Table":
    """Return a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        table.add_column(column.title, no_wrap=position == 0, overflow="fold")
    for row in rows_of(items, columns):
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


def console(stderr: bool = False) -> "Console":
    """Return rich's console; it honours NO_COLOR and TERM by itself."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Show that something is waited for, on a terminal only; yields what changes the text."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _: None
        return
    with console(stderr=True).status(printable(text)) as status:
        yield lambda new: status.update(printable(new))
