"""Clients that create, read and delete sandboxes by name, and write down what they were told.

A name is a register: 0 while no sandbox has it, else a number for the sandbox's id. A create is a
compare-and-swap from 0, a delete by id one to 0, a get is a read. Each is sent again, with the same
request id, until it is answered: an operation lasts from its first sending to its answer.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc.aio
from prism.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from prism_common.channels import ChannelPool
from tests.sim.linearizability import Kind, Operation

ABSENT: Final = 0
_ATTEMPT_S: Final = 3.0
#: Statuses after which the same request is sent again.
_RETRIED: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    }
)
Answer = TypeVar("Answer")


def number_of(sandbox_id: str) -> int:
    """Return a sandbox's id as a register's value."""
    return int(sandbox_id.removeprefix("sb-"), 16)


class History:
    """What all clients were told, by name."""

    def __init__(self) -> None:
        self.operations: dict[str, list[Operation]] = {}
        self.successes: list[float] = []
        self.retries: Counter[str] = Counter()

    def add(self, name: str, operation: Operation) -> None:
        """Write down one answered operation."""
        self.operations.setdefault(name, []).append(operation)
        self.successes.append(operation.end)

    def longest_gap_s(self) -> float:
        """Return the longest time without an answer."""
        times = sorted(self.successes)
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


class Client:
    """One client. It asks another node at each attempt."""

    def __init__(self, apis: Sequence[str], history: History, seed: int) -> None:
        self._apis = apis
        self._history = history
        self._chance = random.Random(seed)
        self._pool = ChannelPool()

    async def run(self, names: Sequence[str], stop: asyncio.Event) -> None:
        """Operate on random names until told to stop; the last operation is finished."""
        known: dict[str, str] = {}
        while not stop.is_set():
            name = self._chance.choice(names)
            dice = self._chance.random()
            if dice < 0.4:
                await self._create(name, known)
            elif dice < 0.7:
                await self._get(name)
            elif name in known:
                await self._delete(name, known.pop(name))
            await asyncio.sleep(0)
        await self._pool.close()

    async def _create(self, name: str, known: dict[str, str]) -> None:
        request = sandbox_pb2.CreateSandboxRequest(
            request_id=str(uuid.uuid4()),
            name=name,
            spec=sandbox_pb2.SandboxSpec(node_selector={"no": "such"}),
        )
        begin = time.monotonic()
        try:
            sandbox = await self._ask(lambda stub: stub.CreateSandbox(request, timeout=_ATTEMPT_S))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            # Which sandbox has the name is not said; only that one has.
            self._history.add(
                name, Operation(Kind.CAS, begin, time.monotonic(), -1, ABSENT, succeeded=False)
            )
            return
        known[name] = sandbox.id
        self._history.add(
            name, Operation(Kind.CAS, begin, time.monotonic(), number_of(sandbox.id), ABSENT)
        )

    async def _get(self, name: str) -> None:
        request = sandbox_pb2.GetSandboxRequest(sandbox=name)
        begin = time.monotonic()
        try:
            sandbox = await self._ask(lambda stub: stub.GetSandbox(request, timeout=_ATTEMPT_S))
            value = number_of(sandbox.id)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            value = ABSENT
        self._history.add(name, Operation(Kind.READ, begin, time.monotonic(), value))

    async def _delete(self, name: str, sandbox_id: str) -> None:
        request = sandbox_pb2.DeleteSandboxRequest(request_id=str(uuid.uuid4()), sandbox=sandbox_id)
        begin = time.monotonic()
        await self._ask(lambda stub: stub.DeleteSandbox(request, timeout=_ATTEMPT_S))
        # Only this client knows the id, so it cannot have been deleted before.
        self._history.add(
            name, Operation(Kind.CAS, begin, time.monotonic(), ABSENT, number_of(sandbox_id))
        )

    async def _ask(
        self, call: Callable[[sandbox_pb2_grpc.SandboxServiceAsyncStub], Awaitable[Answer]]
    ) -> Answer:
        while True:
            channel = self._pool.get(self._chance.choice(self._apis))
            try:
                return await call(sandbox_pb2_grpc.SandboxServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED:
                    raise
                self._history.retries[error.code().name] += 1
            await asyncio.sleep(self._chance.uniform(0.01, 0.1))
