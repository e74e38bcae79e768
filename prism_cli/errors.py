"""Failures as one clear line on standard error, and the exit status that goes with it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer

from prism_cli.options import Settings
from prism_common.errors import PrismError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141  # what the shell says of a process that SIGPIPE ended

#: Fields of requests, and the flags or arguments that set them.
FLAG_OF_FIELD: Final = {
    "name": "NAME",
    "sandbox": "NAME",
    "node": "NODE",
    "request_id": "--request-id",
    "page_token": "the page token",
    "spec.image": "--image",
    "spec.runtime": "--runtime",
    "spec.env": "--env",
    "spec.labels": "--label",
    "spec.network.mode": "--network",
    "spec.network.rules": "--allow",
    "spec.network.names": "--allow-dns",
    "spec.ttl": "--ttl",
    "spec.idle_timeout": "--idle-timeout",
    "spec.on_node_loss": "--on-node-loss",
    "spec.priority": "--priority",
    "spec.node_selector": "--node-selector",
    "spec.limits.cpu_millicores": "--cpu",
    "spec.limits.memory_bytes": "--memory",
    "spec.limits.disk_bytes": "--disk",
    "spec.limits.processes_max": "--processes",
    "spec.limits.output_bytes_per_second": "--output-rate",
    "limits.cpu_millicores": "--cpu",
    "limits.memory_bytes": "--memory",
    "limits.disk_bytes": "--disk",
    "limits.processes_max": "--processes",
    "expire_time": "--ttl",
    "labels": "--label",
    "label_selector": "--selector",
    "states": "--state",
    "grace_period": "--grace",
    "argv": "COMMAND",
    "env": "--env",
    "cwd": "--cwd",
    "user": "--user",
    "timeout": "--exec-timeout",
    "terminal": "-t",
    "exec_id": "EXEC_ID",
    "since": "--since",
}
#: How to see what exists, by the word that a NOT_FOUND begins with.
_LIST_OF: Final = {
    "sandbox": "prismctl sandbox ls",
    "node": "prismctl node ls",
    "exec": "prismctl sandbox execs NAME",
    "exec_id": "prismctl sandbox execs NAME",
}
#: Prefixes that some fields come with: the message that holds them.
_FIELD_PREFIXES: Final = ("start.", "request.", "exec_start.")


class CliError(PrismError):
    """A failure that this program found by itself."""

    reason = "FAILED"


class UnreachableError(PrismError):
    """No control node answers."""

    reason = "UNREACHABLE"


class LeavingError(Exception):
    """The user's signal ends this program, and not what runs in the sandbox."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_status = 128 + signal_number


@contextmanager
def reported(settings: Settings) -> Iterator[None]:
    """Turn expected failures into one line and an exit status."""
    try:
        with leaving_by_signal():
            yield
        sys.stdout.flush()
    except PrismError as error:
        report(error, settings)
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        sys.unraisablehook = _say_nothing
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except LeavingError as leaving:
        sys.unraisablehook = _say_nothing
        raise typer.Exit(leaving.exit_status) from None
    except UnicodeEncodeError:
        say("the command line holds bytes that are not UTF-8")
        raise typer.Exit(EXIT_USAGE) from None
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit(EXIT_BROKEN_PIPE) from None


@contextmanager
def leaving_by_signal() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind this program, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise LeavingError(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_nothing(_: object) -> None:
    """Ignore what the interpreter cannot raise.

    A signal may come while gRPC makes a call: that half-made object complains when it is freed.
    """


def silence_stdout() -> None:
    """Give standard output to /dev/null: its reader is gone, and the last flush must not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def say(line: str) -> None:
    """Write one line for people to standard error."""
    try:
        sys.stderr.write(f"prismctl: {printable(line)}\n")
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads it


def report(error: PrismError, settings: Settings, about: str = "") -> None:
    """Write the line of a failure, and with -v its details."""
    line = describe(error)
    say(f"{about}: {line}" if about else line)
    if settings.verbose:
        for detail in details_of(error):
            sys.stderr.write(f"  {printable(detail)}\n")


def printable(text: str) -> str:
    """Return `text` on one line, and without what a terminal would obey."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in text.strip().replace("\n", "; ")
    )


def describe(error: PrismError) -> str:
    """Return the line: what is wrong, by the user's own words, and what to do."""
    message = error.message or f"the server gave no message ({error.code})"
    for field, description in field_violations(error):
        flag = _flag_of(field)
        text = description or message
        return f"{flag}: {text.removeprefix(f'{field}: ')}"
    hint = _hint(error)
    if not hint or hint in message:
        return message
    return f"{message.rstrip('.')}; {hint}"


def _flag_of(field: str) -> str:
    name = field
    for prefix in _FIELD_PREFIXES:
        name = name.removeprefix(prefix)
    name, bracket, key = name.partition("[")
    return FLAG_OF_FIELD.get(name, name) + (f" {key.rstrip(']')}" if bracket else "")


def _hint(error: PrismError) -> str:
    """Return what to do about it."""
    code = status_name(error)
    if error.code.startswith("FILE_"):
        return ""
    if error.code == "REQUEST_ID_REUSED":
        return "give another --request-id, or none"
    if code == "NOT_FOUND":
        noun = error.message.split()[0].rstrip(":") if error.message else ""
        return "what there is: " + _LIST_OF.get(noun, _LIST_OF["sandbox"])
    if code == "ALREADY_EXISTS":
        return "choose another name, or remove it first: prismctl sandbox rm NAME"
    if error.code == "NOT_AN_API":
        return ""
    if code == "UNIMPLEMENTED" and "not served" not in error.message:
        return "this server does not serve it (yet)"
    if code == "OUT_OF_RANGE":
        return "list again"
    if code == "DEADLINE_EXCEEDED":
        return "give it longer with --timeout; what was asked for may still happen"
    if error.code == "NO_LEADER":
        return "how the cluster is: prismctl info"
    if error.retry_after_s is not None:
        return f"try again in {max(error.retry_after_s, 0.1):.1f} s"
    return ""


def status_name(error: PrismError) -> str:
    """Return the status code's name; empty for a failure that no server reported."""
    status_code = getattr(error, "status_code", None)
    return str(status_code.name) if status_code is not None else ""


def field_violations(error: PrismError) -> list[tuple[str, str]]:
    """Return the fields that the server refused, each with why."""
    status = getattr(error, "status", None)
    if status is None:
        return []
    from google.rpc import error_details_pb2

    found: list[tuple[str, str]] = []
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            found += [(one.field, one.description) for one in bad.field_violations]
    return found


def details_of(error: PrismError) -> list[str]:
    """Return what -v shows."""
    lines = [f"reason: {error.code}"]
    if code := status_name(error):
        lines.append(f"status: {code}")
    lines += [f"field {field}: {why}" for field, why in field_violations(error)]
    lines += [f"{key}: {value}" for key, value in sorted(error.metadata.items())]
    if error.retry_after_s is not None:
        lines.append(f"retry after: {error.retry_after_s:g} s")
    lines += list(getattr(error, "__notes__", ()))
    return lines
