"""A runtime whose sandboxes have the network that they ask for, whichever runtime it is."""

from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.network.egress import Networks
from prism_agent.record import Record
from prism_agent.runtime.base import Probe, Running, Runtime, Usage


class Networked:
    """Makes a sandbox's network before the sandbox, and removes it after the sandbox's processes.

    The runtime finds in the record whether there is one: `network.egress.namespace_path` is then
    the namespace to start it in.
    """

    def __init__(self, inner: Runtime, networks: Networks) -> None:
        self._inner: Final = inner
        self._networks = networks
        self.name = inner.name

    async def probe(self) -> Probe:
        """Start one sandbox, run something in it, remove it."""
        return await self._inner.probe()

    async def start(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> Running:
        """Make its network, then it."""
        await self._networks.open(record, spec.network)
        return await self._inner.start(record, spec)

    def explain(self, record: Record) -> str:
        """Return what was said when it was started last."""
        return self._inner.explain(record)

    async def adopt(self, record: Record) -> Running | None:
        """Find it again; its network is as it was."""
        running = await self._inner.adopt(record)
        if running is not None and record.device:
            spec = sandbox_pb2.SandboxSpec.FromString(record.spec)
            await self._networks.adopt(record, spec.network)
        return running

    async def pause(self, record: Record) -> None:
        """Freeze every process of it."""
        await self._inner.pause(record)

    async def resume(self, record: Record) -> None:
        """Let every process of it run."""
        await self._inner.resume(record)

    async def resize(self, record: Record, spec: sandbox_pb2.SandboxSpec) -> None:
        """Hold it to the limits of a spec."""
        await self._inner.resize(record, spec)

    async def kill(self, record: Record) -> None:
        """Kill every process of it, and remove its network."""
        await self._inner.kill(record)
        await self._networks.close(record)

    async def delete(self, record: Record) -> None:
        """Remove all of it."""
        await self._inner.kill(record)
        await self._networks.close(record)
        await self._inner.delete(record)

    def usage(self, record: Record) -> Usage:
        """Measure it now."""
        return self._inner.usage(record)

    def oom_kills(self, record: Record) -> int:
        """Return how many of its processes the kernel has killed for memory."""
        return self._inner.oom_kills(record)

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove what belongs to no sandbox in `keep`, processes before their network."""
        return await self._inner.sweep(keep) + await self._networks.sweep(keep)

    async def close(self) -> None:
        """Remove what nobody uses."""
        await self._inner.close()
        await self._networks.shut()
