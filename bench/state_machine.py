"""Figures of the pure state machine: apply, snapshot, restore, memory.

Run: PYTHONPATH=. python bench/state_machine.py [ROWS]
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
import uuid

from prism_common.errors import AmbiguousError, NotFoundError
from prism_control.state import commands as c
from prism_control.state.machine import Machine
from prism_control.state.model import Amounts, ObservedState, RuntimeRow, Spec
from prism_control.state.snapshot import encode_snapshot

NODES = 100


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def timed(what: str, samples: list[float]) -> None:
    samples.sort()
    print(
        f"{what}: median {statistics.median(samples) * 1e3:.2f} ms, "
        f"p99 {samples[int(len(samples) * 0.99)] * 1e3:.2f} ms, "
        f"max {samples[-1] * 1e3:.2f} ms, n={len(samples)}"
    )


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    spec = Spec("host", 500, 1 << 28, 1 << 28, 128, 1024, labels=(("team", "eval"),))
    machine = Machine()
    room = Amounts(10**9, 10**15, 10**15, 10**6)
    index = 1
    machine.apply(
        index,
        c.Proposal(1, 1, tuple(
            c.RegisterNode(f"n{k}", f"node{k}", "i", f"h{k}:7117", room,
                           (RuntimeRow("fake", True),), (), "0", 15000, 1000)
            for k in range(NODES)
        )),
    )  # fmt: skip
    batches = []
    for begin in range(0, rows, 1000):
        items = tuple(
            c.CreateSandbox(str(uuid.uuid4()), uuid.uuid4().bytes, f"sb-{k:020x}",
                            f"cosmic-dragon-{k:06x}", spec)
            for k in range(begin, min(begin + 1000, rows))
        )  # fmt: skip
        batches.append(c.encode(c.Proposal(1, 1000 + begin, items)))
    before = rss_mb()
    samples = []
    for data in batches:
        index += 1
        begin_s = time.perf_counter()
        machine.apply(index, data)
        samples.append(time.perf_counter() - begin_s)
    timed("apply of 1,000 creates (with decoding)", samples)
    print(f"memory of {rows} rows with request ids, PENDING: {rss_mb() - before:.0f} MB")
    samples, ids = [], [row.id for row in machine.sandboxes()]
    for begin in range(0, rows, 1000):
        index += 1
        data = c.encode(c.Proposal(1, 10**6, (c.AssignSandboxes(tuple(
            c.Placement(ids[k], 1, f"n{k % NODES}") for k in range(begin, min(begin + 1000, rows))
        )),)))  # fmt: skip
        begin_s = time.perf_counter()
        machine.apply(index, data)
        samples.append(time.perf_counter() - begin_s)
    timed("apply of 1,000 placements", samples)
    for state in (ObservedState.STARTING, ObservedState.READY):
        samples = []
        for node in range(NODES):
            index += 1
            data = c.encode(c.Proposal(1, 10**6, (c.ReportSandboxes(f"n{node}", "i", tuple(
                c.Report(key, 1, state, runtime="fake") for key in ids[node::NODES]
            )),)))  # fmt: skip
            begin_s = time.perf_counter()
            machine.apply(index, data)
            samples.append(time.perf_counter() - begin_s)
        timed(f"apply of {rows // NODES} reports {state.name}", samples)
    print(f"memory of {rows} rows READY, with ids and the last events: {rss_mb() - before:.0f} MB")
    samples = []
    for _ in range(20):
        begin_s = time.perf_counter()
        view = machine.snapshot_view()
        samples.append(time.perf_counter() - begin_s)
    timed("snapshot_view", samples)
    begin_s = time.perf_counter()
    chunks = list(encode_snapshot(view))
    took = time.perf_counter() - begin_s
    print(f"encode_snapshot: {took:.2f} s, {sum(map(len, chunks)) / 1e6:.1f} MB")
    begin_s = time.perf_counter()
    restored = Machine.from_snapshot(chunks)
    print(f"from_snapshot: {time.perf_counter() - begin_s:.2f} s")
    print("digests equal:", restored.digest() == machine.digest())
    samples = []
    for k in range(200):
        begin_s = time.perf_counter()
        machine.list_page(NODES + k * (rows // 200), 50)
        samples.append(time.perf_counter() - begin_s)
    timed("list_page of 50", samples)
    samples = []
    for k in range(2 * rows // 4096 + 50):
        begin_s = time.perf_counter()
        with contextlib.suppress(NotFoundError, AmbiguousError):
            machine.find_sandbox(("zzz", "sb", ids[k][:-1])[k % 3])
        samples.append(time.perf_counter() - begin_s)
    timed("lookup by a prefix, the first ones, which sort", samples[:-50])
    timed("lookup by a prefix, later", samples[-50:])
    begin_s = time.perf_counter()
    machine.apply(index + 1, c.Proposal(1, 10**7, (c.LoseNode("n1", "i", 5),)))
    print(f"LoseNode with {rows // NODES}: {(time.perf_counter() - begin_s) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
