"""A leader killed amid a burst, with every create accounted for."""

import asyncio

from bench.failover import TIMEOUT_S, burst
from bench.local import LocalTarget, running
from prism_cli.bench.figures import Round
from tests.integration import harness

CREATES = 600


async def measure(cluster: harness.Cluster) -> Round:
    async with LocalTarget(cluster, TIMEOUT_S) as target:
        return await burst(target, cluster, CREATES)


def test_no_create_is_lost_or_done_twice_when_the_leader_is_killed_amid_a_burst() -> None:
    with running(agents=3, members=3) as (cluster, _):
        figures = asyncio.run(measure(cluster)).figures
        assert figures["acknowledged"] + figures["failed_calls"] == CREATES
        assert figures["failed_calls"] > 0
        assert figures["acknowledged_after_resend"] == CREATES
        assert figures["lost"] == figures["duplicated"] == 0
        assert cluster.leader().list_all() == []
