"""`prism-agent --probe`: says which runtimes work here, without becoming a node."""

import json
import tempfile
from pathlib import Path

from prism_agent import cgroups
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.runtime import probe


async def selftest(asked: str) -> bool:
    """Start one sandbox with each runtime asked for, and print a line of JSON for each.

    Returns:
        Whether one of them works.
    """
    with tempfile.TemporaryDirectory(prefix="prism-probe-") as scratch:
        data = DataDirectory(Path(scratch) / "data")
        groups, _ = cgroups.find_on_this_machine(data.state.node_id)
        known = probe.known_runtimes(data, Journal(data.sandboxes), groups)
        try:
            statuses = await probe.try_all(probe.candidates(asked, known))
        finally:
            for runtime in known.values():
                await runtime.close()
            if groups is not None:
                groups.close()
            data.close()
    for status in statuses:
        line = {
            "name": status.name,
            "ready": status.ready,
            "message": status.message,
            "version": status.version,
        }
        print(json.dumps(line))
    return any(status.ready for status in statuses)
