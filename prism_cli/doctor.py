"""`prismctl doctor`: whether this machine can run Prism, and what to do where it cannot."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import typer

from prism_cli.errors import EXIT_FAILED
from prism_cli.options import Format, Settings, command

Status = Literal["OK", "WARNING", "CRITICAL"]
#: A program that does not answer in this time counts as broken.
_PROGRAM_TIMEOUT_S: Final = 10.0
#: The agent really starts one sandbox of each runtime.
_PROBE_TIMEOUT_S: Final = 60.0
_API_TIMEOUT_S: Final = 2.0
_PORTS: Final = (
    (4200, "prismd --raft"),
    (8008, "prismd --api"),
    (9420, "prismd --metrics"),
    (7117, "prism-agent --listen"),
    (9421, "prism-agent --metrics"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    message: str


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @command(app, "doctor", examples=["prismctl doctor", "prismctl doctor -o json"])
    def doctor(settings: Settings) -> None:
        """Check this machine: isolation, limits, programs and ports; and that an API answers.

        Exit status 1 if something that an agent needs is missing.
        """
        from prism_cli.output import Column, spinner, write_list

        with spinner("checking this machine"):
            checks = [*machine_checks(), *probe_checks(), api_check(settings)]
        items: list[Any] = list(checks)
        if settings.format in (Format.JSON, Format.YAML):
            items = [asdict(check) for check in checks]
        write_list(
            settings.format,
            items,
            [
                Column("CHECK", lambda check: check.name),
                Column("STATUS", lambda check: check.status),
                Column("FOUND", lambda check: check.message),
            ],
            lambda check: str(check.name),
        )
        if any(check.status == "CRITICAL" for check in checks):
            raise typer.Exit(EXIT_FAILED)


def machine_checks() -> Iterator[Check]:
    """Yield what this machine has."""
    yield _system_check()
    yield _python_check()
    yield from _bubblewrap_checks()
    yield _cgroup_check()
    yield _seccomp_check()
    yield _compiler_check()
    for port, flag in _PORTS:
        yield _port_check(port, flag)


def _system_check() -> Check:
    system = os.uname()
    if system.sysname != "Linux":
        return Check("system", "CRITICAL", f"{system.sysname}: sandboxes need Linux")
    return Check("system", "OK", f"Linux {system.release}, {system.machine}")


def _python_check() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python3", "OK", f"{version} at {sys.executable}")


def _bubblewrap_checks() -> Iterator[Check]:
    path = shutil.which("bwrap")
    if path is None:
        yield Check("bwrap", "CRITICAL", "not found; install the system's package bubblewrap")
        yield _namespace_setting_check()
        return
    version = _run([path, "--version"])
    yield Check("bwrap", "OK", f"{version.stdout.strip()} at {path}")
    tried = _run(
        [path, "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--", "/bin/true"]
    )
    if tried.returncode == 0:
        yield Check("user namespaces", "OK", "a process was started in new namespaces")
        return
    setting = _namespace_setting_check()
    reason = tried.stderr.strip() or f"exit status {tried.returncode}"
    advice = setting.message if setting.status != "OK" else "see the kernel's log"
    yield Check("user namespaces", "CRITICAL", f"{reason}; {advice}")


def _namespace_setting_check() -> Check:
    name = "user namespaces"
    for path, bad, advice in (
        ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
        (
            "/proc/sys/kernel/unprivileged_userns_clone",
            "0",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile for bwrap",
        ),
    ):
        if _read(path).strip() == bad:
            return Check(name, "CRITICAL", f"forbidden by {path}={bad}; as root: {advice}")
    return Check(name, "OK", "not forbidden by the kernel's settings")


def _cgroup_check() -> Check:
    controllers = _read("/sys/fs/cgroup/cgroup.controllers").split()
    wanted = {"cpu", "memory", "pids"}
    if wanted <= set(controllers):
        return Check("cgroups", "OK", f"v2 with {' '.join(controllers)}")
    first_version = {
        line.split()[0]
        for line in _read("/proc/cgroups").splitlines()
        if not line.startswith("#") and line.split()[1] != "0"
    }
    if wanted <= first_version:
        writable = os.access("/sys/fs/cgroup/memory", os.W_OK)
        if writable:
            return Check("cgroups", "OK", "v1 with cpu memory pids")
        return Check("cgroups", "WARNING", "v1, not writable for this user; run the agent as root")
    missing = " ".join(sorted(wanted - set(controllers) - first_version))
    return Check("cgroups", "WARNING", f"no controller {missing}: such limits are not enforced")


def _seccomp_check() -> Check:
    import ctypes

    for name in ("libseccomp.so.2", "libseccomp.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return Check("libseccomp", "OK", name)
    return Check("libseccomp", "WARNING", "not found; install the system's package libseccomp2")


def _compiler_check() -> Check:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return Check("cc", "OK", path)
    return Check("cc", "WARNING", "no C compiler; needed once, to build the agent's supervisor")


def _port_check(port: int, flag: str) -> Check:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            return Check(
                f"port {port}", "WARNING", f"{error.strerror}: running already? else move {flag}"
            )
    return Check(f"port {port}", "OK", f"free for {flag}")


def probe_checks() -> Iterator[Check]:
    """Yield what the agent says of its runtimes. It is run as a program: each line is JSON."""
    path = find_agent()
    if path is None:
        yield Check("prism-agent", "WARNING", "not found beside prismctl nor in PATH")
        return
    probed = _run([path, "--probe"], _PROBE_TIMEOUT_S)
    runtimes = [one for one in map(_json_object, probed.stdout.splitlines()) if one]
    if not runtimes:
        lines = probed.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit status {probed.returncode}"
        yield Check("prism-agent", "WARNING", f"{path} --probe says nothing of runtimes: {why}")
        return
    ready = any(one.get("ready") and one.get("name") != "fake" for one in runtimes)
    for one in runtimes:
        words = f"{one.get('version') or ''} {one.get('message') or ''}".strip()
        status: Status = "OK" if one.get("ready") else "WARNING" if ready else "CRITICAL"
        state = "ready" if one.get("ready") else "not ready"
        yield Check(
            f"runtime {one.get('name', '?')}", status, f"{state}: {words}" if words else state
        )


def find_agent() -> str | None:
    """Return the agent's program: beside this one, or in PATH."""
    for directory in (Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent):
        beside = directory / "prism-agent"
        if os.access(beside, os.X_OK) and beside.is_file():
            return str(beside)
    return shutil.which("prism-agent")


def api_check(settings: Settings) -> Check:
    """Ask the API how the cluster is."""
    from prism.cluster.v1 import cluster_pb2

    from prism_cli.client import Client
    from prism_common.errors import PrismError

    quick = Settings(api=settings.api, timeout=settings.timeout or _API_TIMEOUT_S)
    _, source = settings.addresses()
    try:
        with Client(quick) as client:
            request = cluster_pb2.GetClusterRequest()
            cluster = client.call(lambda stubs: stubs.cluster.GetCluster, request)
            address = client.address
    except PrismError as error:
        return Check("api", "WARNING" if source == "default" else "CRITICAL", error.message)
    if not cluster.leader_id:
        return Check("api", "WARNING", f"{address} answers, and knows no leader")
    if cluster.warnings:
        return Check("api", "WARNING", f"{address} answers: {cluster.warnings[0]}")
    return Check("api", "OK", f"{address} answers, version {cluster.version}")


def _run(
    argv: list[str], timeout_s: float = _PROGRAM_TIMEOUT_S
) -> "subprocess.CompletedProcess[str]":
    """Run a program without a shell; a failure to run it is in the result."""
    try:
        return subprocess.run(  # noqa: S603  (argv is ours, no shell)
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace",
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", f"no answer within {timeout_s:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(argv, 1, "", error.strerror or str(error))


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "name" in value else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
