"""What a run shows: a table, Markdown, JSON, and plots."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prism_cli.bench.figures import CLIENT_CPU_MAX, Bar, Outcome, Round, summaries
from prism_cli.errors import CliError

_PLOT_POINTS: Final = 60


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, str, str]]:
    """Return workload, figure, value, bar and verdict."""
    found = []
    for outcome in outcomes:
        name = outcome.name
        if outcome.skipped or outcome.error:
            why = f"skipped: {outcome.skipped}" if outcome.skipped else f"failed: {outcome.error}"
            found.append((name, "", "", "", why))
            name = ""
        if not outcome.rounds:
            continue
        bars = {bar.figure: bar for bar in outcome.bars}
        for figure, summary in summaries(outcome.rounds).items():
            bar = bars.get(figure)
            # One lost sandbox in one round is a miss, whatever the median.
            value = summary.high if bar is not None and bar.limit == 0 else summary.median
            verdict = "" if bar is None else "pass" if bar.holds(value) else "miss"
            if verdict and not outcome.valid:
                verdict = "invalid"
            found.append((name, figure, str(summary), str(bar or ""), verdict))
            name = ""
        cpu = max(one.client_cpu for one in outcome.rounds)
        verdict = "" if outcome.valid else "invalid: the load is the bottleneck"
        found.append(("", "load_cpu_cores", f"{cpu:.2f}", f"≤ {CLIENT_CPU_MAX}", verdict))
        for reason, count in _refused(outcome).items():
            found.append(("", f"refused {reason}", str(count), "", ""))
    return found


def _refused(outcome: Outcome) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in outcome.rounds:
        for reason, count in one.refused.items():
            total[reason] = total.get(reason, 0) + count
    return total


def write_table(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Write the table to standard output."""
    from rich.table import Table

    from prism_cli.output import console

    out = console()
    for key, value in machine.items():
        out.print(f"{key}: {value}")
    table = Table("WORKLOAD", "FIGURE", "MEDIAN [MIN–MAX]", "BAR", "RESULT", box=None)
    for row in rows(outcomes):
        table.add_row(*row)
    out.print(table)


def markdown(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """Return the same as a table of Markdown."""
    lines = [f"- {key}: {value}" for key, value in machine.items()]
    lines += [
        "",
        "| workload | figure | median [min–max] | bar | result |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(outcomes)]
    return "\n".join(lines)


def as_data(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what --json writes: every round's figures, not only their medians."""
    return {
        "machine": dict(machine),
        "workloads": [
            {
                "name": outcome.name,
                "summary": outcome.summary,
                "skipped": outcome.skipped,
                "error": outcome.error,
                "valid": outcome.valid,
                "bars": [
                    {"figure": bar.figure, "kind": bar.kind, "limit": bar.limit}
                    for bar in outcome.bars
                ],
                "rounds": [
                    {
                        "figures": one.figures,
                        "refused": one.refused,
                        "client_cpu": one.client_cpu,
                        "load_average": one.load_average,
                    }
                    for one in outcome.rounds
                ],
            }
            for outcome in outcomes
        ],
    }


def from_data(data: Mapping[str, Any]) -> tuple[dict[str, str], list[Outcome]]:
    """Return what `as_data` was given, without the timelines.

    Raises:
        ValueError: It is no such data.
    """
    try:
        outcomes = [
            Outcome(
                one["name"],
                one["summary"],
                tuple(Bar(bar["figure"], bar["kind"], bar["limit"]) for bar in one["bars"]),
                [
                    Round(
                        dict(each["figures"]),
                        dict(each["refused"]),
                        client_cpu=each["client_cpu"],
                        load_average=each["load_average"],
                    )
                    for each in one["rounds"]
                ],
                one["skipped"],
                one["error"],
            )
            for one in data["workloads"]
        ]
        return dict(data["machine"]), outcomes
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what a benchmark wrote: {error!r}") from None


def write_json(path: Path, machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Write the JSON. A reader, or a run that is broken off, finds the old file or the new one.

    Raises:
        CliError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(as_data(machine, outcomes), indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CliError(f"--json: {path}: {error.strerror}") from None


def require_plotting(directory: Path) -> None:
    """Find out before the load whether plots can be written.

    Raises:
        CliError: The library is missing, or the directory cannot be made.
    """
    try:
        import pygal  # noqa: F401
    except ImportError:
        raise CliError("--plot: needs pygal; pip install 'prism-sandboxes[plot]'") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--plot: {directory}: {error.strerror}") from None


def buckets(timeline: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Return for each slice of time its end, successes a second, and the worst latency in ms."""
    ends_s = max((at for at, _ in timeline), default=0.0)
    if not ends_s:
        return []
    width_s = ends_s / _PLOT_POINTS
    slices: list[list[float]] = [[] for _ in range(_PLOT_POINTS)]
    for at, latency in timeline:
        slices[min(_PLOT_POINTS - 1, int(at / width_s))].append(latency)
    return [
        ((number + 1) * width_s, len(one) / width_s, max(one, default=0.0) * 1e3)
        for number, one in enumerate(slices)
    ]


def write_plots(directory: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Write throughput and latency over time of each workload's last round, as SVG."""
    import pygal

    written = []
    for outcome in outcomes:
        points = buckets(outcome.rounds[-1].timeline) if outcome.rounds else []
        if not points:
            continue
        for name, what, column in (
            ("rate", "successes per second", 1),
            ("latency", "worst latency, ms", 2),
        ):
            # No script from elsewhere: the picture must open without a network.
            chart = pygal.XY(
                title=f"{outcome.name}: {what}", x_title="seconds", show_legend=False,
                js=[], dots_size=1,
            )  # fmt: skip
            chart.add(what, [(point[0], point[column]) for point in points])
            path = directory / f"{outcome.name}-{name}.svg"
            chart.render_to_file(str(path))
            written.append(path)
    return written
