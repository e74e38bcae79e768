"""Settings of a call, where they come from, and how a command is registered."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from prism_cli import quantities
from prism_common.addresses import parse_address
from prism_common.errors import InvalidArgumentError

DEFAULT_API: Final = "127.0.0.1:8008"
DEFAULT_API_PORT: Final = 8008
#: A call gives up after this time unless --timeout says otherwise.
TIMEOUT_S_DEFAULT: Final = 30.0
#: A server that is away is waited for this long unless --timeout says otherwise: long enough for
#: a restart or an election, short enough for someone who mistyped an address.
CONNECT_WINDOW_S: Final = 3.0

#: Where a command line for the sandbox is kept between parsing and the call.
_ARGV: Final = "prism_cli.argv"

Source = Literal["--api", "PRISM_API", "context file", "default"]


class Format(str, Enum):  # noqa: UP042  (typer lists the values of an Enum in the help)
    """How results are written."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the global options said; None where nothing was given."""

    api: str | None = None
    output: Format | None = None
    timeout: float | None = None
    verbose: bool = False

    @property
    def format(self) -> Format:
        """The output format, table by default."""
        return self.output or Format.TABLE

    @property
    def timeout_s(self) -> float:
        """Bound of each call and each wait."""
        return TIMEOUT_S_DEFAULT if self.timeout is None else self.timeout

    @property
    def connect_window_s(self) -> float:
        """How long to look for a server that answers."""
        return CONNECT_WINDOW_S if self.timeout is None else self.timeout

    def addresses(self) -> tuple[list[str], Source]:
        """Return the API addresses to try, in order, and where they come from.

        Raises:
            InvalidArgumentError: One is not HOST:PORT, or the context file cannot be read.
        """
        text, source, name = self._api_text()
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise InvalidArgumentError(f"{name}: no address; write HOST:PORT", field="api")
        return [str(parse_address(part, name, DEFAULT_API_PORT)) for part in parts], source

    def _api_text(self) -> tuple[str, Source, str]:
        if self.api is not None:
            return self.api, "--api", "--api"
        if os.environ.get("PRISM_API"):
            return os.environ["PRISM_API"], "PRISM_API", "PRISM_API"
        path = context_path()
        from_file = _read_context(path)
        if from_file is not None:
            return from_file, "context file", str(path)
        return DEFAULT_API, "default", "--api"


def context_path() -> Path:
    """Return where the context file is looked for."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "prism" / "context.toml"


def _read_context(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path}: cannot be read: {error}", field="api") from None
    import tomllib

    try:
        api = tomllib.loads(text).get("api")
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"{path}: not valid TOML: {error}", field="api") from None
    if isinstance(api, list) and all(isinstance(part, str) for part in api):
        return ",".join(api)
    if api is not None and not isinstance(api, str):
        raise InvalidArgumentError(
            f'{path}: api must be text, such as api = "127.0.0.1:8008"', field="api"
        )
    return api


_Api = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="HOST:PORT[,…]",
        help="Control nodes to try in turn. Also PRISM_API, or `api` in "
        f"~/.config/prism/context.toml.  [default: {DEFAULT_API}]",
    ),
]
_Output = Annotated[
    Format | None,
    typer.Option(
        "-o", "--output", metavar="FORMAT", help="table, json, yaml or name.  [default: table]"
    ),
]
_Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=quantities.parse_positive_duration,
        help="Bound of each call and each wait, such as 90s.  "
        f"[default: {TIMEOUT_S_DEFAULT:.0f}s; {CONNECT_WINDOW_S:.0f}s to connect]",
    ),
]
_Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the details of errors.")]

GLOBAL_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "api": (_Api, None),
    "output": (_Output, None),
    "timeout": (_Timeout, None),
    "verbose": (_Verbose, False),
}


def keyword_options() -> list[inspect.Parameter]:
    """Return the global options as parameters of a function that typer reads."""
    return [
        inspect.Parameter(
            f"global_{name}", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in GLOBAL_OPTIONS.items()
    ]


def merge(outer: object, given: dict[str, Any]) -> Settings:
    """Return the settings of a call: those after the verb win over those before the noun."""
    settings = outer if isinstance(outer, Settings) else Settings()
    api, output, timeout = given["global_api"], given["global_output"], given["global_timeout"]
    return Settings(
        api=settings.api if api is None else api,
        output=settings.output if output is None else output,
        timeout=settings.timeout if timeout is None else timeout,
        verbose=settings.verbose or given["global_verbose"],
    )


def new_app(summary: str) -> typer.Typer:
    """Return a noun, or the whole program: plain help, which starts in half the time of rich's."""
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def command(
    app: typer.Typer,
    name: str,
    *,
    examples: Sequence[str],
    takes_command: bool = False,
    hidden: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    The function takes Settings first; its docstring is the help. The global options are added,
    and expected failures become one line and an exit status.

    Args:
        app: The noun.
        name: The verb.
        examples: Shown under the help.
        takes_command: A command line for the sandbox follows `--`; the function gets it as argv.
        hidden: Not listed.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def call(context: typer.Context, **given: Any) -> None:
            from prism_cli.errors import reported

            outer = {key: given.pop(key) for key in list(given) if key.startswith("global_")}
            settings = merge(context.obj, outer)
            if takes_command:
                given["argv"] = context.meta[_ARGV]
            with reported(settings):
                function(settings, **given)

        own = list(inspect.signature(function).parameters.values())[1:]
        if takes_command:
            own = [parameter for parameter in own if parameter.name != "argv"]
        parameters = [
            inspect.Parameter(
                "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
            ),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *keyword_options(),
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        del call.__wrapped__  # typer would read the original
        text = inspect.cleandoc(function.__doc__ or "")
        shown = "\n".join(f"  {example}" for example in examples)
        kind = _command_after_dashes() if takes_command else None
        app.command(name, cls=kind, help=f"{text}\n\n\b\nExamples:\n{shown}", hidden=hidden)(call)
        return function

    return register


def _command_after_dashes() -> Any:
    """Return a kind of command that takes the sandbox's command line after `--`.

    Without `--`, `exec web grep -i x` would give `-i` to prismctl.
    """
    from typer.core import TyperCommand

    class CommandAfterDashes(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            split = args.index("--") if "--" in args else len(args)
            own, argv = args[:split], args[split + 1 :]
            ctx.meta[_ARGV] = argv
            asks_help = any(argument in ctx.help_option_names for argument in own)
            if not argv and not asks_help and not ctx.resilient_parsing:
                raise typer.BadParameter(
                    "no command; write it after --, such as: -- python3 -c 'print(1)'",
                    ctx=ctx,
                    param_hint="'COMMAND'",
                )
            return super().parse_args(ctx, own)

        def collect_usage_pieces(self, ctx: Any) -> list[str]:
            return [*super().collect_usage_pieces(ctx), "-- COMMAND [ARG]..."]

    return CommandAfterDashes
