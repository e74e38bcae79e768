"""Help, completion, quantities and formatting, in this process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from prism.sandbox.v1 import sandbox_pb2 as pb
from typer.testing import CliRunner

from prism_cli import output, quantities
from prism_cli.main import app
from prism_cli.sandbox import STATES
from prism_cli.sandbox_views import COLUMNS
from tests.cli.conftest import Run
from tests.cli.fake_prism import FakePrism

VERBS = [
    *(("sandbox", verb) for verb in (
        "create", "ls", "info", "exec", "attach", "execs", "logs", "start", "stop", "pause",
        "resume", "rm", "run", "cp", "port", "top", "update")),
    *(("node", verb) for verb in ("ls", "info", "top", "cordon", "uncordon", "drain")),
    *(("peer", verb) for verb in ("ls", "info", "add", "rm", "transfer-leader")),
    ("info",), ("backup",), ("doctor",), ("completion",), ("bench",),
]  # fmt: skip


@pytest.mark.parametrize("words", [(), *VERBS])
def test_every_command_has_help_with_examples(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert f"prismctl {' '.join(words)}" in result.output.split("Examples:")[1]
    if words:
        for option in ("--api", "--output", "--timeout", "--verbose"):
            assert option in result.output


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from walk(child, (*path, name))
        else:
            yield (*path, name)


def test_only_what_is_served_is_registered() -> None:
    assert sorted(walk(typer.main.get_command(app))) == sorted(VERBS)


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == "prismctl 0.1.0\n"


def test_states_are_those_of_the_proto() -> None:
    known = [name.removeprefix("SANDBOX_STATE_") for name in pb.SandboxState.keys()[1:]]
    assert list(STATES) == known


def test_nothing_slow_is_imported_for_help() -> None:
    script = (
        "import sys; import prism_cli.main as m;"
        "bad = {'grpc', 'rich', 'yaml', 'google.protobuf', 'asyncio'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=_environment())


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    path = f"{root}{os.pathsep}{root / 'proto'}"
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path}


# ── Completion ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(cli: Run, shell: str) -> None:
    result = cli("completion", shell)
    assert result.returncode == 0
    assert f"_PRISMCTL_COMPLETE=complete_{shell}".encode() in result.stdout
    assert cli("completion", "tcsh").returncode == 2


def test_names_of_sandboxes_are_completed(cli: Run, fake: FakePrism) -> None:
    fake.put("web", pb.SANDBOX_STATE_READY)
    fake.put("db", pb.SANDBOX_STATE_READY)
    env = {"_PRISMCTL_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    result = cli(env=env | {"COMP_WORDS": "prismctl sandbox info w"})
    assert result.stdout.split() == [b"web"]
    result = cli(
        env=env | {"COMP_WORDS": f"prismctl --api {fake.address} sandbox rm", "COMP_CWORD": "5",
                   "PRISM_API": "127.0.0.1:1"},
    )  # fmt: skip
    assert result.stdout.split() == [b"web", b"db"]


def test_completion_without_a_server_is_empty(bare: Run) -> None:
    env = {"_PRISMCTL_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    result = bare(env=env | {"COMP_WORDS": "prismctl sandbox info w", "PRISM_API": "127.0.0.1:1"})
    assert (result.stdout.strip(), result.stderr) == (b"", b"")


# ── Quantities ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 500), ("2", 2000), ("0.5", 500), ("1m", 1), ("1.25", 1250)]
)
def test_cpu(text: str, value: int) -> None:
    assert quantities.parse_cpu(text) == value
    assert quantities.parse_cpu(quantities.format_cpu(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("256Mi", 2**28), ("1Gi", 2**30), ("1.5Gi", 3 * 2**29), ("10", 10), ("2k", 2000),
     ("3MB", 3_000_000), ("1KiB", 1024), ("2Ti", 2**41)],
)  # fmt: skip
def test_sizes(text: str, value: int) -> None:
    assert quantities.parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("90s", 90), ("1h30m", 5400), ("500ms", 0.5), ("1d", 86400), ("45", 45), ("1.5s", 1.5),
     ("0", 0)],
)  # fmt: skip
def test_durations(text: str, value: float) -> None:
    assert quantities.parse_duration(text) == value


@pytest.mark.parametrize("text", ["", "m", "1h 30m", "30m1h", "-5s", "1e3", "１h", "inf", "5 s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        quantities.parse_duration(text)


@pytest.mark.parametrize("text", ["", "m", "-1", "1 ", "inf", "nan", "1e9", "300", "1µ", "0.0001"])
def test_bad_cpu(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        quantities.parse_cpu(text)


def test_since_is_an_age_or_a_moment() -> None:
    before = datetime.now(UTC) - timedelta(minutes=10)
    moment = quantities.parse_since("10m")
    assert before <= moment <= datetime.now(UTC) - timedelta(minutes=10)
    parsed = quantities.parse_since("2025-01-31T12:00:00+01:00")
    assert parsed == datetime(2025, 1, 31, 11, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2**28, "256Mi"), (2**30, "1Gi"), (3 * 2**29, "1.5Gi"), (0, "0"), (2**50, "1024Ti")],
)
def test_sizes_are_shown_short(value: int, text: str) -> None:
    assert quantities.format_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (61, "1m"), (3600, "60m"), (7200, "2h"), (200_000, "2d")],
)
def test_ages(seconds: int, text: str) -> None:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) - timedelta(seconds=seconds))
    assert output.age(moment) == text


# ── Output ───────────────────────────────────────────────────────────────────────────────────


def test_json_has_every_field_and_plain_values() -> None:
    data = output.plain(pb.Sandbox(state=99, revision=2**53, spec=pb.SandboxSpec(env={"A": "b"})))  # type: ignore[arg-type]
    assert set(data) == {field.name for field in pb.Sandbox.DESCRIPTOR.fields}
    assert (data["state"], data["revision"], data["spec"]["env"]) == ("99", 2**53, {"A": "b"})
    assert data["spec"]["limits"] is None


@pytest.mark.parametrize("no_color", [False, True])
def test_tables_are_coloured_on_terminals_only_and_never_obey_names(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    sandboxes = [pb.Sandbox(name="[red]x[/]", state=pb.SANDBOX_STATE_READY, message="\x1b[2J")]
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=120, highlight=False, markup=False)
    console.print(output.rich_table(sandboxes, COLUMNS))
    assert "[red]x[/]" in text.getvalue()
    assert ("\x1b[32mREADY" in text.getvalue()) is not no_color
    assert "\x1b[2J" not in text.getvalue()


def test_runner_shows_a_list_and_a_usage_error(
    fake: FakePrism, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_API", fake.address)
    fake.put("web", pb.SANDBOX_STATE_READY)
    result = CliRunner().invoke(app, ["sandbox", "ls"])
    assert (result.exit_code, "web   READY" in result.output) == (0, True)
    assert CliRunner().invoke(app, ["-o", "yaml", "sandbox", "ls", "-o", "name"]).output == "web\n"
    assert CliRunner().invoke(app, ["sandbox", "create", "--cpu", "x"]).exit_code == 2
