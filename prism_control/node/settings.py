"""What one control node is told: parsed, checked against each other, and immutable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism_common.addresses import Address, parse_address, require_loopback
from prism_common.errors import InvalidArgumentError
from prism_common.names import validate_name
from prism_control.node.compaction import SnapshotPolicy
from prism_control.raft.configuration import VOTERS_MAX
from prism_control.request_queue import BatchingSettings

QUEUE_SIZE_MAX: Final = 1_000_000
INTERVAL_MS_MAX: Final = 60_000
SNAPSHOT_ENTRIES_MAX: Final = 1_000_000
RAFT_PORT: Final = 4200
API_PORT: Final = 8008
METRICS_PORT: Final = 9420


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Flags of `prismd`.

    Attributes:
        name: Empty: the data directory's, or a generated one.
        advertise: Host that others dial; empty: the host of --raft and --api.
        bootstrap_expect: Members that form the cluster; 0: not by meeting others.
        join: Raft addresses of those members.
        snapshots: When the log is compacted.
    """

    name: str
    data_dir: Path
    raft: Address
    api: Address
    metrics: Address
    advertise: str
    bootstrap: bool
    bootstrap_expect: int
    join: tuple[str, ...]
    strict_join: bool
    batching: BatchingSettings
    snapshots: SnapshotPolicy


def check_range(flag: str, value: int, least: int, most: int) -> int:
    """Return `value` if it is in its range, else raise InvalidArgumentError naming the flag."""
    if not least <= value <= most:
        raise InvalidArgumentError(f"{flag}: {value} is not {least} to {most}", field=flag)
    return value


def make_settings(
    *,
    name: str,
    data_dir: str,
    raft: str,
    api: str,
    metrics: str,
    advertise: str,
    bootstrap: bool,
    bootstrap_expect: int | None,
    join: str,
    strict_join: bool,
    insecure: bool,
    batching: BatchingSettings,
    snapshots: SnapshotPolicy,
) -> NodeSettings:
    """Check the flags, each and together.

    Raises:
        InvalidArgumentError: One is nonsense; it names the flag and what it takes.
        StartupError: An address can be reached by others, without --insecure.
    """
    if name:
        validate_name(name, "--name")
    addresses = {
        "--raft": parse_address(raft, "--raft", RAFT_PORT),
        "--api": parse_address(api, "--api", API_PORT),
        "--metrics": parse_address(metrics, "--metrics", METRICS_PORT),
    }
    for flag, address in addresses.items():
        require_loopback(address, flag, insecure)
        if address.is_wildcard and not advertise and flag != "--metrics":
            raise InvalidArgumentError(
                f"--advertise: needed, because {flag}={address} cannot be dialled by others",
                field="--advertise",
            )
    if advertise:
        parsed = parse_address(advertise, "--advertise", 0)
        if parsed.port or parsed.is_wildcard:
            raise InvalidArgumentError(
                "--advertise: give a host name or address that others can dial, without a port",
                field="--advertise",
            )
        advertise = parsed.host
    parts = (part.strip() for part in join.split(","))
    # Each once, however often it is listed.
    peers = tuple(
        dict.fromkeys(str(parse_address(part, "--join", RAFT_PORT)) for part in parts if part)
    )
    _check_bootstrap(bootstrap, bootstrap_expect, peers)
    return NodeSettings(
        name=name,
        data_dir=Path(data_dir),
        raft=addresses["--raft"],
        api=addresses["--api"],
        metrics=addresses["--metrics"],
        advertise=advertise,
        bootstrap=bootstrap or bootstrap_expect == 1,
        bootstrap_expect=bootstrap_expect or 0,
        join=peers,
        strict_join=strict_join,
        batching=batching,
        snapshots=snapshots,
    )


def _check_bootstrap(bootstrap: bool, expect: int | None, join: tuple[str, ...]) -> None:
    if bootstrap and (join or expect is not None):
        other = "--join" if join else "--bootstrap-expect"
        raise InvalidArgumentError(
            f"--bootstrap: starts a single node, so it does not go with {other}; use "
            "--bootstrap-expect=N --join=A,B,C for a cluster",
            field="--bootstrap",
        )
    if expect is None:
        return
    check_range("--bootstrap-expect", expect, 1, VOTERS_MAX)
    if expect > 1 and len(join) not in (expect, expect - 1):
        raise InvalidArgumentError(
            f"--join: has {len(join)} addresses; --bootstrap-expect={expect} needs the Raft "
            f"addresses of all {expect} members (this one's own may be left out)",
            field="--join",
        )
