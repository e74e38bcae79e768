"""Kills the leader again and again under load: how long nobody is served, and what is lost.

    .venv/bin/python bench/failover.py --kills=20 --members=3

Clients create through the followers, one after the other in each of their threads. The gap is the
time from the kill to the next success that was asked for after it. In the end every acknowledged
sandbox must be in the list, once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.integration import harness
from tests.integration.load import Load

CLIENTS = 8
CALM_S = 1.0
GAP_MAX_S = 30.0


def measure(cluster: harness.Cluster, kills: int) -> dict[str, object]:
    """Kill the leader `kills` times; return the figures."""
    load = Load(cluster, CLIENTS)
    gaps: list[float] = []
    try:
        for number in range(kills):
            time.sleep(CALM_S)
            leader = cluster.leader()
            killed = time.monotonic()
            leader.kill()
            gaps.append(load.next_success(killed, GAP_MAX_S) - killed)
            print(f"kill {number + 1}: {gaps[-1]:.3f} s", flush=True)
            leader.start()
            cluster.wait_ready()
    finally:
        load.stop()
    lost, duplicated = load.lost_and_duplicated(cluster.leader())
    return {
        "kills": kills,
        "gap_median_s": round(statistics.median(gaps), 3),
        "gap_max_s": round(max(gaps), 3),
        "acknowledged": len(load.acknowledged),
        "lost": lost,
        "duplicated": duplicated,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        harness.cluster(Path(directory), arguments.members) as cluster,
    ):
        cluster.wait_ready()
        figures = measure(cluster, arguments.kills)
    print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["lost"] or figures["duplicated"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
