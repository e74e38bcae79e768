"""Files of sandboxes to create: YAML or JSON, one or many, in the words of the flags."""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer

from prism_cli import quantities
from prism_common.names import shorten

#: A file of 100,000 sandboxes with labels is a third of it.
_FILE_BYTES_MAX: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Spec:
    """One sandbox as the file describes it: values as `make_request` takes them."""

    where: str
    values: dict[str, Any]


def read_specs(path: str) -> list[Spec]:
    """Return what a file describes; `-` is standard input.

    Raises:
        BadParameter: It cannot be read, or something in it is wrong: with the line or the item.
    """
    text = _read(path)
    shown = "standard input" if path == "-" else path
    specs = [_spec(item) for item in _items(shown, text)]
    if not specs:
        raise _wrong(f"{shown}: describes no sandbox")
    return specs


def _wrong(text: str) -> typer.BadParameter:
    return typer.BadParameter(text, param_hint="'-f'")


def _read(path: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(_FILE_BYTES_MAX + 1)
        if len(data) > _FILE_BYTES_MAX:
            raise _wrong(f"{path}: more than {quantities.format_bytes(_FILE_BYTES_MAX)}; split it")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise _wrong(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise _wrong(f"{path}: is not UTF-8 text") from None


# ── Structure ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Raw:
    """One mapping of the file, and where each of its keys is."""

    where: str
    values: Mapping[str, Any]
    places: Mapping[str, str]


def _items(path: str, text: str) -> Iterator[_Raw]:
    if path.endswith(".json") or text.lstrip()[:1] in ("{", "["):
        yield from _json_items(text, path)
    else:
        yield from _yaml_items(text, path)


def _json_items(text: str, path: str) -> Iterator[_Raw]:
    try:
        data = json.loads(text, object_pairs_hook=_unique_pairs)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _wrong(f"{path}: is not JSON: {error}") from None
    except _RepeatedKeyError as error:
        raise _wrong(f"{path}: {shorten(error.key)} is given twice") from None
    many = isinstance(data, list)
    for index, one in enumerate(data if many else [data]):
        where = f"{path}: item {index}" if many else path
        if not isinstance(one, dict):
            raise _wrong(f'{where}: is no sandbox; write an object, such as {{"cpu": 1}}')
        yield _Raw(where, one, dict.fromkeys(one, where))


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def _yaml_items(text: str, path: str) -> Iterator[_Raw]:
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        while loader.check_node():
            document = loader.get_node()
            if document.tag == "tag:yaml.org,2002:null":
                continue  # nothing between two ---
            many = isinstance(document, yaml.SequenceNode)
            for node in document.value if many else [document]:
                yield _yaml_item(loader, node, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise _wrong(f"{path}:{line} is not YAML: {problem}") from None
    except RecursionError:
        raise _wrong(f"{path}: is nested too deep") from None
    finally:
        loader.dispose()


def _yaml_item(loader: Any, node: Any, path: str) -> _Raw:
    import yaml

    where = f"{path}: line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(f"{where}: is no sandbox; write keys, such as cpu: 1")
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key_node, value_node in node.value:
        place = f"{path}: line {key_node.start_mark.line + 1}"
        key = str(key_node.value)
        if key in values:
            raise _wrong(f"{place}: {shorten(key)} is given twice")
        values[key] = loader.construct_object(value_node, deep=True)
        places[key] = place
    return _Raw(where, values, places)


# ── Values ───────────────────────────────────────────────────────────────────────────────────


def _spec(raw: _Raw) -> Spec:
    values: dict[str, Any] = {}
    for key, value in raw.values.items():
        where = raw.places[key]
        read = _READERS.get(key)
        if read is None:
            close = difflib.get_close_matches(key.replace("-", "_"), _READERS, 1)
            meant = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(_READERS)}"
            raise _wrong(f"{where}: unknown key {shorten(key)}{meant}")
        if value is None:
            continue
        try:
            values[_ARGUMENT_OF.get(key, key)] = read(value)
        except typer.BadParameter as error:
            raise _wrong(f"{where}: {key}: {error.message}") from None
    return Spec(raw.where, values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise typer.BadParameter(f"{shorten(str(value))} is not text; quote it")
    return value


def _quantity(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise typer.BadParameter(f"{shorten(str(value))} is not a quantity")
        return parse(str(value))

    return read


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise typer.BadParameter(f"{shorten(str(value))} is not a whole number")
    if not -(2**31) <= value < 2**31:
        raise typer.BadParameter(f"{value} is out of range")
    return value


def _pairs(value: Any) -> list[str]:
    if not isinstance(value, dict):
        raise typer.BadParameter("is no mapping; write keys with values below it")
    for key, one in value.items():
        if not isinstance(key, str) or isinstance(one, bool) or not isinstance(one, str | int):
            raise typer.BadParameter(f"{shorten(f'{key}: {one}')} is not text; quote it")
    return [f"{key}={one}" for key, one in value.items()]


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise typer.BadParameter("is no list of texts; write one a line, each after a dash")
    return value


def _choice(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise typer.BadParameter(f"{shorten(str(value))} is none of {', '.join(words)}")
        return str(value)

    return read


#: What a file may say, and how it is read. The words are those of the flags.
_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "name": _text,
    "image": _text,
    "cpu": _quantity(quantities.parse_cpu),
    "memory": _quantity(quantities.parse_bytes),
    "disk": _quantity(quantities.parse_bytes),
    "processes": _whole,
    "output_rate": _quantity(quantities.parse_bytes),
    "env": _pairs,
    "labels": _pairs,
    "ttl": _quantity(quantities.parse_positive_duration),
    "idle_timeout": _quantity(quantities.parse_positive_duration),
    "runtime": _text,
    "network": _choice("none", "egress"),
    "allow": _texts,
    "allow_dns": _texts,
    "node_selector": _pairs,
    "on_node_loss": _choice("lost", "reschedule"),
    "priority": _whole,
    "request_id": _text,
}
#: Where `make_request` has another name for it.
_ARGUMENT_OF: Final = {"labels": "label"}
