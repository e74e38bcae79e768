"""Compiles the supervisor, PID 1 of every sandbox, into the package."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = ("supervisor.c", "output.c", "start.c", "launch.c", "socket.c", "named.c", "rate.c",
            "relay.c")  # fmt: skip
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-static")


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs for wheels, and for `pip install -e .`; the result is of one platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as not pure."""
        if self.target_name != "wheel":
            return
        directory = Path(self.root) / "prism_agent" / "supervisor"
        build_supervisor(directory)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append("/prism_agent/supervisor/prism-supervisor")


def _platform() -> str:
    # Static, so it needs no C library of the machine that it runs on.
    return f"linux_{os.uname().machine}"


def build_supervisor(directory: Path) -> Path:
    """Compile the supervisor with $CC, or cc."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise SystemExit(
            f"prism: no C compiler: {compiler[0]} was not found. prism-agent's supervisor is "
            "written in C; install one (Debian: apt install gcc libc6-dev), or set CC."
        )
    target = directory / "prism-supervisor"
    draft = directory / "prism-supervisor.partial"
    command = [*compiler, *_FLAGS, "-o", str(draft), *(str(directory / name) for name in _SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise SystemExit(f"prism: the supervisor does not compile:\n{done.stdout}{done.stderr}")
    # A rename, since the old one may be running: sandboxes of a running agent keep it.
    draft.replace(target)
    return target


if __name__ == "__main__":
    print(build_supervisor(Path(__file__).parent / "prism_agent" / "supervisor"))
