"""All measurements on a cluster of their own on this machine: what `make bench` runs.

    .venv/bin/python bench/run.py --rounds=5 --output=bench-results

Three control nodes, 20 simulated agents, and `prismctl bench` in a process of its own; then the
leader killed under load, and etcd beside it where it is installed. Each writes its JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bench.local import running
from tests.integration.harness import ROOT, environment

AGENTS = 20


def run(*argv: str) -> int:
    """Run one part; return its exit status."""
    print(f"── {' '.join(argv)}", flush=True)
    return subprocess.run([sys.executable, *argv], env=environment(), check=False).returncode


def leave(number: int, _frame: object) -> None:
    """Unwind, so that the cluster ends too."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run all; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", default="60s", help="length of an open loop")
    parser.add_argument("--output", type=Path, default=ROOT / "bench-results")
    parser.add_argument("--kills", type=int, default=10, help="of the leader, under load")
    parser.add_argument("workloads", nargs="*", help="of prismctl bench; default: all")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    with running(AGENTS) as (cluster, _):
        status = run(
            "-m", "prism_cli", "bench", f"--api={cluster.leader().api}", "--markdown",
            f"--rounds={arguments.rounds}", f"--seconds={arguments.seconds}",
            f"--json={output / 'bench.json'}", *arguments.workloads,
        )  # fmt: skip
        if status:
            failed.append("prismctl bench")
    if not arguments.workloads:
        parts = [("bench/failover.py", f"--kills={arguments.kills}")]
        if shutil.which("etcd"):
            parts.append(("bench/etcd.py", f"--rounds={arguments.rounds}"))
        else:
            how = "" if os.geteuid() == 0 else " as root"
            print(f"etcd is not installed; to compare{how}: apt-get install etcd-server")
        for script, *flags in parts:
            file = output / f"{Path(script).stem}.json"
            if run(script, *flags, f"--json={file}"):
                failed.append(script)
    print(f"results: {output}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
