"""The system's own tools for devices and rules, told what to do on their standard input."""

import json
import os
import shutil
import subprocess
from typing import Any, Final

#: They do a few system calls; a machine that is this slow has other troubles.
_TIMEOUT_S: Final = 20.0
_ERROR_LENGTH_MAX: Final = 300


class ToolError(OSError):
    """A tool refused; the text is its own."""

    def __init__(self, text: str) -> None:
        super().__init__(0, text[:_ERROR_LENGTH_MAX])


def missing() -> list[str]:
    """Return the Debian packages that are not installed."""
    packages = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
    return [package for program, package in packages.items() if _find(program) is None]


def _find(program: str) -> str | None:
    """Return where a program is: those of the system are often not on PATH, also for root."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")


def ip(lines: str) -> None:
    """Have `ip` perform lines, in the network namespace of this thread. Blocking.

    Raises:
        ToolError: One failed; those before it were performed.
    """
    _run(["ip", "-batch", "-"], lines)


def nft(transaction: str) -> None:
    """Have `nft` perform a transaction: all of it, or nothing. Blocking.

    Raises:
        ToolError: It was refused.
    """
    _run(["nft", "-f", "-"], transaction)


def links() -> list[dict[str, Any]]:
    """Return the network devices of this thread's namespace. Blocking."""
    found = json.loads(_run(["ip", "-json", "link", "show"], ""))
    return [each for each in found if isinstance(each, dict) and each.get("ifname")]


def routes(device: str) -> list[dict[str, Any]]:
    """Return the routes to a device of this thread's namespace. Blocking."""
    found = json.loads(_run(["ip", "-json", "-4", "route", "show", "dev", device], "") or "[]")
    return [each for each in found if isinstance(each, dict) and each.get("dst")]


def chains(table: str) -> list[str] | None:
    """Return the names of the chains of a table; None: there is no such table. Blocking."""
    objects = json.loads(_run(["nft", "--json", "list", "chains", "inet"], ""))["nftables"]
    listed = [each["chain"] for each in objects if "chain" in each]
    names = [each["name"] for each in listed if each["table"] == table]
    return names or None


def sets(table: str) -> list[str]:
    """Return the names of the sets of a table. Blocking."""
    objects = json.loads(_run(["nft", "--json", "list", "sets", "inet"], ""))["nftables"]
    listed = [each["set"] for each in objects if "set" in each]
    return [each["name"] for each in listed if each["table"] == table]


def _run(arguments: list[str], text: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            [_find(arguments[0]) or arguments[0], *arguments[1:]],
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{arguments[0]} does not answer") from None
    except OSError as error:
        raise ToolError(f"{arguments[0]}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ToolError(f"{arguments[0]}: {lines[0] if lines else 'failed'}")
    return done.stdout
