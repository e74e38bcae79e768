"""The supervisor by its protocol: PID 1 of a namespace, with this test as its agent."""

import asyncio
import os
import random
import resource
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prism_agent.runtime.bubblewrap import SUPERVISOR
from prism_agent.supervisor import protocol
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Message, Request, State
from tests.unit.agent.supervised import RING_BYTES, Supervised, output_of


@pytest.fixture(params=["built", "sanitised"])
async def supervised(
    tmp_path: Path, request: pytest.FixtureRequest, sanitised: Path | None
) -> AsyncIterator[Supervised]:
    if shutil.which("bwrap") is None or not os.access(SUPERVISOR, os.X_OK):
        pytest.skip("needs bwrap and the built supervisor")
    program = SUPERVISOR if request.param == "built" else sanitised
    if program is None:
        pytest.skip("the compiler has no sanitisers")
    one = Supervised(tmp_path, program)
    await one.client.connect(one.socket_path)
    yield one
    assert one.end() == ""


async def test_exit_status_and_output(supervised: Supervised) -> None:
    header, output = await supervised.run(1, ["sh", "-c", "echo hi; exit 7"])
    assert (header.exit_code, header.signal, output) == (7, 0, b"hi\n")


async def test_does_not_run_as_another_process_than_pid_1() -> None:
    argv = [SUPERVISOR, "supervise", "0", "1", "0", "x"]
    done = await asyncio.to_thread(subprocess.run, argv, check=False)
    assert done.returncode == 2


async def test_orphans_of_double_forks_are_reaped(supervised: Supervised) -> None:
    script = "for i in $(seq 200); do (sh -c 'exit 3' &) ; done; sleep 0.3"
    await supervised.run(1, ["sh", "-c", script])
    counting = "cat /proc/[0-9]*/stat | awk '$3 == \"Z\"' | wc -l"
    async with asyncio.timeout(10):
        number = 2
        while (await supervised.run(number, ["sh", "-c", counting]))[1] != b"0\n":
            number += 1


async def test_flood_stops_at_the_window_and_goes_on(supervised: Supervised) -> None:
    ring = supervised.start(1, ["head", "-c", "1000000", "/dev/zero"])
    previous, number = -1, 100
    async with asyncio.timeout(20):
        while (head := ring.header().head) != previous or head < RING_BYTES // 2:
            previous = head
            number += 1
            await supervised.run(number, ["sleep", "0.05"])
    assert ring.header().state is State.RUNNING
    assert head <= RING_BYTES
    offset, received = 0, 0
    async with asyncio.timeout(20):
        while True:
            outputs, offset = ring.read(offset)
            received += sum(len(each.data) for each in outputs)
            supervised.client.send(Message(Request.WINDOW, 1, offset + RING_BYTES))
            if not outputs:
                if ring.header().state is State.DRAINED:
                    break
                supervised.changed.clear()
                supervised.client.send(Message(Request.WAIT, 1, offset))
                await supervised.changed.wait()
    assert received == 1_000_000


async def test_overwriting_keeps_the_newest_whole_records(supervised: Supervised) -> None:
    ring = supervised.start(1, ["seq", "1", "200000"], flags=protocol.EXEC_OVERWRITE)
    header = await supervised.wait(1, State.DRAINED)
    assert header.tail > 0
    assert header.head - header.tail <= RING_BYTES
    everything = b"".join(b"%d\n" % i for i in range(1, 200_001))
    assert header.sequence == len(everything)
    kept = output_of(ring)
    assert len(kept) > RING_BYTES // 2
    assert everything.endswith(kept)


async def test_a_new_connection_takes_over(supervised: Supervised) -> None:
    supervised.start(5, ["sh", "-c", "sleep 0.2; echo late; exit 4"])
    await supervised.wait(5, State.RUNNING)
    supervised.client.close()
    second = SupervisorClient(supervised._on_event, lambda: None)
    supervised.events.clear()
    hello = await second.connect(supervised.socket_path)
    assert hello.b == 1
    supervised.client = second
    header = await supervised.wait(5, State.DRAINED)
    assert header.exit_code == 4
    assert output_of(supervised.rings[5]) == b"late\n"


async def test_exec_numbers_run_once(supervised: Supervised) -> None:
    await supervised.run(1, ["true"])
    spec = os.memfd_create("spec")
    os.write(spec, protocol.encode_spec("/", ["true"], {}))
    supervised.client.send(Message(Request.EXEC, 1), [spec, supervised.rings[1].fileno()])
    os.close(spec)
    assert (await supervised.error()).a == 17  # EEXIST


@pytest.mark.parametrize("seed", range(5))
async def test_malformed_packets_do_not_end_it(supervised: Supervised, seed: int) -> None:
    rng = random.Random(seed)
    supervised.client.close()
    for _ in range(200):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(str(supervised.socket_path))
            kind = rng.randrange(5)
            if kind == 0:
                packet = rng.randbytes(rng.randrange(1, 200))
            else:
                numbers = (rng.choice([0, 1, 2, 5, 8, 99]), rng.getrandbits(64))
                signed = [rng.randrange(-(2**63), 2**63) for _ in range(2)]
                packet = struct.pack("=IIQqq", protocol.MAGIC, *numbers, *signed)
            descriptors = []
            if kind == 2:
                count = rng.randrange(1, 7)
                descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
            elif kind == 3:
                spec = os.memfd_create("spec")
                os.write(spec, struct.pack("=IIII", protocol.MAGIC, *(rng.getrandbits(32),) * 3))
                os.write(spec, rng.randbytes(100))
                ring = os.memfd_create("ring")
                os.ftruncate(ring, rng.choice([0, 100, 4096, 4096 + RING_BYTES]))
                descriptors = [spec, ring]
                packet = Message(Request.EXEC, rng.getrandbits(8), 0, 0).encode()
            socket.send_fds(raw, [packet], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
    assert supervised.process.poll() is None
    supervised.client = SupervisorClient(supervised._on_event, lambda: None)
    await supervised.client.connect(supervised.socket_path)
    header, output = await supervised.run(777, ["echo", "alive"])
    assert (header.exit_code, output) == (0, b"alive\n")


async def test_terminate_ends_it_with_the_last_process(supervised: Supervised) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.02; done"
    ring = supervised.start(1, ["sh", "-c", script])
    async with asyncio.timeout(10):
        while b"up" not in output_of(ring):
            supervised.client.send(Message(Request.WAIT, 1, ring.header().head))
            supervised.changed.clear()
            await supervised.changed.wait()
    supervised.client.send(Message(Request.TERMINATE))
    assert await asyncio.to_thread(supervised.process.wait, 20) == 0
    header = ring.header()
    assert header.exit_code == 5
    # Its shell may say that what it ran was terminated as well.
    assert b"bye\n" in output_of(ring)


async def test_an_end_that_could_not_be_written_is_written_later(supervised: Supervised) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: to have writes of another process fail")
    ring = supervised.start(1, ["sleep", "60"])
    await supervised.wait(1, State.RUNNING)
    pid = supervised.pid()
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    supervised.client.send(Message(Request.SIGNAL, 1, 9))
    async with asyncio.timeout(20):
        while not any(each.b & 0xFF == State.DRAINED for each in supervised.events):
            supervised.changed.clear()
            await supervised.changed.wait()
    assert ring.header().state is State.RUNNING
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    header = await supervised.wait(1, State.DRAINED)
    assert (header.signal, header.killed) == (9, True)


async def test_a_signal_right_after_the_start_is_not_lost(supervised: Supervised) -> None:
    numbers = range(1, 41)
    for number in numbers:
        supervised.start(number, ["sleep", "60"])
        supervised.client.send(Message(Request.SIGNAL, number, 9))
    for number in numbers:
        assert (await supervised.wait(number, State.DRAINED)).signal == 9


async def _take_all(supervised: Supervised, numbers: list[int]) -> dict[int, bytes]:
    """Read execs to their end, as a client does that is never slow."""
    received = dict.fromkeys(numbers, b"")
    offsets = dict.fromkeys(numbers, 0)
    async with asyncio.timeout(30):
        while numbers:
            supervised.changed.clear()
            took = False
            for number in list(numbers):
                ring = supervised.rings[number]
                drained = ring.header().state is State.DRAINED
                outputs, offsets[number] = ring.read(offsets[number])
                received[number] += b"".join(each.data for each in outputs)
                took = took or bool(outputs)
                if not outputs and drained:
                    numbers.remove(number)
                elif not outputs:
                    supervised.client.send(Message(Request.WAIT, number, offsets[number]))
                supervised.client.send(
                    Message(Request.WINDOW, number, offsets[number] + RING_BYTES)
                )
            if numbers and not took:
                await supervised.changed.wait()
    return received


async def test_output_that_comes_too_fast_is_slowed_and_not_lost(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 0, 512 * 1024))
    began_s = time.monotonic()
    supervised.start(1, ["seq", "1", "60000"])
    everything = b"".join(b"%d\n" % i for i in range(1, 60_001))
    assert (await _take_all(supervised, [1]))[1] == everything
    # 64 KiB come at once, and the rest at the rate; a busy machine only makes it slower.
    assert time.monotonic() - began_s > (len(everything) - 64 * 1024) / (512 * 1024) * 0.95


async def test_execs_share_the_rate_of_their_sandbox(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 0, 512 * 1024))
    began_s = time.monotonic()
    for number in (1, 2, 3):
        supervised.start(number, ["head", "-c", "100000", "/dev/zero"])
    received = await _take_all(supervised, [1, 2, 3])
    assert {number: len(data) for number, data in received.items()} == dict.fromkeys(
        (1, 2, 3), 100_000
    )
    assert time.monotonic() - began_s > (300_000 - 64 * 1024) / (512 * 1024) * 0.95


async def test_a_rate_that_is_lifted_lets_output_come(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 0, 1024))
    ring = supervised.start(1, ["head", "-c", "200000", "/dev/zero"])
    async with asyncio.timeout(20):
        while ring.header().sequence < 64 * 1024:
            supervised.changed.clear()
            supervised.client.send(Message(Request.WAIT, 1, ring.header().head))
            await supervised.changed.wait()
    assert ring.header().sequence < 100_000
    # At that rate the rest would take two minutes.
    supervised.client.send(Message(Request.LIMITS, 0, 0, 0))
    header = await supervised.wait(1, State.DRAINED)
    assert header.sequence == 200_000


async def test_limits_hold_for_what_is_run_afterwards(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 77, 0))
    assert (await supervised.run(1, ["sh", "-c", "ulimit -n"]))[1] == b"77\n"
    supervised.client.send(Message(Request.LIMITS, 0, 0, 0))
    assert (await supervised.run(2, ["sh", "-c", "ulimit -n"]))[1] == b"77\n"


async def test_senseless_limits_are_refused(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 0, -1))
    assert (await supervised.error()).a == 22  # EINVAL


async def test_what_a_rate_holds_back_is_there_after_the_end(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LIMITS, 0, 0, 1024))
    script = "head -c 100000 /dev/zero; echo >&2; exec sleep 1000"
    ring = supervised.start(1, ["sh", "-c", script])
    async with asyncio.timeout(20):
        while ring.header().sequence < 64 * 1024:
            supervised.changed.clear()
            supervised.client.send(Message(Request.WAIT, 1, ring.header().head))
            await supervised.changed.wait()
    # All is written by now but for what the rate holds back; another exec sees that it sleeps.
    look = "until grep -qs '^sleep$' /proc/[0-9]*/comm; do :; done"
    supervised.start(2, ["sh", "-c", look])
    await supervised.wait(2, State.EXITED)
    supervised.client.send(Message(Request.TERMINATE))
    await asyncio.to_thread(supervised.process.wait, 20)
    assert ring.header().sequence == 100_001


async def test_it_ends_all_when_nobody_extends_its_lease(supervised: Supervised) -> None:
    supervised.start(1, ["sleep", "1000"])
    supervised.client.send(Message(Request.LEASE, 0, 50_000_000))
    assert await asyncio.to_thread(supervised.process.wait, 20) is not None


async def test_a_lease_can_be_extended_and_lifted(supervised: Supervised) -> None:
    for left_ns in (2_000_000_000, 60_000_000_000, 1_000_000_000, 0):
        supervised.client.send(Message(Request.LEASE, 0, left_ns))
    await asyncio.sleep(2.5)
    header, output = await supervised.run(1, ["echo", "alive"])
    assert (header.exit_code, output) == (0, b"alive\n")


async def test_a_lease_that_makes_no_sense_is_refused(supervised: Supervised) -> None:
    supervised.client.send(Message(Request.LEASE, 0, -1))
    assert (await supervised.error()).a == 22  # EINVAL
