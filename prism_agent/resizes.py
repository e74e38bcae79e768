"""Holds sandboxes that have processes to other limits."""

import asyncio
import errno
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.edge import Edge, warn
from prism_agent.hosted import Hosted
from prism_agent.reconcile import UP

#: Between two attempts: what is in use now may be free by then.
_RETRY_S: Final = 5.0


class Resizes:
    """Performs `Resize`."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def begin(self, sandbox_id: str) -> None:
        """Write its limits, then hold it to them."""
        hosted = self._edge.save(sandbox_id)
        if hosted is not None:
            hosted.spec = sandbox_pb2.SandboxSpec.FromString(hosted.record.spec)
            self._edge.begin_when_written(self._resize(hosted, hosted.record.spec))

    async def _resize(self, hosted: Hosted, spec: bytes) -> None:
        """Try until it is held to the limits, or never can be, or they are others, or it ends."""
        edge, record = self._edge, hosted.record
        while True:
            async with hosted.freezing:
                if not self._is_wanted(hosted, spec):
                    return
                failure, again = "", False
                try:
                    await edge.runtimes[record.runtime].resize(record, hosted.spec)
                except OSError as error:
                    failure = error.strerror or str(error)
                    again = error.errno != errno.EOPNOTSUPP
                    warn("cannot set the limits of a sandbox yet", record, error)
                edge.perform(edge.reconciler.resized(record.sandbox_id, failure))
            if not again:
                return
            await asyncio.sleep(_RETRY_S)

    def _is_wanted(self, hosted: Hosted, spec: bytes) -> bool:
        sandbox = self._edge.reconciler.sandboxes.get(hosted.record.sandbox_id)
        return (
            sandbox is not None
            and sandbox.phase in UP
            and sandbox.wanted.spec == spec
            and self._edge.hosted.get(hosted.record.sandbox_id) is hosted
        )
