"""`prismctl sandbox exec`, `attach`, `execs` and `run`: commands in a sandbox."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from prism_cli import quantities
from prism_cli import sandbox as options
from prism_cli.options import Format, Settings, command
from prism_cli.sandbox import Name, app

if TYPE_CHECKING:
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.streams import ExecSession
    from prism_cli.terminal import LocalTerminal

Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Send standard input to the command.")
]
Terminal = Annotated[
    bool, typer.Option("--tty", "-t", help="Give the command a terminal; with -i, this one.")
]
ExecEnv = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="KEY=VALUE", help="Variable; may be given again."),
]
Cwd = Annotated[
    str,
    typer.Option("--cwd", "-w", metavar="DIR", help="Working directory.  [default: /workspace]"),
]
User = Annotated[str, typer.Option("--user", "-u", metavar="USER", help="User in the sandbox.")]
ExecTimeout = Annotated[
    float | None,
    typer.Option(
        "--exec-timeout",
        metavar="TIME",
        parser=quantities.parse_positive_duration,
        help="SIGKILL after this time: 10m.",
    ),
]


@command(
    app,
    "exec",
    takes_command=True,
    examples=[
        "prismctl sandbox exec web -- python3 -c 'print(6 * 7)'",
        "prismctl sandbox exec -it web -- bash",
        "prismctl sandbox exec -i web -- sh < script.sh",
        "prismctl sandbox exec web --env MODE=test --cwd /tmp -- env",
        "prismctl sandbox exec web --detach -- sleep 600",
    ],
)
def exec_(
    settings: Settings,
    name: Name,
    argv: list[str],
    interactive: Interactive = False,
    tty: Terminal = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Print the exec's id, and leave it running.")
    ] = False,
    env: ExecEnv = None,
    cwd: Cwd = "",
    user: User = "",
    exec_timeout: ExecTimeout = None,
) -> None:
    r"""Run a command in a sandbox; its output, signals and exit status are this one's.

    It runs as it is written, without a shell. If the connection breaks, it goes on: prismctl
    attaches again. Ctrl-C and SIGTERM go to the command; Ctrl-\ leaves it running. With -it
    every key goes to the command; Ctrl-P Ctrl-Q leaves it running.
    """
    from prism_cli.client import Client
    from prism_cli.output import write_data, write_lines
    from prism_cli.streams import ExecSession

    if detach and interactive:
        raise typer.BadParameter("a detached command has no input", param_hint="'-i'")
    local_terminal(tty and not detach)
    start = make_start(
        argv, stdin=interactive, tty=tty, env=env, cwd=cwd, user=user, exec_timeout=exec_timeout
    )
    start.sandbox, start.detach = name, detach
    with Client(settings) as client:
        terminal = local_terminal(tty and not detach)
        session = ExecSession(client, name, start, stdin=interactive, terminal=terminal)
        if not detach:
            raise typer.Exit(follow(session, argv))
        exec_id = session.start_detached()
    if settings.format in (Format.TABLE, Format.NAME):
        write_lines([exec_id])
    else:
        write_data(settings.format, {"exec_id": exec_id})


@command(
    app,
    "attach",
    examples=[
        "prismctl sandbox attach web ex-0123456789",
        "prismctl sandbox attach -it web ex-0123456789",
        "prismctl sandbox attach web ex-0123456789 --after 4096",
    ],
)
def attach(
    settings: Settings,
    name: Name,
    exec_id: Annotated[str, typer.Argument(metavar="EXEC_ID", help="From exec --detach or execs.")],
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Send standard input and signals to it.")
    ] = False,
    tty: Annotated[
        bool, typer.Option("--tty", "-t", help="The exec has a terminal: with -i, be this one.")
    ] = False,
    after: Annotated[
        int,
        typer.Option(
            "--after", metavar="N", min=0, max=2**63 - 1, help="Skip the first N bytes of output."
        ),
    ] = 0,
) -> None:
    """Show the output of an exec from its beginning, and its exit status once it ends.

    Ctrl-C leaves it running, unless -i is given: then it goes to the exec. With -it every key
    does; Ctrl-P Ctrl-Q leaves it running.
    """
    from prism_cli.client import Client
    from prism_cli.streams import ExecSession

    terminal = local_terminal(tty)
    with Client(settings) as client:
        session = ExecSession(
            client,
            name,
            None,
            exec_id=exec_id,
            after_sequence=after,
            stdin=interactive,
            forward_signals=interactive,
            terminal=terminal,
        )
        raise typer.Exit(follow(session, []))


@command(
    app,
    "execs",
    examples=["prismctl sandbox execs web", "prismctl sandbox execs web -o name"],
)
def execs(settings: Settings, name: Name) -> None:
    """List the commands that were run in a sandbox, also those that have ended."""
    import shlex

    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_cli.output import Column, age, write_list

    with Client(settings) as client:
        request = sandbox_pb2.ListExecsRequest(sandbox=name)
        reply = client.call(lambda stubs: stubs.sandboxes.ListExecs, request)
    write_list(
        settings.format,
        reply.execs,
        [
            Column("ID", lambda one: one.exec_id),
            Column("STATUS", status_in_words),
            Column("AGE", lambda one: age(one.start_time)),
            Column("OUTPUT", lambda one: quantities.format_bytes(one.sequence)),
            Column("COMMAND", lambda one: shlex.join(one.argv)),
        ],
        lambda one: str(one.exec_id),
        empty=f"nothing was run in {name} yet",
    )


@command(
    app,
    "run",
    takes_command=True,
    examples=[
        "prismctl sandbox run -- python3 -c 'print(6 * 7)'",
        "prismctl sandbox run --cpu 2 --memory 1Gi --exec-timeout 10m -- make test",
        "echo 'print(6 * 7)' | prismctl sandbox run -i -- python3 -",
    ],
)
def run(
    settings: Settings,
    argv: list[str],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Name; without one, one is made.")
    ] = "",
    image: options.Image = "host",
    cpu: options.Cpu = None,
    memory: options.Memory = None,
    disk: options.Disk = None,
    processes: options.Processes = None,
    output_rate: options.OutputRate = None,
    env: options.Env = None,
    label: options.Label = None,
    ttl: options.Ttl = None,
    idle_timeout: options.IdleTimeout = None,
    runtime: options.Runtime = "",
    network: options.Network = None,
    allow: options.Allow = None,
    allow_dns: options.AllowDns = None,
    node_selector: options.NodeSelector = None,
    priority: options.Priority = 0,
    interactive: Interactive = False,
    tty: Terminal = False,
    cwd: Cwd = "",
    user: User = "",
    exec_timeout: ExecTimeout = None,
) -> None:
    """Create a sandbox, run one command in it, and remove it, whatever happens.

    The exit status is the command's.
    """
    from prism_cli.creation import make_request

    request = make_request(
        name=name,
        image=image,
        cpu=cpu,
        memory=memory,
        disk=disk,
        processes=processes,
        output_rate=output_rate,
        env=env,
        label=label,
        ttl=ttl,
        idle_timeout=idle_timeout,
        runtime=runtime,
        network=network.value if network else "",
        allow=allow,
        allow_dns=allow_dns,
        node_selector=node_selector,
        on_node_loss="lost",
        priority=priority,
        request_id=None,
    )
    terminal = local_terminal(tty)
    start = make_start(
        argv, stdin=interactive, tty=tty, env=None, cwd=cwd, user=user, exec_timeout=exec_timeout
    )
    raise typer.Exit(_run_in_new(settings, request, start, terminal))


def _run_in_new(
    settings: Settings,
    request: "sandbox_pb2.CreateSandboxRequest",
    start: "sandbox_pb2.ExecStart",
    terminal: "LocalTerminal | None",
) -> int:
    """Create a sandbox, run one command in it, and remove it; return the command's status."""
    from prism_cli.client import Client
    from prism_cli.creation import create_sandbox
    from prism_cli.output import spinner
    from prism_cli.streams import ExecSession
    from prism_cli.watching import READY, wait_until

    with Client(settings) as client, removed_after(client, request) as keep:
        with spinner("creating a sandbox"):
            sandbox = create_sandbox(client, request)
            keep.CopyFrom(sandbox)
            wait_until(client, sandbox, READY)
        start.sandbox = sandbox.id
        session = ExecSession(
            client, sandbox.id, start, stdin=start.stdin, terminal=terminal, detach_keys=False
        )
        return follow(session, list(start.argv))


@contextmanager
def removed_after(
    client: "Client", request: "sandbox_pb2.CreateSandboxRequest"
) -> "Iterator[sandbox_pb2.Sandbox]":
    """Remove the sandbox that is created inside, also if its creation was interrupted.

    An interrupted creation is sent again with the same request id: that gives the sandbox if it
    was made, and its id in any case.
    """
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import create_sandbox
    from prism_cli.errors import LeavingError, say
    from prism_cli.sandbox_verbs import remove_sandbox
    from prism_common.errors import PrismError

    sandbox = sandbox_pb2.Sandbox()
    interrupted = False
    try:
        yield sandbox
    except (KeyboardInterrupt, LeavingError):
        interrupted = True
        raise
    finally:
        try:
            if interrupted and not sandbox.id:
                sandbox = create_sandbox(client, request)
            if sandbox.id:
                remove_sandbox(client, sandbox.id, force=True, wait=True)
        except (PrismError, KeyboardInterrupt) as error:
            why = error.message if isinstance(error, PrismError) else "interrupted"
            say(
                f"sandbox {sandbox.name or request.request_id} may be left ({why}); "
                f"remove it: prismctl sandbox rm {sandbox.name or 'NAME'}"
            )


def local_terminal(tty: bool) -> "LocalTerminal | None":
    """Return the terminal on standard input where -t asks for one."""
    from prism_cli.terminal import LocalTerminal

    if not tty:
        return None
    if not os.isatty(0):
        raise typer.BadParameter(
            "standard input is not a terminal; leave -t out (-i alone sends piped input)",
            param_hint="'-t'",
        )
    return LocalTerminal()


def make_start(
    argv: list[str],
    *,
    stdin: bool,
    tty: bool,
    env: list[str] | None,
    cwd: str,
    user: str,
    exec_timeout: float | None,
) -> "sandbox_pb2.ExecStart":
    """Return what to run, without the sandbox."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.creation import new_request_id, to_duration
    from prism_cli.terminal import LocalTerminal

    rows, columns = LocalTerminal().size()
    variables = quantities.parse_pairs(env, "--env", "MODE=test")
    if tty:
        ours = {key: os.environ.get(key, "") for key in ("TERM", "COLORTERM")}
        variables = {key: value for key, value in ours.items() if value} | variables
    return sandbox_pb2.ExecStart(
        request_id=new_request_id(),
        argv=argv,
        env=variables,
        cwd=cwd,
        user=user,
        stdin=stdin,
        terminal=sandbox_pb2.WindowSize(rows=rows, columns=columns) if tty else None,
        timeout=to_duration(exec_timeout),
    )


def follow(session: "ExecSession", argv: list[str]) -> int:
    """Follow an exec to its end; say why it ended where its output does not; return its status."""
    from prism_cli.errors import say
    from prism_cli.streams import exit_status

    ended = session.run()
    program = argv[0] if argv else "the command"
    words = {
        "OUT_OF_MEMORY": "killed: out of the sandbox's memory; give more with create --memory",
        "TIMEOUT": "killed: its --exec-timeout passed",
        "NOT_FOUND": "no such program in the sandbox",
        "NOT_EXECUTABLE": "cannot be executed in the sandbox",
    }
    if ended.reason:
        say(f"{program}: {words.get(ended.reason, ended.reason)}")
    return exit_status(ended)


def status_in_words(one: "sandbox_pb2.ExecInfo") -> str:
    """Return how an exec is: running, exited 0, or SIGKILL (OUT_OF_MEMORY)."""
    if one.running or not one.HasField("exit"):
        return "running"
    if one.exit.signal:
        try:
            words = signal.Signals(one.exit.signal).name
        except ValueError:
            words = f"signal {one.exit.signal}"
    else:
        words = f"exited {one.exit.exit_code}"
    return f"{words} ({one.exit.reason})" if one.exit.reason else words
