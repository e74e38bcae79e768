"""The leader killed with SIGKILL under load: how long nobody is served, and what is lost.

    .venv/bin/python bench/failover.py --rounds=5 --rate=500

`failover-open`: creates at a steady rate, through all members in turn. A call that fails is sent
again to the next member, with its request id, until it is acknowledged; its latency counts from
when it was due. The gap is the longest time in which no create was acknowledged.

`failover-burst`: ten thousand creates, 256 in flight, to the leader, which is killed after a
third of them. No call is repeated: each is acknowledged and then present, or refused or of unknown
outcome and then present at most once. What failed is sent again with its request id: now all
must be present exactly once, and what was there before must be the answer.

Before each comparison the leader that followed is killed as well.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import grpc
from prism.sandbox.v1 import sandbox_pb2 as pb
from prism.sandbox.v1 import sandbox_pb2_grpc

from bench.local import LocalTarget, running
from bench.part import Results, leave_on_signals, parser, run_rounds
from prism_cli.bench.figures import Bar, Outcome, Round, latencies_ms
from prism_cli.bench.target import LABEL, Tally, each_of, lost_and_duplicated
from prism_cli.errors import CliError
from tests.integration import harness

AGENTS = 20
IN_FLIGHT = 256
ITEM = "prism-bench-item"
#: A call that a dying member swallows is given up after so long, and sent to the next one.
CALL_TIMEOUT_S = 5.0
#: An election takes a second or two; a create that takes so long was not served.
GIVE_UP_S = 30.0
RETRY_PAUSE_S = 0.01
CALM_S = 2.0
TIMEOUT_S = 60.0

Stubs = Sequence["sandbox_pb2_grpc.SandboxServiceAsyncStub"]


async def open_stubs(target: LocalTarget, cluster: harness.Cluster) -> Stubs:
    """Return a stub for each member."""
    return [
        sandbox_pb2_grpc.SandboxServiceStub(await target.channel(node.api))
        for node in cluster.nodes
    ]


async def persist(stubs: Stubs, first: int, request: pb.CreateSandboxRequest) -> pb.Sandbox:
    """Create by the first member or the next ones, until one acknowledges.

    Raises:
        TimeoutError: None did.
    """
    async with asyncio.timeout(GIVE_UP_S):
        for number in itertools.count(first):
            try:
                return await stubs[number % len(stubs)].CreateSandbox(
                    request, timeout=CALL_TIMEOUT_S
                )
            except grpc.aio.AioRpcError:
                await asyncio.sleep(RETRY_PAUSE_S)
    raise AssertionError("the loop ends by an answer or by the time")


async def kill_and_restart(cluster: harness.Cluster, leader: harness.ControlNode) -> float:
    """Kill it; return when. It is back once another leads, so that two of three vote for that."""
    killed = time.perf_counter()
    leader.kill()
    await asyncio.to_thread(cluster.leader)
    leader.start()
    await asyncio.to_thread(cluster.wait_ready)
    return killed


def longest_gap_s(successes: Sequence[float]) -> float:
    """Return the longest time without a success, of sorted times."""
    pairs = itertools.pairwise(successes)
    return max((later - earlier for earlier, later in pairs), default=0.0)


async def open_loop(
    target: LocalTarget, cluster: harness.Cluster, rate: int, seconds: float
) -> Round:
    """Offer creates at a rate; kill the leader after a while."""
    stubs, tally = await open_stubs(target, cluster), Tally()
    given_up = 0

    async def one(number: int, due: float) -> None:
        nonlocal given_up
        request = target.request("fake", ready=False)
        try:
            tally.acknowledge(await persist(stubs, number, request), due)
        except TimeoutError:
            given_up += 1

    async def offer(group: asyncio.TaskGroup) -> None:
        for number in range(int(rate * seconds)):
            due = tally.started + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number, due))

    async with asyncio.TaskGroup() as group:
        group.create_task(offer(group))
        await asyncio.sleep(min(CALM_S, seconds / 3))
        leader = await asyncio.to_thread(cluster.leader)
        killed = await kill_and_restart(cluster, leader) - tally.started
    cpu = tally.client_cpu()
    done = sorted(at for at, _ in tally.timeline)
    gap_s = longest_gap_s(done)
    lost, duplicated = await lost_and_duplicated(target, tally)
    await target.remove_run()
    figures = {
        "offered_per_s": float(rate),
        "gap_s": gap_s,
        "acknowledged": float(len(tally.ids)),
        **latencies_ms(tally.latencies_s),
        "given_up": float(given_up),
        "lost": float(lost),
        "duplicated": float(duplicated),
    }
    if not any(at > killed for at in done):
        raise CliError("nothing was acknowledged after the leader was killed")
    return Round(figures, {}, tally.timeline, cpu)


async def burst(target: LocalTarget, cluster: harness.Cluster, count: int) -> Round:
    """Create many to the leader, kill it in their midst, and account for each."""
    stubs, tally = await open_stubs(target, cluster), Tally()
    leader = await asyncio.to_thread(cluster.leader)
    current = cluster.nodes.index(leader)
    requests = [target.request("fake", ready=False) for _ in range(count)]
    for number, request in enumerate(requests):
        request.spec.labels[ITEM] = str(number)
    told: dict[int, str] = {}
    failed: list[int] = []
    third = asyncio.Event()

    async def one(number: int) -> None:
        nonlocal current
        asked = current
        due = time.perf_counter()
        try:
            made = await stubs[asked].CreateSandbox(requests[number], timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            failed.append(number)
            tally.refused[error.code().name] += 1
            if asked == current:
                current = (asked + 1) % len(stubs)
        else:
            told[number] = made.id
            tally.acknowledge(made, due)
        # Failures count too: a cluster that refuses all must not be waited for.
        if (len(told) + len(failed)) * 3 >= count:
            third.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(each_of(range(count), IN_FLIGHT, one))
        await third.wait()
        await kill_and_restart(cluster, leader)
    cpu = tally.client_cpu()
    if not failed:
        raise CliError("the leader was killed too late: every create was acknowledged")
    await target.find()
    await target.change_leader()
    present = await list_items(target)
    lost = sum(id_ not in present[number] for number, id_ in told.items())
    duplicated = sum(len(ids) > 1 for ids in present.values())
    unanswered = {number: present[number] for number in failed if present[number]}
    again: dict[int, str] = {}

    async def once_more(number: int) -> None:
        again[number] = (await persist(stubs, 0, requests[number])).id

    await each_of(failed, IN_FLIGHT, once_more)
    # A repeated create whose first try did commit must have that one's sandbox.
    duplicated += sum(again[number] not in ids for number, ids in unanswered.items())
    await target.change_leader()
    present = await list_items(target)
    for number, id_ in (told | again).items():
        lost += id_ not in present[number]
        duplicated += len(present[number]) > 1
    await target.remove_run()
    figures = {
        "acknowledged": float(len(told)),
        "failed_calls": float(len(failed)),
        "failed_but_present": float(len(unanswered)),
        "took_s": tally.took_s,
        "gap_s": longest_gap_s(sorted(at for at, _ in tally.timeline)),
        "acknowledged_after_resend": float(len(told) + len(again)),
        "lost": float(lost),
        "duplicated": float(duplicated),
    }
    return Round(figures, dict(tally.refused), tally.timeline, cpu)


async def list_items(target: LocalTarget) -> dict[int, list[str]]:
    """Return the ids of this run's sandboxes by the number of their create."""
    found: dict[int, list[str]] = defaultdict(list)
    request = pb.ListSandboxesRequest(page_size=1000, label_selector={LABEL: target.run_id})
    while True:
        page = await target.leader.ListSandboxes(request, timeout=TIMEOUT_S)
        for sandbox in page.sandboxes:
            found[int(sandbox.spec.labels[ITEM])].append(sandbox.id)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--rate", type=int, default=500, help="creates a second")
    flags.add_argument("--seconds", type=float, default=10.0, help="length of the open loop")
    flags.add_argument("--count", type=int, default=10_000, help="creates of the burst")
    flags.add_argument("--members", type=int, default=3)
    arguments = flags.parse_args()
    leave_on_signals()
    seconds = 6.0 if arguments.quick else arguments.seconds
    count = 2000 if arguments.quick else arguments.count
    exact = (Bar("lost", "at most", 0), Bar("duplicated", "at most", 0))
    steady = Outcome(
        "failover-open", f"leader kill -9 under {arguments.rate} creates a second",
        (Bar("gap_s", "at most", 1.5), Bar("given_up", "at most", 0), *exact),
    )  # fmt: skip
    midst = Outcome("failover-burst", f"leader kill -9 amid {count:,} creates", exact)
    results = Results(arguments, (steady, midst))
    with running(AGENTS, arguments.members) as (cluster, _):

        async def on_target(load: str) -> Round:
            async with LocalTarget(cluster, TIMEOUT_S) as target:
                try:
                    if load == "steady":
                        return await open_loop(target, cluster, arguments.rate, seconds)
                    return await burst(target, cluster, count)
                finally:
                    await target.remove_run()

        return run_rounds(
            results, arguments.rounds,
            [(steady, lambda: asyncio.run(on_target("steady"))),
             (midst, lambda: asyncio.run(on_target("burst")))],
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
