"""A fake control plane, and `prismctl` run as people run it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from typer.testing import CliRunner

from prism_cli.main import app
from tests.cli.fake_prism import FakePrism

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake() -> Iterator[FakePrism]:
    server = FakePrism()
    yield server
    server.stop()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    return {
        **kept,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "COLUMNS": "100",
        "PYTHONWARNINGS": "error",
    }


class Run(Protocol):
    def __call__(
        self, *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]: ...


class Spawn(Protocol):
    def __call__(self, *args: str) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def spawn(environment: dict[str, str], fake: FakePrism) -> Iterator[Spawn]:
    """Start `prismctl` against the fake, with pipes; it is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "prism_cli", *args],
            env=environment | {"PRISM_API": fake.address},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def bare(environment: dict[str, str]) -> Run:
    """Run `prismctl` without a server."""

    def run(
        *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        result = subprocess.run(
            [sys.executable, "-m", "prism_cli", *args],
            env=environment | (env or {}),
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert b"Traceback" not in result.stderr, result.stderr.decode()
        return result

    return run


@pytest.fixture
def inline(fake: FakePrism, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `prismctl` against the fake in this process: faster, where only words are looked at."""
    monkeypatch.setenv("PRISM_API", fake.address)
    monkeypatch.setenv("XDG_CONFIG_HOME", environment["XDG_CONFIG_HOME"])

    def run(
        *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        result = CliRunner().invoke(app, args, input=stdin, env=env, prog_name="prismctl")
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return subprocess.CompletedProcess(
            args, result.exit_code, result.stdout_bytes, result.stderr_bytes
        )

    return run


@pytest.fixture
def cli(bare: Run, fake: FakePrism) -> Run:
    """Run `prismctl` against the fake."""

    def run(
        *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return bare(*args, stdin=stdin, env={"PRISM_API": fake.address} | (env or {}))

    return run
