"""`prism-agent`: the flags, and what they mean."""

import asyncio
import gc
import re
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal

import click

from prism_agent import limits
from prism_agent.purge import purge
from prism_agent.resources import CapacityFlags
from prism_agent.selftest import selftest
from prism_agent.server import Agent, Settings
from prism_common import limits as common_limits
from prism_common import log, settings
from prism_common.addresses import parse_address
from prism_common.errors import InvalidArgumentError
from prism_common.names import generate_name, shorten, validate_labels, validate_name

_HELP = """Runs sandboxes on this machine for a Prism control plane.

SIGTERM and SIGINT end the agent and leave its sandboxes running: the next prism-agent with the same
--data-dir takes them over, with their execs. --on-exit=delete removes them instead.
"""
_SUFFIXES: Final = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
                    "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}  # fmt: skip
_SLOTS_MAX: Final = 100_000
_STARTS_MAX: Final = 256
#: Some objects of each sandbox live as long as it does: at the default of 700 the collector looks
#: at all of them again and again, and finds nothing.
GC_THRESHOLDS: Final = (50_000, 20, 50)
_WARM_POOL_MAX: Final = 1024
_DNS_PORT: Final = 53


def parse_size(text: str, flag: str, minimum: int) -> int:
    """Parse bytes such as 512Mi, 4G or 1048576.

    Raises:
        InvalidArgumentError: It is not a size of at least `minimum`.
    """
    match = re.fullmatch(r"(\d{1,15})([KMGT]i|[kMGT]?)", text)
    size = int(match[1]) * _SUFFIXES[match[2]] if match else 0
    if size < minimum or size > common_limits.MEMORY_BYTES_MAX:
        raise InvalidArgumentError(
            f"{flag}: {shorten(text)} is not a size: use {minimum // 2**20}Mi to 4096Gi", field=flag
        )
    return size


def parse_cpu(text: str, flag: str) -> int:
    """Parse processor time such as 4, 2.5 or 500m.

    Raises:
        InvalidArgumentError: It is not 1m to 256 cores.
    """
    match = re.fullmatch(r"(\d{1,7})m|(\d{1,4}(?:\.\d{1,3})?)", text)
    millicores = 0
    if match:
        millicores = int(match[1]) if match[1] else round(float(match[2]) * 1000)
    if not 1 <= millicores <= common_limits.CPU_MILLICORES_MAX:
        raise InvalidArgumentError(
            f"{flag}: {shorten(text)} is not processor time: use 1m to 256 (cores)", field=flag
        )
    return millicores


def parse_labels(pairs: tuple[str, ...], flag: str) -> dict[str, str]:
    """Parse k=v pairs, each also a list with commas, as an environment variable has it."""
    labels: dict[str, str] = {}
    for pair in (part for text in pairs for part in text.split(",") if part):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidArgumentError(f"{flag}: {shorten(pair)} is not KEY=VALUE", field=flag)
        labels[key] = value
    return validate_labels(labels, flag)


def parse_servers(texts: tuple[str, ...], flag: str) -> list[tuple[str, int]]:
    """Parse the addresses of DNS servers, each with or without a port.

    Raises:
        InvalidArgumentError: One is no IP.
    """
    servers = []
    for text in _split(texts):
        address = parse_address(text, flag, _DNS_PORT)
        try:
            ip_address(address.host)
        except ValueError:
            raise InvalidArgumentError(
                f"{flag}: {shorten(text)} is not an IP, such as 192.0.2.53 or 192.0.2.53:5353",
                field=flag,
            ) from None
        servers.append((address.host, address.port))
    return servers


def _range(value: int, flag: str, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgumentError(f"{flag}: {value}; use {low} to {high}", field=flag)
    return value


def _build(flags: dict[str, Any]) -> Settings:
    control = [str(parse_address(each, "--control", 8008)) for each in _split(flags["control"])]
    advertise = flags["advertise"]
    listen = parse_address(flags["listen"], "--listen", 7117)
    if advertise:
        advertise = str(parse_address(advertise, "--advertise", listen.port))
    elif listen.is_wildcard and control:
        raise InvalidArgumentError(
            f"--advertise: needed with --listen={listen}, which nobody can dial", field="advertise"
        )
    return Settings(
        name=validate_name(flags["name"], "--name") if flags["name"] else generate_name(),
        data_dir=Path(flags["data_dir"]).absolute(),
        listen=listen,
        metrics=parse_address(flags["metrics"], "--metrics", 9421),
        advertise=advertise,
        control=control,
        runtime=flags["runtime"],
        labels=parse_labels(flags["label"], "--label"),
        insecure=flags["insecure"],
        starts_max=_range(flags["max_starts"], "--max-starts", 1, _STARTS_MAX),
        warm_pool=_range(flags["warm_pool"], "--warm-pool", 0, _WARM_POOL_MAX),
        on_exit=_on_exit(flags["on_exit"]),
        dns_servers=parse_servers(flags["dns_servers"], "--dns-servers"),
        capacity=CapacityFlags(
            cpu_millicores=parse_cpu(flags["cpu"], "--cpu") if flags["cpu"] else None,
            memory_bytes=parse_size(flags["memory"], "--memory", common_limits.MEMORY_BYTES_MIN)
            if flags["memory"]
            else None,
            disk_bytes=parse_size(flags["disk"], "--disk", common_limits.DISK_BYTES_MIN)
            if flags["disk"]
            else None,
            slots=_range(flags["slots"], "--slots", 1, _SLOTS_MAX)
            if flags["slots"] is not None
            else None,
        ),
    )


def _split(texts: tuple[str, ...]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _on_exit(text: str) -> Literal["keep", "delete"]:
    return "delete" if text == "delete" else "keep"


@click.command(name="prism-agent", help=_HELP)
@click.option("--name", default="", help="Name of this node.  [default: a generated one]")
@click.option(
    "--data-dir",
    default="./prism-agent-data",
    show_default=True,
    help="What is kept: the node's identity, the journal, execs' output.",
)
@click.option("--listen", default="127.0.0.1:7117", show_default=True, help="The node's API.")
@click.option("--metrics", default="127.0.0.1:9421", show_default=True, help="Metrics, probes.")
@click.option("--advertise", default="", help="HOST:PORT for control nodes to dial.")
@click.option(
    "--control", multiple=True, metavar="A,B,C", help="API addresses of control nodes (8008)."
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "bubblewrap", "gvisor", "fake"]),
    default="auto",
    show_default=True,
    help="How to isolate. auto: bubblewrap, and gvisor for sandboxes that ask for it, where they "
    "work; never fake, which runs nothing.",
)
@click.option("--label", multiple=True, metavar="K=V", help="Label of this node; repeatable.")
@click.option("--slots", type=int, default=None, help="Sandboxes at once.  [default: measured]")
@click.option(
    "--cpu",
    default="",
    metavar="N",
    help="Processor time to offer, as 4 or 500m.  [default: 8 for each core]",
)
@click.option("--memory", default="", metavar="SIZE", help="Memory to offer, as 8Gi.")
@click.option("--disk", default="", metavar="SIZE", help="Disk to offer, as 50Gi.")
@click.option(
    "--dns-servers",
    multiple=True,
    metavar="A,B",
    help="IPs to ask for the names that sandboxes may look up.  [default: of /etc/resolv.conf]",
)
@click.option(
    "--max-starts",
    type=int,
    default=limits.STARTS_MAX_DEFAULT,
    show_default=True,
    help="Sandboxes started at once.",
)
@click.option(
    "--warm-pool",
    type=int,
    default=0,
    show_default=True,
    help="Sandboxes to keep prepared, so that starts take less; needs root and cgroups.",
)
@click.option(
    "--on-exit",
    type=click.Choice(["keep", "delete"]),
    default="keep",
    show_default=True,
    help="What SIGTERM does to the sandboxes.",
)
@click.option(
    "--purge",
    is_flag=True,
    help="Remove the sandboxes that a stopped agent has left in --data-dir, and exit.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Try the runtimes, print a line of JSON for each, and exit; 0 if one works.",
)
@settings.boolean_option(
    "--insecure", False, "Allow addresses that other machines reach: there is no auth yet."
)
@settings.common_options
def command(log_level: str, log_format: log.Format, log_file: str | None, **flags: Any) -> int:
    """Run the agent until it is told to stop."""
    purging, probing = flags.pop("purge"), flags.pop("probe")
    built = _build(flags)
    log.configure(log_level, log_format, log_file)
    if probing:
        return 0 if asyncio.run(selftest(built.runtime)) else 1
    gc.set_threshold(*GC_THRESHOLDS)
    asyncio.run(purge(built.data_dir) if purging else Agent(built).run())
    return 0


def main() -> None:
    """Run `prism-agent`."""
    sys.exit(settings.run(command))
