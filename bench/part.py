"""A part of `make bench`: a script that measures round by round, and keeps what it has."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from prism_cli.bench import report
from prism_cli.bench.figures import Outcome, Round, SkippedError
from prism_cli.bench.machine import describe
from prism_cli.bench.runner import why
from prism_common.errors import PrismError

ROUNDS_MAX = 100
#: What a round may end with so that the others go on: a cluster that does not come up included.
_FAILURES = (
    PrismError, grpc.RpcError, TimeoutError, AssertionError, OSError, subprocess.SubprocessError,
    ExceptionGroup,
)  # fmt: skip


def parser(description: str) -> argparse.ArgumentParser:
    """Return the flags that every part has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=_rounds, default=1)
    made.add_argument("--quick", action="store_true", help="small: to see that it works")
    made.add_argument("--json", type=Path, help="written after every round")
    made.add_argument("--plot", type=Path, help="directory for SVG over time; needs pygal")
    return made


def _rounds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= ROUNDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {ROUNDS_MAX}")
    return int(text)


def leave_on_signals() -> None:
    """Unwind by SIGTERM too, so that clusters and agents end."""

    def leave(number: int, _frame: object) -> None:
        # A group's signal comes twice, once by our parent: the second must not end the unwinding.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def version_of(*argv: str) -> str:
    """Return the first line of what a program says of its version."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    return (done.stdout or done.stderr).splitlines()[0]


class Results:
    """The outcomes of a script, in its file after each change.

    Args:
        arguments: Of `parser`: where to write.
        outcomes: What will be measured.
        others: Versions of what is measured besides.
    """

    def __init__(
        self, arguments: argparse.Namespace, outcomes: Sequence[Outcome], *others: str
    ) -> None:
        self._file: Path | None = arguments.json
        self._plot: Path | None = arguments.plot
        if self._plot is not None:
            report.require_plotting(self._plot)
        self._machine = describe()
        self._machine["versions"] = ", ".join((self._machine["versions"], *others))
        if arguments.quick:
            self._machine["size"] = "--quick: a fraction of what each workload says"
        self.outcomes = outcomes
        self.keep(outcomes)

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        """Write what there is."""
        self.outcomes = outcomes
        if self._file is not None:
            report.write_json(self._file, self._machine, outcomes)

    def measure(self, outcome: Outcome, label: str, work: Callable[[], Round]) -> None:
        """Run one round; what breaks it off is noted, and the rest goes on."""
        if outcome.skipped:
            return
        load, started = os.getloadavg()[0], time.monotonic()
        print(f"{label}: {outcome.name} … ", end="", flush=True, file=sys.stderr)
        try:
            found = work()
        except SkippedError as skipped:
            outcome.skipped = trouble = str(skipped)
        except _FAILURES as error:
            outcome.error = trouble = _why(error)
        else:
            found.load_average, trouble = load, ""
            outcome.rounds.append(found)
        took_s = time.monotonic() - started
        print(f"{took_s:.1f} s{', ' if trouble else ''}{trouble}", file=sys.stderr)
        self.keep(self.outcomes)

    def finish(self) -> int:
        """Show the table, draw the plots; return the exit status."""
        if self._plot is not None:
            report.write_plots(self._plot, self.outcomes)
        report.write_table(self._machine, self.outcomes)
        return int(any(outcome.failed for outcome in self.outcomes))


def _why(error: Exception) -> str:
    if isinstance(error, (AssertionError, OSError, subprocess.SubprocessError)):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, grpc.RpcError) and not isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return why(error)


def run_rounds(
    results: Results, rounds: int, works: Sequence[tuple[Outcome, Callable[[], Round]]]
) -> int:
    """Run every round through all of a script's measurements; return the exit status."""
    for number in range(rounds):
        for outcome, work in works:
            results.measure(outcome, f"round {number + 1} of {rounds}", work)
    return results.finish()
