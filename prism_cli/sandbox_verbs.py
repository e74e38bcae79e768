"""`prismctl sandbox start`, `stop`, `pause`, `resume` and `rm`: one sandbox, or several at once."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prism_cli import quantities
from prism_cli.completion import complete_sandbox
from prism_cli.options import Format, Settings, command
from prism_cli.sandbox import Selector, Wait, app, progress_of, write_result

if TYPE_CHECKING:
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_common.errors import PrismError

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="Names or ids.",
        autocompletion=complete_sandbox,
        show_default=False,
    ),
]


# ── Changes of state ─────────────────────────────────────────────────────────────────────────


def _change(
    settings: Settings,
    names: list[str],
    doing: str,
    send: "Callable[[Client, str], sandbox_pb2.Sandbox]",
    wanted: str,
    *,
    wait: bool,
    passing: Collection[int] = (),
    longer_s: float = 0.0,
) -> None:
    """Ask for a change of each sandbox, wait for all of them, and write what came of each.

    All are asked before any is waited for, so that they change at the same time.

    Args:
        settings: Of the call.
        names: Names or ids.
        doing: Such as "starting".
        send: Asks for one sandbox's change.
        wanted: The state to wait for.
        wait: False: do not.
        passing: Ends that a sandbox may be in for now.
        longer_s: Added to the bound of a wait: what was asked for does not count as late.
    """
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.errors import UnreachableError
    from prism_cli.output import spinner
    from prism_cli.watching import wait_until
    from prism_common.errors import PrismError

    state = sandbox_pb2.SandboxState.Value(f"SANDBOX_STATE_{wanted}")
    changed: dict[str, sandbox_pb2.Sandbox] = {}
    failures: list[tuple[str, PrismError]] = []
    what = names[0] if len(names) == 1 else f"{len(names)} sandboxes"
    with Client(settings) as client, spinner(f"{doing} {what}") as show:
        for name in names:
            try:
                changed[name] = send(client, name)
            except UnreachableError:
                raise
            except PrismError as error:
                failures.append((name, error))
        client.timeout_s += longer_s
        for name in list(changed) if wait else ():
            try:
                changed[name] = wait_until(
                    client, changed[name], state, passing, lambda seen: show(progress_of(seen))
                )
            except UnreachableError:
                raise
            except PrismError as error:
                failures.append((name, error))
                del changed[name]
    if len(names) == 1 and changed:
        write_result(settings, *changed.values())
    elif len(names) > 1:
        write_results(settings, changed.values(), [one.name for one in changed.values()])
    end_with(settings, failures, len(names))


def write_results(
    settings: Settings, sandboxes: "Collection[sandbox_pb2.Sandbox]", names: Collection[str]
) -> None:
    """Write what came of several: names, or the data of each."""
    from prism_cli.output import as_data, write_data, write_lines

    if settings.format in (Format.TABLE, Format.NAME):
        write_lines(names)
    else:
        write_data(settings.format, [as_data(one) for one in sandboxes])


def end_with(settings: Settings, failures: "list[tuple[str, PrismError]]", asked: int) -> None:
    """Say what failed, each by its name where there were several, and end with status 1."""
    from prism_cli.batches import report_failures
    from prism_cli.errors import EXIT_FAILED

    if not failures:
        return
    report_failures(settings, [(name if asked > 1 else "", error) for name, error in failures])
    raise typer.Exit(EXIT_FAILED)


@command(app, "start", examples=["prismctl sandbox start web", "prismctl sandbox start web api"])
def start(settings: Settings, names: Names, wait: Wait = True) -> None:
    """Start stopped sandboxes again, with their files."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id

    def send(client: "Client", name: str) -> sandbox_pb2.Sandbox:
        request = sandbox_pb2.StartSandboxRequest(sandbox=name, request_id=new_request_id())
        return client.call(lambda stubs: stubs.sandboxes.StartSandbox, request)

    stopped = {int(sandbox_pb2.SANDBOX_STATE_STOPPED)}
    _change(settings, names, "starting", send, "READY", wait=wait, passing=stopped)


@command(
    app,
    "stop",
    examples=["prismctl sandbox stop web", "prismctl sandbox stop web api --grace 30s"],
)
def stop(
    settings: Settings,
    names: Names,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="TIME",
            parser=quantities.parse_duration,
            help="From SIGTERM to SIGKILL.  [default: 5s]",
        ),
    ] = None,
    wait: Wait = True,
) -> None:
    """End all processes of sandboxes, and keep their files."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id, to_duration

    def send(client: "Client", name: str) -> sandbox_pb2.Sandbox:
        request = sandbox_pb2.StopSandboxRequest(
            sandbox=name, request_id=new_request_id(), grace_period=to_duration(grace)
        )
        return client.call(lambda stubs: stubs.sandboxes.StopSandbox, request)

    _change(settings, names, "stopping", send, "STOPPED", wait=wait, longer_s=grace or 0.0)


@command(app, "pause", examples=["prismctl sandbox pause web", "prismctl sandbox pause web api"])
def pause(settings: Settings, names: Names, wait: Wait = True) -> None:
    """Freeze all processes of sandboxes: they keep their memory and use no processor time."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id

    def send(client: "Client", name: str) -> sandbox_pb2.Sandbox:
        request = sandbox_pb2.PauseSandboxRequest(sandbox=name, request_id=new_request_id())
        return client.call(lambda stubs: stubs.sandboxes.PauseSandbox, request)

    _change(settings, names, "pausing", send, "PAUSED", wait=wait)


@command(app, "resume", examples=["prismctl sandbox resume web", "prismctl sandbox resume web api"])
def resume(settings: Settings, names: Names, wait: Wait = True) -> None:
    """Thaw paused sandboxes: their processes go on where they were."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id

    def send(client: "Client", name: str) -> sandbox_pb2.Sandbox:
        request = sandbox_pb2.ResumeSandboxRequest(sandbox=name, request_id=new_request_id())
        return client.call(lambda stubs: stubs.sandboxes.ResumeSandbox, request)

    _change(settings, names, "resuming", send, "READY", wait=wait)


# ── Removal ──────────────────────────────────────────────────────────────────────────────────


@command(
    app,
    "rm",
    examples=[
        "prismctl sandbox rm web",
        "prismctl sandbox rm --force web api worker",
        "prismctl sandbox rm --selector job=42,team=search",
        "prismctl sandbox rm --all --yes",
        "prismctl sandbox ls --state failed -o name | xargs prismctl sandbox rm --no-wait",
    ],
)
def rm(
    settings: Settings,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Names or ids.",
            autocompletion=complete_sandbox,
            show_default=False,
        ),
    ] = None,
    selector: Selector = None,
    every: Annotated[bool, typer.Option("--all", help="All that exist; asks first.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Kill at once, with no grace period.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until nothing is left of it.")
    ] = True,
) -> None:
    """Remove sandboxes, in whatever state they are: by name, by their labels, or all.

    Each that cannot be removed is listed with the reason, and the exit status is then 1.
    """
    ways = [bool(names), bool(selector), every]
    if sum(ways) != 1:
        given = "nothing is named" if not any(ways) else "these exclude each other"
        raise typer.BadParameter(f"{given}; give one of NAME, --selector, --all")
    if names:
        chosen = [(name, name) for name in dict.fromkeys(names)]
    else:
        found = _select(settings, quantities.parse_selector(selector))
        if every and found and not yes:
            _confirm(len(found))
        chosen = [(one.name, one.id) for one in found]
    _remove(settings, chosen, force=force, wait=wait)


def _select(settings: Settings, labels: dict[str, str]) -> "list[sandbox_pb2.Sandbox]":
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client, list_sandboxes
    from prism_cli.errors import say

    with Client(settings) as client:
        request = sandbox_pb2.ListSandboxesRequest(label_selector=labels)
        found, _ = list_sandboxes(client, request)
    if not found:
        say("no sandbox has these labels" if labels else "no sandboxes")
    return found


def _confirm(count: int) -> None:
    import sys

    if not sys.stdin.isatty():
        raise typer.BadParameter(
            f"would remove {count} sandboxes; nobody can be asked here: give --yes",
            param_hint="'--all'",
        )
    typer.confirm(f"Remove all {count} sandboxes?", abort=True, err=True)


def _remove(settings: Settings, chosen: list[tuple[str, str]], *, force: bool, wait: bool) -> None:
    """Remove what was chosen: each with the name to say and the name or id to send."""
    from prism_cli.batches import delete_all
    from prism_cli.client import Client
    from prism_cli.output import spinner
    from prism_cli.progress import progress
    from prism_common.errors import PrismError

    removed: dict[int, Any] = {}
    failures: list[tuple[str, PrismError]] = []
    if len(chosen) == 1:
        ((name, reference),) = chosen
        with Client(settings) as client, spinner(f"removing {name}"):
            removed[0] = remove_sandbox(client, reference, force=force, wait=wait)
    elif chosen:
        requests = [_delete_request(one, force=force, wait=wait) for _, one in chosen]
        with progress("removing sandboxes", len(chosen)) as advance:
            for item in delete_all(settings, requests):
                advance(1)
                if isinstance(item.outcome, PrismError):
                    failures.append((chosen[item.position][0], item.outcome))
                else:
                    removed[item.position] = item.outcome
    order = sorted(removed)
    write_results(
        settings, [removed[position] for position in order], [chosen[one][0] for one in order]
    )
    end_with(settings, failures, len(chosen))


def remove_sandbox(
    client: "Client", name: str, *, force: bool, wait: bool
) -> "sandbox_pb2.Sandbox":
    """Delete one sandbox; with `wait`, return once nothing is left of it."""
    request = _delete_request(name, force=force, wait=wait)
    return client.call(lambda stubs: stubs.sandboxes.DeleteSandbox, request)


def _delete_request(name: str, *, force: bool, wait: bool) -> "sandbox_pb2.DeleteSandboxRequest":
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id

    return sandbox_pb2.DeleteSandboxRequest(
        sandbox=name, request_id=new_request_id(), force=force, wait=wait
    )
