"""An agent of a plain user, started by tests that run as root."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.integration.agent.process import ROOT, AgentProcess

#: Nobody's: no account has it, and no range of subordinate ids. Each test process has its own.
UID = 61_234 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_DROP = (
    "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all",
    "--bounding-set=-all", "--",
)  # fmt: skip
_SYSTEM_PYTHON = "/usr/bin/python3"


@functools.cache
def python_command() -> tuple[str, ...]:
    """Return what runs Python with this project's packages as the plain user; empty: nothing does.

    The interpreter of these tests may be in a home directory that others cannot enter.
    """
    paths = f"{ROOT}:{ROOT / 'proto'}:{sysconfig.get_path('purelib')}"
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (str(Path(sys.executable).resolve()), _SYSTEM_PYTHON):
        command = ("env", f"PYTHONPATH={paths}", "HOME=/", python)
        code = (
            "import sys, grpc, msgspec, prism_agent.main; "
            "print(sys.executable, '%d.%d' % sys.version_info[:2])"
        )
        tried = subprocess.run(
            [*_DROP, *command, "-c", code], capture_output=True, text=True, check=False, cwd="/"
        )
        if tried.returncode == 0 and tried.stdout.split()[1:] == [own]:
            return command
    return ()


@functools.cache
def why_no_plain_user() -> str:
    """Return why no agent of a plain user can be started here; empty: it can."""
    if shutil.which("setpriv") is None:
        return "setpriv (util-linux) is not installed"
    if not python_command():
        return "no Python here can be run by other users with what the agent needs"
    namespaces = subprocess.run(
        [*_DROP, "unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False
    )
    if namespaces.returncode != 0:
        return "plain users may not make user namespaces here"
    return ""


@contextmanager
def home() -> Iterator[Path]:
    """Make a directory that the plain user owns and can reach; pytest's are of root alone."""
    with tempfile.TemporaryDirectory(prefix="prism-plain-") as name:
        os.chown(name, UID, UID)
        yield Path(name)


def plain_agent(directory: Path, control: str, *flags: str) -> AgentProcess:
    """Return an agent of the plain user, not started yet."""
    return AgentProcess(directory / "data", control, *flags, prefix=_DROP, python=python_command())


def processes() -> list[str]:
    """Return what runs as the plain user."""
    return [
        " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["uids", "cmdline", "status"])
        if process.info["uids"].real == UID and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
