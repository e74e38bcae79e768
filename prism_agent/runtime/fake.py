"""A runtime that runs nothing: to measure the control plane with thousands of sandboxes."""

from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.record import Record
from prism_agent.runtime.base import Probe, Running, Usage

MESSAGE: Final = "runs nothing: for benchmarks of the control plane only"


class FakeRuntime:
    """READY at once; an exec in it fails, and says why."""

    name = "fake"

    async def probe(self) -> Probe:
        """It works everywhere, since it does nothing."""
        return Probe(ready=True, message=MESSAGE, version="1")

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Start nothing."""
        del record, spec
        return Running()

    def explain(self, record: Record) -> str:
        """It says nothing."""
        del record
        return ""

    async def adopt(self, record: Record) -> Running | None:
        """What does not run cannot have died."""
        del record
        return Running()

    async def pause(self, record: Record) -> None:
        """There is nothing to freeze."""

    async def resume(self, record: Record) -> None:
        """There is nothing to thaw."""

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """There is nothing to hold to limits."""

    async def kill(self, record: Record) -> None:
        """There is nothing to kill."""

    async def delete(self, record: Record) -> None:
        """There is nothing to remove."""

    def usage(self, record: Record) -> Usage:
        """It uses nothing."""
        del record
        return Usage()

    def oom_kills(self, record: Record) -> int:
        """It has no processes."""
        del record
        return 0

    async def sweep(self, keep: set[str]) -> list[str]:
        """It leaves nothing behind."""
        del keep
        return []

    async def close(self) -> None:
        """There is nothing to remove."""
