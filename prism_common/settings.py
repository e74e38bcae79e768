"""Daemon settings: flag > environment (PRISM_…) > TOML file (--config) > default."""

import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from prism_common import __version__, descriptors, log
from prism_common.errors import InvalidArgumentError, PrismError

ENV_PREFIX: Final = "PRISM"

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


def boolean_option(name: str, default: bool, help_text: str) -> Callable[[Any], Any]:
    """Return an option that takes --x, --x=true and --x=false alike."""
    return click.option(
        name,
        type=click.BOOL,
        is_flag=False,
        flag_value="true",
        default=default,
        show_default=True,
        metavar="[true|false]",
        help=help_text,
    )


def _read_config(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        content = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{value}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value}: not TOML: {error}") from None
    known = {option.name for option in context.command.params} - {"config", "version"}
    defaults: dict[str, Any] = {}
    for key, setting in content.items():
        name = key.replace("-", "_")
        if name not in known:
            accepted = ", ".join(sorted(str(item).replace("_", "-") for item in known))
            raise click.BadParameter(f"{value}: unknown key {key!r}; known: {accepted}")
        defaults[name] = _as_flag(setting, f"{value}: {key}")
    context.default_map = defaults


def _as_flag(setting: object, where: str) -> str:
    """Return a setting as one would give it as a flag: so that it is checked like one."""
    if isinstance(setting, bool):
        return "true" if setting else "false"
    if isinstance(setting, list) and all(isinstance(item, str) for item in setting):
        return ",".join(setting)
    if isinstance(setting, str | int | float):
        return str(setting)
    raise click.BadParameter(f"{where}: give a text, a number, true, false, or a list of texts")


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config, the logging flags and --version."""
    for option in (
        click.version_option(__version__, "--version", message="%(prog)s %(version)s"),
        click.option("--log-file", type=click.Path(dir_okay=False), help="Log to this file."),
        click.option(
            "--log-format",
            type=click.Choice(["console", "json"]),
            default="console",
            show_default=True,
            help="For people, or for programs.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(log.LEVELS),
            default="info",
            show_default=True,
            help="Log what is at least this important.",
        ),
        click.option(
            "--config",
            type=click.Path(dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="TOML file with flags as keys; flags and environment win over it.",
        ),
    ):
        command = option(command)
    return command


def run(command: click.Command, argv: Sequence[str] | None = None) -> int:
    """Run a daemon's command; return its exit status. Expected failures are one line.

    Returns:
        0: stopped as asked. 1: could not start or go on. 2: the flags are wrong.
    """
    name = command.name or "prism"
    descriptors.allow_most()
    try:
        result = command.main(
            args=list(argv) if argv is not None else None,
            prog_name=name,
            standalone_mode=False,
            auto_envvar_prefix=ENV_PREFIX,
        )
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        message = " ".join(error.format_message().split())
        print(f"{name}: {message} (see {name} --help)", file=sys.stderr)
        return EXIT_USAGE
    except InvalidArgumentError as error:
        print(f"{name}: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except PrismError as error:
        print(f"{name}: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    except (KeyboardInterrupt, click.Abort):
        return 130
    return int(result or 0)
