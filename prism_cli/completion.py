"""Shell completion: the scripts, and the names of sandboxes and nodes."""

import os
from enum import Enum
from typing import Annotated, Final

import typer

from prism_cli.options import Settings, command

COMPLETE_VARIABLE: Final = "_PRISMCTL_COMPLETE"
#: A shell that waits longer than this for a Tab feels broken.
_TIMEOUT_S: Final = 1.0


class Shell(str, Enum):  # noqa: UP042
    """Shells with a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def prepare() -> None:
    """Let typer answer a shell that completes; it costs nothing otherwise."""
    if COMPLETE_VARIABLE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @command(
        app,
        "completion",
        examples=[
            "source <(prismctl completion bash)",
            "prismctl completion zsh > ~/.zfunc/_prismctl",
            "prismctl completion fish > ~/.config/fish/completions/prismctl.fish",
        ],
    )
    def completion(
        settings: Settings, shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish.")]
    ) -> None:
        """Print the script that completes prismctl's words, and the names of sandboxes."""
        from typer._completion_shared import get_completion_script

        typer.echo(
            get_completion_script(
                prog_name="prismctl", complete_var=COMPLETE_VARIABLE, shell=shell.value
            )
        )


def complete_sandbox(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of sandboxes; none where no server answers at once."""
    from prism.sandbox.v1 import sandbox_pb2

    from prism_cli.client import Client
    from prism_common.errors import PrismError

    request = sandbox_pb2.ListSandboxesRequest(
        page_size=1000, consistency=sandbox_pb2.CONSISTENCY_STALE
    )
    try:
        with Client(_settings(context)) as client:
            page = client.call(lambda stubs: stubs.sandboxes.ListSandboxes, request)
    except PrismError:
        return []
    return [one.name for one in page.sandboxes if one.name.startswith(incomplete)]


def complete_node(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of nodes; none where no server answers at once."""
    from prism.node.v1 import node_pb2

    from prism_cli.client import Client
    from prism_common.errors import PrismError

    request = node_pb2.ListNodesRequest(page_size=1000)
    try:
        with Client(_settings(context)) as client:
            page = client.call(lambda stubs: stubs.nodes.ListNodes, request)
    except PrismError:
        return []
    return [one.name for one in page.nodes if one.name.startswith(incomplete)]


def _settings(context: typer.Context) -> Settings:
    api: str | None = context.params.get("global_api")
    return Settings(api=api or context.find_root().params.get("global_api"), timeout=_TIMEOUT_S)
