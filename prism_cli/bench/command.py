"""`prismctl bench`: picks workloads, runs their rounds, and removes what they made."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prism_cli import quantities
from prism_cli.options import Format, Settings, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prism_cli.bench.figures import Outcome
    from prism_cli.bench.runner import Keep
    from prism_cli.bench.workloads import Size, Workload

#: A burst that waits for READY is bound by this unless --timeout says otherwise.
_TIMEOUT_S: Final = 60.0
_SECONDS: Final = 60.0
_ROUNDS_MAX: Final = 100
#: Each takes a core at most.
_PROCESSES_MAX: Final = 16
_COUNT_MAX: Final = 1_000_000

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[WORKLOAD]...", help="Names, or `list`.  [default: all]"),
]
Rounds = Annotated[int, typer.Option(min=1, max=_ROUNDS_MAX, help="Rounds of each workload.")]
Seconds = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=quantities.parse_positive_duration,
        help=f"Length of an open loop.  [default: {_SECONDS:.0f}s]",
    ),
]
Count = Annotated[
    int | None,
    typer.Option(min=1, max=_COUNT_MAX, help="Sandboxes or execs, not the usual number."),
]
Processes = Annotated[
    int,
    typer.Option(min=1, max=_PROCESSES_MAX, help="Processes that unary creates come from."),
]
Real = Annotated[
    bool, typer.Option("--real", help="Start real sandboxes where no simulated agents are.")
]
ChangeLeader = Annotated[
    bool,
    typer.Option(
        "--change-leader/--keep-leader",
        help="Have another member lead before the list is compared.",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write every round as JSON, as it ends."),
]
Plot = Annotated[Path | None, typer.Option(metavar="DIR", help="Write SVG over time; needs pygal.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @command(
        app,
        "bench",
        examples=[
            "prismctl bench list",
            "prismctl bench burst-1k sequential",
            "prismctl bench open-500 --seconds 10s --plot plots",
            "prismctl bench --rounds 5 --json result.json",
            "prismctl bench burst-1k --count 100 --real",
        ],
    )
    def bench(
        settings: Settings,
        workloads: Names = None,
        rounds: Rounds = 1,
        seconds: Seconds = None,
        count: Count = None,
        processes: Processes = 1,
        real: Real = False,
        change_leader: ChangeLeader = True,
        json_file: JsonFile = None,
        plot: Plot = None,
        markdown: Markdown = False,
    ) -> None:
        """Put load on a cluster and hold the figures against the bars of a two-core machine.

        Only committed successes count: afterwards another member leads, and each is looked for in
        its list. All that is made has the label prism-bench=RUN and is removed, on Ctrl-C too.

        Workloads on the control plane need simulated agents (prism-agent --runtime=fake), or
        --real. Exit status 1 if an acknowledged sandbox was lost or duplicated, or a workload broke
        off; a missed bar is only said.
        """
        if workloads == ["list"]:
            _write_list(settings)
            return
        from prism_cli.bench.workloads import Size

        size = Size(_SECONDS if seconds is None else seconds, count, processes)
        files = _Files(json_file, plot, markdown)
        _bench(settings, _choose(workloads or []), rounds, size, files, _Means(real, change_leader))


@dataclass(frozen=True, slots=True)
class _Files:
    """Where the figures go besides the terminal."""

    json: Path | None
    plot: Path | None
    markdown: bool


@dataclass(frozen=True, slots=True)
class _Means:
    """What the load may do to the cluster."""

    real: bool
    changes_leader: bool


def _bench(
    settings: Settings, chosen: "list[Workload]", rounds: int, size: "Size", files: _Files,
    means: _Means,
) -> None:  # fmt: skip
    from prism_cli.bench import report
    from prism_cli.bench.machine import describe

    if files.plot is not None:
        report.require_plotting(files.plot)
    machine = describe()

    def keep(outcomes: "Sequence[Outcome]") -> None:
        # After every round: what a long run has measured outlives whatever ends it.
        if files.json is not None:
            report.write_json(files.json, machine, outcomes)

    keep(())
    outcomes = _run(settings, chosen, rounds, size, means, keep)
    if files.plot is not None:
        report.write_plots(files.plot, outcomes)
    _write(settings, machine, outcomes, files.markdown)
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def _all() -> "list[Workload]":
    from prism_cli.bench.real import REAL
    from prism_cli.bench.workloads import CONTROL

    return [*CONTROL, *REAL]


def _choose(names: list[str]) -> "list[Workload]":
    known = {workload.name: workload for workload in _all()}
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is none; see prismctl bench list", param_hint="'WORKLOAD'"
            )
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def _write_list(settings: Settings) -> None:
    from prism_cli.output import Column, write_list

    items: list[Any] = _all()
    if settings.format in (Format.JSON, Format.YAML):
        items = [{"name": each.name, "summary": each.summary} for each in items]
    columns = [
        Column("WORKLOAD", lambda each: each.name),
        Column("WHAT IT DOES", lambda each: each.summary),
        Column("BARS", lambda each: ", ".join(f"{bar.figure} {bar}" for bar in each.bars)),
    ]
    write_list(settings.format, items, columns, lambda each: str(each.name))


def _write(
    settings: Settings, machine: dict[str, str], outcomes: "list[Outcome]", markdown: bool
) -> None:
    from prism_cli.bench import report
    from prism_cli.output import write_data

    if markdown:
        typer.echo(report.markdown(machine, outcomes))
    elif settings.format in (Format.JSON, Format.YAML):
        write_data(settings.format, report.as_data(machine, outcomes))
    else:
        report.write_table(machine, outcomes)


def _run(
    settings: Settings,
    chosen: "list[Workload]",
    rounds: int,
    size: "Size",
    means: _Means,
    keep: "Keep",
) -> "list[Outcome]":
    """Run all; a signal cancels the load, and what it made is removed before this returns.

    Raises:
        KeyboardInterrupt: By SIGINT.
        LeavingError: By SIGTERM or SIGHUP.
    """  # fmt: skip
    import asyncio
    import signal

    from prism_cli.bench import load
    from prism_cli.bench.runner import run_workloads
    from prism_cli.bench.target import Target
    from prism_cli.errors import LeavingError

    addresses, _ = settings.addresses()
    timeout_s = _TIMEOUT_S if settings.timeout is None else settings.timeout
    caught: list[int] = []

    async def run() -> "list[Outcome]":
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def leave(number: int) -> None:
            if not caught and task is not None:
                task.cancel()
                sys.stderr.write("\nprismctl: removing what was made\n")
            caught.append(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, leave, number)
        async with Target(addresses, timeout_s, means.real, means.changes_leader) as target:
            try:
                return await run_workloads(target, chosen, rounds, size, keep)
            finally:
                await target.remove_run()

    try:
        return load.run(run())
    except asyncio.CancelledError:
        if caught[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise LeavingError(caught[0]) from None
