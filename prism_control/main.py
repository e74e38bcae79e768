"""The command `prismd`."""

import gc
import logging
import sys
from pathlib import Path
from typing import Any

import click
import uvloop

from prism_common import log, settings
from prism_common.addresses import parse_address
from prism_common.errors import StartupError
from prism_common.names import validate_name
from prism_control.node import restore as restoring
from prism_control.node.compaction import SNAPSHOT_ENTRIES, TRAILING_ENTRIES, SnapshotPolicy
from prism_control.node.server import ControlNode
from prism_control.node.settings import (
    API_PORT,
    INTERVAL_MS_MAX,
    QUEUE_SIZE_MAX,
    RAFT_PORT,
    SNAPSHOT_ENTRIES_MAX,
    NodeSettings,
    check_range,
    make_settings,
)
from prism_control.request_queue import BatchingSettings

logger = logging.getLogger(__name__)

#: A call makes some hundred objects that live as long as it does: at the default of 700 the
#: collector looks at all calls under way again and again, and finds nothing. And it leaves five in
#: a cycle (gRPC's lookup of its handler): at 50,000 a look took 20 ms, in which nothing else
#: happens, and each twentieth, at all calls under way, up to 400 ms. At 10,000 it takes 4 ms, each
#: fifth up to 20, and all of them together as long as before.
_GC_THRESHOLDS = (10_000, 5, 1000)

_EPILOG = """\b
Examples:
  prismd --bootstrap --name=dev-node
  prismd --bootstrap-expect=3 --join=node1:4200,node2:4200,node3:4200 --name=node1
  prismd --join=node1:4200 --name=node4

Each flag can also be given as PRISM_… in the environment, or in the file of --config.
"""


@click.group(
    name="prismd",
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--name", default="", help="This node's name (default: a generated one).")
@click.option("--data-dir", default="./prism-data", show_default=True, help="Where state is kept.")
@click.option("--raft", default="127.0.0.1:4200", show_default=True, help="Listen here for peers.")
@click.option(
    "--api", default="127.0.0.1:8008", show_default=True, help="Listen here for users and agents."
)
@click.option(
    "--metrics",
    default="127.0.0.1:9420",
    show_default=True,
    help="Listen here for /metrics, /healthz and /readyz.",
)
@click.option("--advertise", default="", help="Host that others dial (default: as bound).")
@click.option("--bootstrap", is_flag=True, help="Start a cluster of this node alone.")
@click.option(
    "--bootstrap-expect",
    type=int,
    default=None,
    metavar="N",
    help="Form a cluster with the N members that --join lists; start all at once, in any order.",
)
@click.option("--join", default="", metavar="A,B,C", help="Raft addresses of the members to meet.")
@click.option("--strict-join", is_flag=True, help="Exit if no cluster forms within a minute.")
@click.option("--insecure", is_flag=True, help="Allow addresses that other machines can reach.")
@settings.boolean_option("--batching-enabled", True, "Group requests under load.")
@click.option("--create-queue-size", type=int, default=12_000, show_default=True,
              help="Creates that may wait; more are refused with a retry hint.")  # fmt: skip
@click.option("--delete-queue-size", type=int, default=22_000, show_default=True,
              help="Deletes that may wait.")  # fmt: skip
@click.option("--batch-threshold", type=int, default=50, show_default=True,
              help="Batch when more requests than this wait.")  # fmt: skip
@click.option("--batch-interval-ms", type=int, default=250, show_default=True,
              help="Batch when requests come less than this apart.")  # fmt: skip
@click.option("--snapshot-entries", type=int, default=SNAPSHOT_ENTRIES, hidden=True)
@settings.common_options
def _command(
    log_level: str,
    log_format: log.Format,
    log_file: str | None,
    **flags: Any,
) -> int:
    """Run one node of Prism's control plane.

    It holds the replicated state by Raft (port 4200), serves the API and the agents' sessions
    (8008), and exposes metrics (9420). SIGTERM stops it cleanly; sandboxes go on.
    """
    if click.get_current_context().invoked_subcommand is not None:
        log.configure(log_level, log_format, log_file)
        return 0
    batching = BatchingSettings(
        enabled=flags.pop("batching_enabled"),
        create_queue_size=check_range(
            "--create-queue-size", flags.pop("create_queue_size"), 1, QUEUE_SIZE_MAX
        ),
        delete_queue_size=check_range(
            "--delete-queue-size", flags.pop("delete_queue_size"), 1, QUEUE_SIZE_MAX
        ),
        threshold=check_range("--batch-threshold", flags.pop("batch_threshold"), 0, QUEUE_SIZE_MAX),
        interval_ms=check_range(
            "--batch-interval-ms", flags.pop("batch_interval_ms"), 0, INTERVAL_MS_MAX
        ),
    )
    insecure: bool = flags["insecure"]
    entries = check_range(
        "--snapshot-entries", flags.pop("snapshot_entries"), 1, SNAPSHOT_ENTRIES_MAX
    )
    snapshots = SnapshotPolicy(entries, trailing_entries=min(entries // 5, TRAILING_ENTRIES))
    node_settings = make_settings(batching=batching, snapshots=snapshots, **flags)
    log.configure(log_level, log_format, log_file)
    _warn(node_settings, insecure)
    gc.set_threshold(*_GC_THRESHOLDS)
    # Modules and protos stay for ever: no full collection needs to look at them.
    gc.freeze()
    return uvloop.run(ControlNode(node_settings).run())


@_command.command(
    epilog="""\b
Example:
  prismctl backup prism.backup
  prismd restore --from=prism.backup --name=node1 --data-dir=./new-data
  prismd --name=node1 --data-dir=./new-data
"""
)
@click.option("--from", "backup", required=True, metavar="FILE", help="What prismctl backup wrote.")
@click.option("--name", required=True, help="Name of the new node.")
@click.option("--data-dir", required=True, help="A new directory.")
@click.option("--raft", default="127.0.0.1:4200", show_default=True, help="Its Raft address.")
@click.option("--api", default="127.0.0.1:8008", show_default=True, help="Its API address.")
def restore(backup: str, name: str, data_dir: str, raft: str, api: str) -> int:
    """Make the first node of a new cluster from a backup. More nodes join it then.

    Agents of the old cluster join the new one with a new --data-dir.
    """
    made = restoring.restore(
        Path(backup),
        Path(data_dir),
        validate_name(name, "--name"),
        str(parse_address(raft, "--raft", RAFT_PORT)),
        str(parse_address(api, "--api", API_PORT)),
    )
    click.echo(
        f"cluster {made.cluster_id}: {made.sandboxes} sandboxes and {made.nodes} nodes restored; "
        f"start it: prismd --name={name} --data-dir={data_dir} --raft={raft} --api={api}"
    )
    return 0


@_command.command(
    epilog="""\b
Example:
  prismd recover --member=node1 --data-dir=./prism-data --yes
"""
)
@click.option("--member", required=True, help="Name of the node that the directory belongs to.")
@click.option("--data-dir", required=True, help="Its directory; it must be stopped.")
@click.option("--yes", is_flag=True, help="Do it; without this, only say what would be done.")
def recover(member: str, data_dir: str, yes: bool) -> int:
    """Make a survivor the only member, after a majority is lost FOR EVER.

    What the lost members had acknowledged and this one had not received is lost. If one of them
    ever starts again there are two clusters: wipe their disks, and let them join anew.
    """
    if not yes:
        raise StartupError(
            f"recover: {member} would become the only member of its cluster; if the others are "
            "gone for ever and this one's log ends last, say --yes"
        )
    found = restoring.recover(Path(data_dir), member)
    others = [m.name for m in found.before.members if m not in found.after.members]
    click.echo(
        f"{member} is the only member now (before: also {', '.join(others) or 'nobody'}); "
        f"its log ends at term {found.last[0]}, index {found.last[1]}, of which "
        f"{found.uncommitted_entries} entries were not known to be committed"
    )
    return 0


def _warn(node_settings: NodeSettings, insecure: bool) -> None:
    exposed = [a for a in (node_settings.raft, node_settings.api) if not a.is_loopback]
    if insecure and exposed:
        logger.warning(
            "--insecure: %s can be reached by others, who can run code here without authentication",
            " and ".join(str(address) for address in exposed),
        )
    expect = node_settings.bootstrap_expect
    if expect and expect % 2 == 0:
        logger.warning(
            "--bootstrap-expect=%d: %d members tolerate no more failures than %d",
            expect, expect, expect - 1,
        )  # fmt: skip


def main() -> None:
    """Run, and exit with the command's status."""
    sys.exit(settings.run(_command))


if __name__ == "__main__":
    main()
