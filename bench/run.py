"""All measurements, on clusters of their own on this machine: what `make bench` runs.

    .venv/bin/python bench/run.py --rounds=5 --seconds=60
    .venv/bin/python bench/run.py --quick
    .venv/bin/python bench/run.py --only etcd,failover

Each part is a process that starts what it needs and leaves nothing behind. It writes its figures
after every round, and results.json and results.md are written after every part: whatever ends a
run, what it has measured is there. A part that takes far longer than it should is ended, and the
rest goes on. Exit status 1 if something acknowledged was lost or doubled, or a part broke off; a
missed bar is only said.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.part import leave_on_signals, parser
from prism_cli.bench import report
from prism_cli.bench.figures import Outcome
from tests.integration.harness import ROOT, environment

OPEN_LOOPS = 3
#: A part that takes so many times what it should, and so much more, hangs.
PATIENCE = 3.0
PATIENCE_S = 180.0
STOP_TIMEOUT_S = 90.0
#: What a part's exit status says.
ENDINGS = {0: "", 1: "a promise was broken, or a round broke off; see its lines above"}


@dataclass(frozen=True, slots=True)
class Part:
    """A script of this directory."""

    name: str
    #: About how long a round of it takes on two quiet cores, and its start: full and --quick.
    round_s: float
    quick_round_s: float
    start_s: float = 8.0
    #: Whether it has open loops, whose length is a flag.
    open_loops: int = 0

    def expected_s(self, rounds: int, seconds: float, quick: bool) -> float:
        """Return about how long it takes."""
        if quick:
            return self.start_s + rounds * self.quick_round_s
        return self.start_s + rounds * (self.round_s + self.open_loops * seconds)


PARTS = (
    Part("control_plane", 160.0, 50.0, open_loops=OPEN_LOOPS),
    Part("failover", 45.0, 18.0),
    Part("etcd", 28.0, 10.0),
    Part("placement", 5.0, 1.0, start_s=1.0),
    Part("real", 120.0, 45.0, start_s=20.0),
    Part("state_size", 21.0, 12.0, start_s=1.0),
    Part("many_agents", 40.0, 10.0, start_s=20.0),
    Part("node_loss", 45.0, 45.0),
)


class Run:
    """The parts that were run so far, and their figures."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._machine: dict[str, str] = {}
        self._outcomes: list[Outcome] = []
        self.broken: list[str] = []

    def run(self, part: Part, flags: Sequence[str], timeout_s: float) -> None:
        """Run one part to its end, or until the time is over."""
        file = self._output / f"{part.name}.json"
        file.unlink(missing_ok=True)
        argv = (
            sys.executable, str(ROOT / "bench" / f"{part.name}.py"), f"--json={file}", *flags,
        )  # fmt: skip
        # In a session of its own: what it has started can be ended with it, should it hang.
        process = subprocess.Popen(
            argv, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        trouble = "the run was ended"
        try:
            status = process.wait(timeout_s)
            trouble = ENDINGS.get(status, f"exit status {status}")
        except subprocess.TimeoutExpired:
            trouble = f"ended after {timeout_s:.0f} s"
        finally:
            end(process)
            if trouble:
                self.broken.append(f"{part.name}: {trouble}")
            self._take(file, trouble)

    def _take(self, file: Path, broken: str) -> None:
        """Add what a part has written, and write all."""
        if file.exists():
            machine, outcomes = report.from_data(json.loads(file.read_text()))
            for outcome in outcomes:
                if not outcome.rounds and not outcome.skipped and not outcome.error:
                    outcome.error = broken or "it was not measured"
            versions = [*self._machine.get("versions", "").split(", ")]
            new = [each for each in machine["versions"].split(", ") if each not in versions]
            self._machine = {**machine, **self._machine}
            self._machine["versions"] = ", ".join(each for each in (*versions, *new) if each)
            self._outcomes += outcomes
        report.write_json(self._output / "results.json", self._machine, self._outcomes)
        table = report.markdown(self._machine, self._outcomes)
        (self._output / "results.md").write_text(table + "\n")

    def missed(self) -> list[str]:
        """Return the figures that miss their bar."""
        found, name = [], ""
        for workload, figure, value, bar, verdict in report.rows(self._outcomes):
            name = workload or name
            if verdict and verdict != "pass":
                found.append(f"{name}: {figure} {value} {bar} {verdict}".replace("  ", " "))
        return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part that runs still, and give it time to end its clusters."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def duration(seconds: float) -> str:
    """Return minutes and seconds for people."""
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def main() -> int:
    """Run all; return 1 if a promise was broken or a part failed."""
    flags = parser(__doc__ or "")
    flags.set_defaults(rounds=5)
    flags.add_argument("--seconds", type=float, default=60.0, help="length of an open loop")
    flags.add_argument("--output", type=Path, default=ROOT / "bench-results")
    flags.add_argument("--only", metavar="PART,…", help=", ".join(part.name for part in PARTS))
    arguments = flags.parse_args()
    known = {part.name: part for part in PARTS}
    names = arguments.only.split(",") if arguments.only else list(known)
    for name in names:
        if name not in known:
            flags.error(f"--only: {name!r} is none of {', '.join(known)}")
    leave_on_signals()
    output: Path = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    rounds, seconds, quick = arguments.rounds, arguments.seconds, arguments.quick
    expected = {name: known[name].expected_s(rounds, seconds, quick) for name in names}
    shared = [f"--rounds={rounds}", *(["--quick"] if quick else [])]
    if importlib.util.find_spec("pygal") is None:
        print("no plots: pip install 'prism-sandboxes[plot]' for them", flush=True)
    else:
        shared.append(f"--plot={output / 'plots'}")
    run, started = Run(output), time.monotonic()
    for number, name in enumerate(names, 1):
        left_s = sum(expected[each] for each in names[number - 1 :])
        print(
            f"── part {number} of {len(names)}: {name}; {duration(time.monotonic() - started)} "
            f"gone, about {duration(left_s)} left; load average {os.getloadavg()[0]:.2f}",
            flush=True,
        )
        own = [f"--seconds={seconds}"] if known[name].open_loops else []
        run.run(known[name], [*shared, *own], PATIENCE * expected[name] + PATIENCE_S)
    print(f"── {duration(time.monotonic() - started)}; results: {output}/results.md and .json")
    for line in run.missed():
        print(line)
    for line in run.broken:
        print(f"failed: {line}", file=sys.stderr)
    print(f"for docs/scaling.md: bench/table.py {output}/results.json --write docs/scaling.md")
    return 1 if run.broken else 0


if __name__ == "__main__":
    sys.exit(main())
