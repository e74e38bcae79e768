"""Flag over environment over file over default, and one line for what is wrong."""

from pathlib import Path

import click
import pytest

from prism_common import settings
from prism_common.errors import InvalidArgumentError, NotFoundError, StartupError

SEEN: dict[str, object] = {}


@click.command(name="demo")
@click.option("--name", default="default")
@click.option("--queue-size", type=int, default=1)
@click.option("--bootstrap", is_flag=True)
@settings.boolean_option("--batching-enabled", True, "Batch.")
@settings.common_options
def demo(**flags: object) -> int:
    SEEN.clear()
    SEEN.update(flags)
    error = {
        "refused": InvalidArgumentError("--name: refused", field="--name"),
        "absent": StartupError("--name: absent"),
        "lost": NotFoundError("lost"),
    }.get(str(flags["name"]))
    if error is not None:
        raise error
    return 0


def _run(*argv: str) -> dict[str, object]:
    assert settings.run(demo, argv) == 0
    return dict(SEEN)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text('name = "file"\nqueue-size = 2\nbatching-enabled = false\nbootstrap = true\n')
    return path


def test_flag_wins_over_environment_over_file_over_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run()["name"] == "default"
    assert _run("--config", str(config))["name"] == "file"
    monkeypatch.setenv("PRISM_NAME", "environment")
    assert _run("--config", str(config))["name"] == "environment"
    assert _run("--config", str(config), "--name", "flag")["name"] == "flag"
    assert _run("--name=flag", f"--config={config}")["name"] == "flag"


def test_the_file_takes_every_type(config: Path) -> None:
    flags = _run(f"--config={config}")
    assert (flags["queue_size"], flags["batching_enabled"], flags["bootstrap"]) == (2, False, True)


def test_the_file_may_be_named_in_the_environment(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_CONFIG", str(config))
    assert _run()["queue_size"] == 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True), (["--batching-enabled"], True), (["--batching-enabled=true"], True),
        (["--batching-enabled=false"], False), (["--batching-enabled", "false"], False),
        (["--batching-enabled=0"], False), (["--batching-enabled", "--name=x"], True),
    ],
)  # fmt: skip
def test_booleans_have_both_spellings(argv: list[str], expected: bool) -> None:
    assert _run(*argv)["batching_enabled"] is expected


@pytest.mark.parametrize(("text", "expected"), [("false", False), ("1", True)])
def test_booleans_come_from_the_environment(
    text: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_BATCHING_ENABLED", text)
    assert _run()["batching_enabled"] is expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nmae = 'x'", "unknown key 'nmae'"),
        ("version = true", "unknown key"),
        ("config = 'x'", "unknown key"),
        ("queue-size = 3.5", "--queue-size"),
        ("queue-size = true", "--queue-size"),
        ("queue-size = 'many'", "--queue-size"),
        ("batching-enabled = 'perhaps'", "--batching-enabled"),
        ("[name]\nx = 1", "name: give a text"),
        ("name = ", "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_a_bad_file_is_one_line_and_status_2(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content.encode("latin-1"))
    assert settings.run(demo, [f"--config={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: ")
    assert words in line


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--queue-size=x"], 2, "--queue-size"),
        (["--nothing"], 2, "--nothing"),
        (["--name=refused"], 2, "--name: refused"),
        (["--name=absent"], 1, "--name: absent"),
        (["--name=lost"], 1, "lost"),
        (["--config=/no/such"], 2, "--config"),
        (["--log-level=loud"], 2, "--log-level"),
    ],
)
def test_failures_are_one_line_and_a_status(
    argv: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.run(demo, argv) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_version_and_help_are_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.run(demo, ["--version"]) == 0
    assert settings.run(demo, ["--help"]) == 0
    assert "--batching-enabled" in capsys.readouterr().out
