"""Removes the sandboxes that a stopped agent has left running, and all that was made for them."""

import asyncio
import os
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from prism_agent import cgroups, limits
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import Reconciler
from prism_agent.reports import ReportQueue
from prism_agent.runtime import probe
from prism_agent.sandboxes import Sandboxes
from prism_common.errors import StartupError

_TIMEOUT_S: Final = 60.0


async def purge(data_dir: Path) -> None:
    """Remove them. The node keeps its identity.

    Raises:
        StartupError: An agent runs on the directory, or something cannot be removed.
    """
    if not os.path.isdir(data_dir):  # noqa: ASYNC240  # before there is anything to hold up
        return
    data = DataDirectory(data_dir)
    try:
        groups, _ = cgroups.find_on_this_machine(data.state.node_id)
        journal = Journal(data.sandboxes)
        known = probe.known_runtimes(data, journal, groups)
        sandboxes = Sandboxes(
            journal,
            {},
            known,
            Reconciler(limits.STARTS_MAX_DEFAULT, data.state.term),
            ReportQueue(),
            AgentMetrics(CollectorRegistry()),
        )
        await sandboxes.adopt()
        async with asyncio.TaskGroup() as group:
            group.create_task(sandboxes.run())
            await sandboxes.started.wait()
            removed = await sandboxes.delete_all(_TIMEOUT_S)
            sandboxes.close()
        for runtime in known.values():
            await runtime.close()
        if groups is not None:
            groups.close()
        journal.close()
        if not removed:
            raise StartupError("--purge: some sandboxes could not be removed; see the log")
    finally:
        data.close()
