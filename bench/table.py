"""The table of docs/scaling.md from what `make bench` has measured.

    .venv/bin/python bench/table.py bench-results/results.json
    .venv/bin/python bench/table.py bench-results/results.json --write docs/scaling.md

One line a workload: its figures as median [min–max] with their units, and each bar with whether it
was held. Promises (lost, duplicated and so on) are named where one was broken, and counted at the
end. With --write what is between the markers bench:begin and bench:end is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_cli.bench.figures import EXACT, Bar, Outcome, Summary, shown, summaries
from prism_cli.bench.report import from_data

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
#: Suffixes of figures' names, longest first, and what is written after the value.
UNITS = (
    ("_cpu_cores", " cores"),
    ("_per_s", "/s"),
    ("_ms", " ms"),
    ("_mb", " MB"),
    ("_s", " s"),
)
#: Promises: they are shown only where they are broken.
PROMISES = (*EXACT, "failures", "refusals", "given_up", "double_runs_after_mending")
#: What a reader of the table does not need: the size is in the workload's words.
DROPPED = (
    "sandboxes", "listed", "agents", "acknowledged", "acknowledged_after_resend", "offered_per_s",
    "p999_ms", "per_s", "calm_p50_ms", "calm_max_ms", "empty_mb",
)  # fmt: skip


def named(figure: str) -> tuple[str, str]:
    """Return a figure's name for people, and its unit."""
    for suffix, unit in UNITS:
        if figure.endswith(suffix):
            return figure.removesuffix(suffix).replace("_", " "), unit
    return figure.replace("_", " "), ""


def measured(figures: Mapping[str, Summary]) -> str:
    """Return all figures of a workload in one cell."""
    cells = []
    for figure, summary in figures.items():
        if figure in DROPPED or (figure in PROMISES and summary.high == 0):
            continue
        name, unit = named(figure)
        value = f"{shown(summary.median)}{unit}"
        if summary.low != summary.high:
            value += f" [{shown(summary.low)}–{shown(summary.high)}]"
        cells.append(f"{name} {value}")
    return "; ".join(cells)


def judged(outcome: Outcome, figures: Mapping[str, Summary]) -> str:
    """Return the bars of a workload in one cell, and whether each is held."""
    cells = []
    for bar in outcome.bars:
        if bar.figure not in figures or (bar.limit == 0 and _holds(bar, figures)):
            continue
        name, unit = named(bar.figure)
        verdict = "" if _holds(bar, figures) else ": **missed**"
        limit = f"{'≥' if bar.kind == 'at least' else '≤'} {shown(bar.limit)}{unit}"
        cells.append(f"{name} {limit}{verdict}")
    if not outcome.valid:
        cells.append("invalid: the load was the bottleneck")
    return "; ".join(cells)


def _holds(bar: Bar, figures: Mapping[str, Summary]) -> bool:
    summary = figures[bar.figure]
    # One broken promise in one round is one too many.
    return bar.holds(summary.high if bar.limit == 0 else summary.median)


def table(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """Return the whole as Markdown."""
    counts = sorted({len(outcome.rounds) for outcome in outcomes if outcome.rounds})
    rounds = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    loads = [one.load_average for outcome in outcomes for one in outcome.rounds]
    facts = [text for key, text in machine.items() if key not in ("load average", "fsync p50")]
    lines = [
        f"{'; '.join(facts)}; fsync p50 {machine.get('fsync p50', 'unknown')}. Load average when "
        f"the rounds began: {min(loads):.1f}–{max(loads):.1f}. Rounds: {rounds}; "
        "median [min–max].",
        "",
        "| workload | measured | bar |",
        "|---|---|---|",
    ]
    for outcome in outcomes:
        found = summaries(outcome.rounds)
        if outcome.skipped or outcome.error:
            why = (
                f"skipped: {outcome.skipped}" if outcome.skipped else f"broke off: {outcome.error}"
            )
            lines.append(f"| {_cell(outcome.summary)} | {_cell(why)} | |")
        if outcome.rounds:
            cells = (outcome.summary, measured(found), judged(outcome, found))
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, "", _promises(outcomes)])


def _promises(outcomes: Sequence[Outcome]) -> str:
    broken: dict[str, float] = {}
    acknowledged = 0.0
    for outcome in outcomes:
        for one in outcome.rounds:
            if "lost" in one.figures:
                acknowledged += one.figures.get("sandboxes", one.figures.get("acknowledged", 0))
            for name in EXACT:
                if value := one.figures.get(name, 0):
                    broken[name] = broken.get(name, 0) + value
    told = (
        f"{acknowledged:,.0f} acknowledged sandboxes were looked for in the list of another leader"
    )
    if not broken:
        return f"{told}: none was lost, none was there twice; nothing was left on a node."
    found = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in broken.items())
    return f"{told}. **Broken promises: {found}.**"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def replaced(page: str, text: str) -> str:
    """Return a page with another text between the markers.

    Raises:
        ValueError: The page has not one pair of them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"it needs one {BEGIN} and, after it, one {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Print the table, or write it."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("results", type=Path, help="results.json")
    flags.add_argument("--write", type=Path, metavar="PAGE", help="put it there")
    arguments = flags.parse_args()
    try:
        machine, outcomes = from_data(json.loads(arguments.results.read_text()))
    except (OSError, ValueError) as error:
        flags.error(f"{arguments.results}: {error}")
    if not any(outcome.rounds for outcome in outcomes):
        flags.error(f"{arguments.results}: no round was measured")
    text = table(machine, outcomes)
    if arguments.write is None:
        print(text)
        return 0
    try:
        arguments.write.write_text(replaced(arguments.write.read_text(), text))
    except (OSError, ValueError) as error:
        flags.error(f"--write {arguments.write}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
