"""Which runtimes work here: each is tried by really starting a sandbox with it."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from prism.node.v1 import node_pb2

from prism_agent.cgroups import Cgroups
from prism_agent.data_directory import DataDirectory
from prism_agent.journal import Journal
from prism_agent.network.egress import Networks
from prism_agent.network.networked import Networked
from prism_agent.network.resolver import Resolvers
from prism_agent.runtime.base import Probe, Runtime
from prism_agent.runtime.bubblewrap import BubblewrapRuntime
from prism_agent.runtime.fake import FakeRuntime
from prism_agent.runtime.gvisor import GvisorRuntime
from prism_agent.runtime.warm import WarmRuntime
from prism_common.errors import StartupError

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """How the runtimes were found."""

    #: Those that were asked for and work, best first: what is started is started with these.
    working: dict[str, Runtime]
    #: Every one: what an earlier process has started can be ended with these.
    known: dict[str, Runtime]
    statuses: list[node_pb2.RuntimeStatus]


def known_runtimes(
    data: DataDirectory,
    journal: Journal,
    cgroups: Cgroups | None,
    networks: Networks | None = None,
    warm: WarmRuntime | None = None,
) -> dict[str, Runtime]:
    """Return every runtime that there is, untried. Without `networks` none can be made."""
    networks = networks or Networks(data.state.node_id, journal, Resolvers([]))
    runtimes: list[Runtime] = [
        Networked(warm or make_warm(data, journal, cgroups), networks),
        Networked(GvisorRuntime(data, journal, cgroups), networks),
        FakeRuntime(),
    ]
    return {runtime.name: runtime for runtime in runtimes}


def make_warm(data: DataDirectory, journal: Journal, cgroups: Cgroups | None) -> WarmRuntime:
    """Return bubblewrap with a pool of prepared sandboxes, which is empty until it is filled."""
    return WarmRuntime(BubblewrapRuntime(data, journal, cgroups), journal, cgroups)


def candidates(asked: str, known: dict[str, Runtime]) -> list[Runtime]:
    """Return what to try, best first: never one that does not isolate, unless asked for by name.

    Of `auto`, bubblewrap comes first: it serves every kind of sandbox. A sandbox that asks for
    gvisor gets that; --runtime=gvisor runs nothing else. Why, says docs/adr/0017-gvisor.md.
    """
    return [known[name] for name in (("bubblewrap", "gvisor") if asked == "auto" else (asked,))]


async def try_all(runtimes: list[Runtime]) -> list[node_pb2.RuntimeStatus]:
    """Start a sandbox with each, and return how that went."""
    statuses: list[node_pb2.RuntimeStatus] = []
    for runtime in runtimes:
        result = await _try(runtime)
        statuses.append(
            node_pb2.RuntimeStatus(
                name=runtime.name,
                ready=result.ready,
                message=result.message,
                version=result.version,
            )
        )
        logger.info(
            "probed",
            extra={"runtime": runtime.name, "ready": result.ready, "why": result.message},
        )
    return statuses


async def probe(
    asked: str,
    data: DataDirectory,
    journal: Journal,
    cgroups: Cgroups | None,
    networks: Networks | None = None,
    warm: WarmRuntime | None = None,
) -> Found:
    """Try the runtime that was asked for, or all that isolate.

    Raises:
        StartupError: None works. An agent that cannot isolate does not run anything.
    """
    known = known_runtimes(data, journal, cgroups, networks, warm)
    statuses = await try_all(candidates(asked, known))
    working = {each.name: known[each.name] for each in statuses if each.ready}
    if not working:
        why = "; ".join(f"{each.name}: {each.message}" for each in statuses)
        raise StartupError(f"--runtime={asked}: nothing here can isolate a sandbox: {why}")
    return Found(working, known, statuses)


async def _try(runtime: Runtime) -> Probe:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await runtime.probe()
    except TimeoutError:
        return Probe(ready=False, message=f"it did not answer within {_TIMEOUT_S:g} s")
