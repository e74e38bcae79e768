"""What sandboxes use now, as the API shows it."""

import os
import time
from collections.abc import Collection
from pathlib import Path

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.edge import Edge
from prism_agent.reconcile import UP
from prism_agent.record import Record
from prism_agent.runtime.base import Runtime


def measure(edge: Edge, sandbox_ids: Collection[str]) -> list[sandbox_pb2.SandboxUsage]:
    """Measure the sandboxes that have processes: these, or all where none is named.

    It reads a dozen small files a sandbox. What ends meanwhile is left out.
    """
    found = []
    for sandbox_id in list(sandbox_ids or edge.hosted):
        sandbox, hosted = edge.reconciler.sandboxes.get(sandbox_id), edge.hosted.get(sandbox_id)
        if sandbox is None or hosted is None or sandbox.phase not in UP:
            continue
        runtime = edge.runtimes.get(hosted.record.runtime)
        if runtime is not None:
            directory = edge.journal.directory(sandbox_id)
            found.append(_measure_one(runtime, hosted.record, hosted.spec.limits, directory))
    return found


def _measure_one(
    runtime: Runtime, record: Record, limits: sandbox_pb2.Limits, directory: Path
) -> sandbox_pb2.SandboxUsage:
    measured = sandbox_pb2.SandboxUsage(sandbox_id=record.sandbox_id, limits=limits)
    if record.cgroup:
        usage = runtime.usage(record)
        if usage.cpu_ns is not None:
            measured.cpu_time.FromNanoseconds(usage.cpu_ns)
        measured.memory_bytes = usage.memory_bytes
        measured.processes = usage.processes
        measured.oom_kills = usage.oom_kills
        if usage.memory_limit_bytes:
            measured.limits.memory_bytes = usage.memory_limit_bytes
    measured.measure_time.FromNanoseconds(time.time_ns())
    workspace = directory / "workspace"
    if record.mounted and workspace.is_mount():
        size = os.statvfs(workspace)
        measured.disk_bytes = (size.f_blocks - size.f_bfree) * size.f_frsize
        measured.limits.disk_bytes = size.f_blocks * size.f_frsize
    return measured
