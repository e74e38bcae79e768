"""One sandbox or many, from the request to READY."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.batches import create_all, report_failures
from prism_cli.client import Client
from prism_cli.creation import create_sandbox
from prism_cli.errors import EXIT_FAILED, LeavingError, say
from prism_cli.options import Format, Settings
from prism_cli.output import as_data, spinner, write_data, write_lines
from prism_cli.progress import progress
from prism_cli.sandbox import progress_of
from prism_cli.watching import READY, wait_for_all, wait_until
from prism_common.errors import PrismError


def create_one(settings: Settings, request: pb.CreateSandboxRequest, wait: bool) -> pb.Sandbox:
    """Create one sandbox; with `wait`, return once it is READY."""
    with Client(settings) as client, spinner("creating a sandbox") as show:
        sandbox = create_sandbox(client, request)
        if wait:
            sandbox = wait_until(
                client, sandbox, READY, on_change=lambda seen: show(progress_of(seen))
            )
    return sandbox


def numbered(request: pb.CreateSandboxRequest, count: int) -> list[pb.CreateSandboxRequest]:
    """Return so many of a request: names and request ids numbered from 1.

    A repeat with the same --request-id so gives the same sandboxes.
    """
    many = []
    for number in range(1, count + 1):
        one = pb.CreateSandboxRequest.FromString(request.SerializeToString())
        one.name = f"{request.name}-{number}" if request.name else ""
        one.request_id = f"{request.request_id}-{number}"
        many.append(one)
    return many


def refuse_flags_beside_file(flags: Mapping[str, Any]) -> None:
    """Refuse flags that would say again what the file says.

    Raises:
        BadParameter: One was given.
    """
    defaults = {"image": "host", "on_node_loss": "lost"}
    for name, value in flags.items():
        if value and value != defaults.get(name):
            flag = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                "the file given by -f says that for each sandbox; write it there, or leave -f out",
                param_hint=f"'{flag}'",
            )


def create_many(
    settings: Settings, requests: Sequence[pb.CreateSandboxRequest], wait: bool
) -> None:
    """Create all; write those that were made, and list those that were not.

    Raises:
        Exit: With status 1 where any failed.
    """
    made: dict[int, pb.Sandbox] = {}
    failures: list[tuple[str, PrismError]] = []
    try:
        _create(settings, requests, made, failures)
        if wait:
            _wait(settings, made, failures)
    except (KeyboardInterrupt, LeavingError):
        _write(settings, made)
        say(f"interrupted; {len(made)} of {len(requests)} sandboxes exist: their names are written")
        raise
    _write(settings, made)
    if failures:
        report_failures(settings, failures)
        say(f"{len(failures)} of {len(requests)} failed")
        raise typer.Exit(EXIT_FAILED)


def _create(
    settings: Settings,
    requests: Sequence[pb.CreateSandboxRequest],
    made: dict[int, pb.Sandbox],
    failures: list[tuple[str, PrismError]],
) -> None:
    with progress("creating sandboxes", len(requests)) as advance:
        for item in create_all(settings, requests):
            if isinstance(item.outcome, PrismError):
                name = requests[item.position].name or f"sandbox {item.position + 1}"
                failures.append((name, item.outcome))
            else:
                made[item.position] = item.outcome
            advance(1)


def _wait(
    settings: Settings, made: dict[int, pb.Sandbox], failures: list[tuple[str, PrismError]]
) -> None:
    positions = {sandbox.id: position for position, sandbox in made.items()}
    with Client(settings) as client, progress("waiting until ready", len(made)) as advance:
        for sandbox, failure in wait_for_all(client, list(made.values()), READY):
            made[positions[sandbox.id]] = sandbox
            if failure is not None:
                failures.append(("", failure))
                del made[positions[sandbox.id]]
            advance(1)


def _write(settings: Settings, made: Mapping[int, pb.Sandbox]) -> None:
    sandboxes = [made[position] for position in sorted(made)]
    if settings.format in (Format.TABLE, Format.NAME):
        write_lines(sandbox.name for sandbox in sandboxes)
    else:
        write_data(settings.format, [as_data(sandbox) for sandbox in sandboxes])
    sys.stdout.flush()
