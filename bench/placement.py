"""Figures of the pure scheduler: placements a second, by number of nodes.

    .venv/bin/python bench/placement.py --rounds=5
    .venv/bin/python bench/placement.py --shapes       # other loads, both strategies, printed

A hundred thousand sandboxes wait, on 10, 100 and 1,000 nodes that are half full in the end.
"""

from __future__ import annotations

import random
import sys
import time

from bench.part import Results, leave_on_signals, parser, run_rounds
from prism_cli.bench.figures import Bar, Outcome, Round
from prism_control.scheduler.core import Scheduler
from prism_control.scheduler.placement import Strategy
from prism_control.state import commands as c
from prism_control.state.machine import Machine
from prism_control.state.model import Amounts, RuntimeRow, Spec

WAITING = 100_000
NODES = (10, 100, 1000)


def cluster(nodes: int, waiting: int, *, fill: float, shapes: int) -> Machine:
    """Return a machine whose nodes have room for `waiting / fill` sandboxes."""
    machine = Machine()
    slots = int(waiting / nodes / fill) + 1
    room = Amounts(slots * 800, slots * (300 << 20), slots * (300 << 20), slots)
    machine.apply(1, c.Proposal(1, 1, tuple(
        c.RegisterNode(f"n{k:04d}", f"node{k:04d}", "i", f"h{k}:7117", room,
                       (RuntimeRow("fake", True),), (("zone", str(k % 4)),), "0", 15000, 1000)
        for k in range(nodes)
    )))  # fmt: skip
    for begin in range(0, waiting, 1000):
        machine.apply(2 + begin, c.Proposal(1, 2, tuple(
            c.CreateSandbox("", b"", f"sb-{k:06d}", f"s-{k:06d}",
                            Spec("host", 500 + k % shapes, 256 << 20, 256 << 20, 128, 1024,
                                 priority=k % 3))
            for k in range(begin, min(waiting, begin + 1000))
        )))  # fmt: skip
    return machine


def drain(machine: Machine, strategy: Strategy) -> tuple[int, float]:
    """Decide until nothing more fits; return placements and seconds spent deciding."""
    uniform = random.Random(7).random
    scheduler = Scheduler.from_machine(machine, uniform, strategy=strategy)
    placed, spent, now_ms = 0, 0.0, 1000
    while True:
        begin = time.perf_counter()
        decision = scheduler.decide(now_ms)
        spent += time.perf_counter() - begin
        if decision is None or not decision.placements:
            return placed, spent
        placed += len(decision.placements)
        now_ms += 10


def committed(machine: Machine) -> None:
    """The same with commits observed, as on a leader."""
    scheduler = Scheduler.from_machine(machine, random.Random(7).random)
    index, now_ms, spent, observed, placed = machine.applied_index, 1000, 0.0, 0.0, 0
    while True:
        begin = time.perf_counter()
        decision = scheduler.decide(now_ms)
        spent += time.perf_counter() - begin
        if decision is None or not decision.placements:
            break
        index += 1
        (result,), events = machine.apply(index, c.Proposal(1, now_ms, (decision,)))
        assert not result.refused
        begin = time.perf_counter()
        scheduler.observe(events)
        observed += time.perf_counter() - begin
        placed += len(decision.placements)
        now_ms += 10
    print(f"  with commits: decide {placed / spent:,.0f}/s, observe {placed / observed:,.0f}/s")


def default_load(waiting: int) -> Round:
    """Return placements a second for each number of nodes, and how much they differ."""
    rates = {}
    for nodes in NODES:
        machine = cluster(nodes, waiting, fill=0.5, shapes=1)
        placed, spent = drain(machine, next(iter(Strategy)))
        if placed != waiting:
            raise AssertionError(f"{placed} of {waiting} were placed on {nodes} nodes")
        rates[nodes] = placed / spent
    return Round(
        {
            **{f"placed_on_{nodes}_nodes_per_s": rate for nodes, rate in rates.items()},
            "fastest_by_slowest": max(rates.values()) / min(rates.values()),
        }
    )


def print_shapes() -> None:
    """Print other loads: nodes that fill up, many shapes, both strategies, and commits observed."""
    for fill, shapes, what in (
        (0.5, 1, "half full at the end, one shape"),
        (0.999, 1, "full at the end, one shape"),
        (0.5, 500, "half full, 500 shapes"),
        (2.0, 20, "twice what fits, 20 shapes"),
    ):
        for strategy in Strategy:
            print(f"{what}, {strategy.value}:")
            for nodes in NODES:
                machine = cluster(nodes, WAITING, fill=fill, shapes=shapes)
                placed, spent = drain(machine, strategy)
                print(f"  {nodes} nodes: {placed} placed, {placed / spent:,.0f}/s")
    machine = cluster(1000, WAITING, fill=0.5, shapes=1)
    committed(machine)
    used = [machine.sandbox_count_on(f"n{k:04d}") for k in range(1000)]
    print(f"  spread over 1,000 nodes: min {min(used)}, max {max(used)} sandboxes a node")


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--shapes", action="store_true", help="print other loads instead")
    arguments = flags.parse_args()
    leave_on_signals()
    if arguments.shapes:
        print_shapes()
        return 0
    waiting = 10_000 if arguments.quick else WAITING
    outcome = Outcome(
        "placement", f"the scheduler alone: {waiting:,} that wait",
        (Bar("placed_on_1000_nodes_per_s", "at least", 20_000),
         Bar("fastest_by_slowest", "at most", 2)),
    )  # fmt: skip
    results = Results(arguments, (outcome,))
    return run_rounds(results, arguments.rounds, [(outcome, lambda: default_load(waiting))])


if __name__ == "__main__":
    sys.exit(main())
