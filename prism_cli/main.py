"""Registers the commands. What they need is loaded when they run."""

import contextlib
import inspect
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from prism_cli import (
    cluster,
    completion,
    doctor,
    node,
    peer,
    sandbox,
    sandbox_cp,
    sandbox_exec,
    sandbox_logs,
    sandbox_port,
    sandbox_top,
    sandbox_update,
    sandbox_verbs,
)
from prism_cli.bench import command as bench
from prism_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED
from prism_cli.options import keyword_options, merge, new_app
from prism_common import __version__

app = new_app(
    "Prism runs code that nobody would run on their own machine.\n\n"
    "\b\nExamples:\n"
    "  prismctl sandbox run -- python3 -c 'print(6 * 7)'\n"
    "  prismctl sandbox create web --memory 1Gi\n"
    "  prismctl sandbox exec web -- uname -a\n"
    "  prismctl --api node1:8008,node2:8008 info"
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"prismctl {__version__}")
        raise typer.Exit


def _root(context: typer.Context, version: bool, **given: Any) -> None:
    context.obj = merge(None, given)


_version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
]
_parameters = [
    inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
    inspect.Parameter(
        "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_version
    ),
    *keyword_options(),
]
_root.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
_root.__annotations__ = {one.name: one.annotation for one in _parameters}
app.callback()(_root)

app.add_typer(sandbox.app, name="sandbox")
app.add_typer(node.app, name="node")
app.add_typer(peer.app, name="peer")
cluster.register(app)
doctor.register(app)
completion.register(app)
bench.register(app)
#: Imported for the commands that they add to `sandbox`.
_MORE_OF_SANDBOX = (
    sandbox_exec,
    sandbox_logs,
    sandbox_port,
    sandbox_cp,
    sandbox_top,
    sandbox_update,
    sandbox_verbs,
)


def main() -> None:
    """Run `prismctl`."""
    completion.prepare()
    try:
        app(prog_name="prismctl")
    except SystemExit as ended:
        _leave(ended.code)
    except KeyboardInterrupt:  # before a command has begun
        _leave(EXIT_INTERRUPTED)


def _leave(code: object) -> NoReturn:
    """End this process as `SystemExit(code)` does, without taking the interpreter down.

    gRPC's threads may still run, and taking it down below them can block for good
    (grpc/grpc#40620). What has to be undone was undone when the command ended.
    """
    status = 0 if code is None else code if isinstance(code, int) else EXIT_FAILED
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(status)
