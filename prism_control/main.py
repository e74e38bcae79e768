"""The command `prismd`."""

import asyncio
import logging
import sys
from typing import Any

import click

from prism_common import log, settings
from prism_control.batcher import BatchingSettings
from prism_control.node.compaction import SNAPSHOT_ENTRIES, TRAILING_ENTRIES, SnapshotPolicy
from prism_control.node.server import ControlNode
from prism_control.node.settings import (
    INTERVAL_MS_MAX,
    QUEUE_SIZE_MAX,
    SNAPSHOT_ENTRIES_MAX,
    NodeSettings,
    check_range,
    make_settings,
)

logger = logging.getLogger(__name__)

_EPILOG = """\b
Examples:
  prismd --bootstrap --name=dev-node
  prismd --bootstrap-expect=3 --join=node1:4200,node2:4200,node3:4200 --name=node1

Each flag can also be given as PRISM_… in the environment, or in the file of --config.
"""


@click.command(
    name="prismd",
    epilog=_EPILOG,
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
def _command(log_level: str, log_format: log.Format, log_file: str | None, **flags: Any) -> int:
    """Run one node of Prism's control plane.

    It holds the replicated state by Raft (port 4200), serves the API and the agents' sessions
    (8008), and exposes metrics (9420). SIGTERM stops it cleanly; sandboxes go on.
    """
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
    return asyncio.run(ControlNode(node_settings).run())


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
