"""The workloads that run code in real sandboxes, and the program's own start."""

import asyncio
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Final

from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.bench.figures import Bar, Round, SkippedError, latencies_ms, percentile
from prism_cli.bench.target import Tally, Target, create, each_of
from prism_cli.bench.workloads import Size, Workload, settle
from prism_cli.errors import CliError

_FIRST_EXECS: Final = 30
_EXECS: Final = 500
_EXECS_IN_FLIGHT: Final = 8
#: More in flight show whether it is the calls or the waits between them that bound the rate.
_EXECS_IN_FLIGHT_MORE: Final = 16
#: Output of one exec, in MiB; --count gives less.
_OUTPUT_MIB: Final = 256
_REAL_BURST: Final = 500
_STARTS: Final = 15
#: The server's own: a small share of a core would throttle what is timed.
_DEFAULTS: Final = pb.Limits()
#: 500 of them fit on a node of two cores; their processor time throttles their start too.
_SMALL: Final = pb.Limits(cpu_millicores=30, memory_bytes=32 << 20, disk_bytes=8 << 20)
#: What a bare sandbox of bubblewrap is: the same namespaces and system directories.
_BWRAP: Final = (
    "bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin",
    "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc",
    "--dev", "/dev", "--tmpfs", "/run", "--", "/bin/true",
)  # fmt: skip
#: The same of gVisor, on the platform that Prism uses, without a network.
_RUNSC: Final = ("--platform=ptrace", "--network=none", "--ignore-cgroups", "do", "/bin/true")
#: Where deploy/fetch_gvisor.sh puts it.
_RUNSC_PLACES: Final = ("/usr/local/lib/prism/runsc", "~/.local/lib/prism/runsc")


def real_runtimes(target: Target) -> list[str]:
    """Return the runtimes that run code.

    Raises:
        SkippedError: No node has one.
    """
    found = sorted(name for name in target.runtimes if name != "fake")
    if not found:
        raise SkippedError("no node has a runtime that runs code; start a prism-agent")
    return found


async def execute(target: Target, sandbox: str, *argv: str) -> int:
    """Run a program, /bin/true unless another is named; return how many bytes it wrote.

    Raises:
        CliError: It did not exit with 0.
    """
    argv = argv or ("/bin/true",)
    call = target.leader.Exec(timeout=target.timeout_s)
    start = pb.ExecStart(sandbox=sandbox, request_id=str(uuid.uuid4()), argv=argv)
    await call.write(pb.ExecRequest(start=start))
    await call.done_writing()
    written = 0
    async for response in call:
        match response.WhichOneof("response"):
            case "output":
                written += len(response.output.data)
            case "exit":
                if response.exit.exit_code != 0:
                    raise CliError(f"{argv[0]} exited with {response.exit.exit_code} in {sandbox}")
                return written
    raise CliError(f"an exec in {sandbox} ended without an exit status")


async def run_program(*argv: str) -> float:
    """Return the seconds that a program takes.

    Raises:
        CliError: It failed.
    """
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise CliError(f"{argv[0]} failed: {errors.decode(errors='replace').strip()}")
    return time.perf_counter() - started


def bare_start(runtime: str) -> tuple[str, ...]:
    """Return what starts /bin/true in a bare sandbox of a runtime; empty: that is not here."""
    if runtime == "bubblewrap" and shutil.which("bwrap") is not None:
        return _BWRAP
    if runtime == "gvisor":
        places = (os.environ.get("PRISM_RUNSC"), shutil.which("runsc"), *_RUNSC_PLACES)
        found = (os.path.expanduser(place) for place in places if place)
        runsc = next((path for path in found if os.access(path, os.X_OK)), "")
        if runsc and os.geteuid() == 0:
            return (runsc, *_RUNSC)
    return ()


async def first_exec(target: Target, size: Size) -> Round:
    """Create, and run /bin/true, one sandbox after the other; the bare runtime's start in turn."""
    figures: dict[str, float] = {}
    tally = Tally()
    for runtime in real_runtimes(target):
        # The load's machine must also be the node's, or the two do not compare.
        local = target.leader_address.startswith(("127.", "[::1]", "localhost"))
        beside = bare_start(runtime) if local else ()
        bare, ready, first = [], [], []
        for _ in range(size.at_most(_FIRST_EXECS)):
            if beside:
                bare.append(await run_program(*beside))
            started = time.perf_counter()
            sandbox = await target.leader.CreateSandbox(
                target.request(runtime, ready=True, limits=_DEFAULTS), timeout=target.timeout_s
            )
            ready.append(time.perf_counter() - started)
            await execute(target, sandbox.id)
            first.append(time.perf_counter() - started)
            tally.acknowledge(sandbox, started)
            await target.delete([sandbox.id])
        for what, seconds in (("ready", ready), ("first_exec", first), ("bare", bare)):
            if seconds:
                figures[f"{runtime}_{what}_p50_ms"] = percentile(sorted(seconds), 0.5) * 1e3
                figures[f"{runtime}_{what}_p99_ms"] = percentile(sorted(seconds), 0.99) * 1e3
        if bare:
            figures[f"{runtime}_ratio"] = percentile(sorted(first), 0.5) / percentile(
                sorted(bare), 0.5
            )
    return Round(figures, {}, tally.timeline, tally.client_cpu())


async def exec_true(target: Target, size: Size) -> Round:
    """Run /bin/true in a READY sandbox: one after the other for latency, then several at once."""
    figures: dict[str, float] = {}
    tally = Tally()
    for runtime in real_runtimes(target):
        request = target.request(runtime, ready=True, limits=_DEFAULTS)
        sandbox = (await target.leader.CreateSandbox(request, timeout=target.timeout_s)).id
        await execute(target, sandbox)
        for name, value in (await _execs(target, size, sandbox, tally)).items():
            figures[f"{runtime}_{name}"] = value
    cpu = tally.client_cpu()
    await target.remove_run()
    return Round(figures, {}, tally.timeline, cpu)


async def _execs(target: Target, size: Size, sandbox: str, tally: Tally) -> dict[str, float]:
    count = size.at_most(_EXECS)
    latencies: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        await execute(target, sandbox)
        now = time.perf_counter()
        latencies.append(now - started)
        tally.timeline.append((now - tally.started, now - started))

    async def one(_: int) -> None:
        await execute(target, sandbox)

    async def rate(in_flight: int) -> float:
        started = time.perf_counter()
        await each_of(range(count), in_flight, one)
        return count / (time.perf_counter() - started)

    return {
        "execs_per_s": await rate(_EXECS_IN_FLIGHT),
        f"execs_per_s_{_EXECS_IN_FLIGHT_MORE}_in_flight": await rate(_EXECS_IN_FLIGHT_MORE),
        **latencies_ms(latencies),
    }


async def exec_output(target: Target, size: Size) -> Round:
    """Have one exec write zeros as fast as they are taken, and take them as the API gives them."""
    figures: dict[str, float] = {}
    tally = Tally()
    count = size.at_most(_OUTPUT_MIB) << 20
    for runtime in real_runtimes(target):
        request = target.request(runtime, ready=True, limits=_DEFAULTS)
        sandbox = (await target.leader.CreateSandbox(request, timeout=target.timeout_s)).id
        await execute(target, sandbox)
        started = time.perf_counter()
        written = await execute(target, sandbox, "head", "-c", str(count), "/dev/zero")
        took_s = time.perf_counter() - started
        if written != count:
            raise CliError(f"{written} bytes of output came of {count} in {sandbox}")
        figures[f"{runtime}_output_mb_per_s"] = written / 1e6 / took_s
    cpu = tally.client_cpu()
    await target.remove_run()
    return Round(figures, {}, tally.timeline, cpu)


async def real_burst(target: Target, size: Size) -> Round:
    """Create many real sandboxes at once until READY; none may be left in the list after."""
    runtime = real_runtimes(target)[0]
    requests = [
        target.request(runtime, ready=True, limits=_SMALL) for _ in range(size.at_most(_REAL_BURST))
    ]
    tally = Tally()

    async def one(request: pb.CreateSandboxRequest) -> None:
        await create(target.leader, target.timeout_s, tally, request)

    await each_of(requests, len(requests), one)
    result = await settle(target, tally)
    left = len(await target.list_run())
    result.figures["leftovers"] = float(left + target.left_on_nodes())
    return result


async def cli_start(target: Target, size: Size) -> Round:
    """Time `prismctl --help` and, where there is a node, `prismctl sandbox create`."""
    command = (sys.executable, "-m", "prism_cli")
    count = size.at_most(_STARTS)
    helps = [await run_program(*command, "--help") for _ in range(count)]
    figures = {"help_p50_ms": percentile(sorted(helps), 0.5) * 1e3}
    if target.runtimes:
        argv = (
            *command, f"--api={target.leader_address}", "sandbox", "create", "--no-wait",
            "--memory=64Mi", f"--label=prism-bench={target.run_id}",
        )  # fmt: skip
        creates = [await run_program(*argv) for _ in range(count)]
        figures["create_p50_ms"] = percentile(sorted(creates), 0.5) * 1e3
    await target.remove_run()
    return Round(figures)


_BARE_RATIOS: Final = (
    Bar("bubblewrap_ratio", "at most", 2), Bar("gvisor_ratio", "at most", 2),
)  # fmt: skip
REAL: Final[Sequence[Workload]] = (
    Workload("first-exec", "create to the first exec's result, per runtime, beside a bare start",
             first_exec, _BARE_RATIOS),
    Workload("exec-true", "/bin/true in a READY sandbox", exec_true,
             (Bar("bubblewrap_p50_ms", "at most", 8), Bar("bubblewrap_p99_ms", "at most", 25),
              Bar("bubblewrap_execs_per_s", "at least", 300))),
    Workload("exec-output", "256 MiB of output of one exec", exec_output,
             (Bar("bubblewrap_output_mb_per_s", "at least", 200),)),
    Workload("real-burst", "500 real sandboxes at once until READY", real_burst,
             (Bar("failures", "at most", 0), Bar("lost", "at most", 0),
              Bar("leftovers", "at most", 0))),
    Workload("cli-start", "prismctl --help and prismctl sandbox create", cli_start,
             (Bar("help_p50_ms", "at most", 150), Bar("create_p50_ms", "at most", 250))),
)  # fmt: skip
