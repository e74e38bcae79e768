"""How a sandbox is shown: columns, facts and orders."""

import json
from collections.abc import Callable
from typing import Any, Final

from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.output import Column, age, state_name, when
from prism_cli.quantities import format_bytes, format_cpu, format_duration

#: Shown wherever a sandbox or a node uses it: it isolates nothing.
FAKE_RUNTIME: Final = "fake (runs nothing)"


#: What --sort knows.
SORT_KEYS: Final[dict[str, Callable[[pb.Sandbox], Any]]] = {
    "name": lambda sandbox: (sandbox.name, sandbox.id),
    "age": lambda sandbox: (sandbox.create_time.ToNanoseconds(), sandbox.id),
    "state": lambda sandbox: (sandbox.state, sandbox.name),
    "node": lambda sandbox: (node_of(sandbox), sandbox.name),
}


def runtime_name(name: str) -> str:
    """Return a runtime's name, and what to know of it."""
    return FAKE_RUNTIME if name == "fake" else name


def node_of(sandbox: pb.Sandbox) -> str:
    """Return the node's name; its id where no name is known."""
    return sandbox.node_name or sandbox.node_id


def state_of(sandbox: pb.Sandbox) -> str:
    """Return the state's name."""
    return state_name(sandbox.state)


def _reason(sandbox: pb.Sandbox) -> str:
    if sandbox.reason:
        return sandbox.reason
    if sandbox.state == pb.SANDBOX_STATE_PENDING and sandbox.placement:
        return f"{sandbox.placement[0].node_name}: {sandbox.placement[0].reason}"
    return ""


COLUMNS: Final = (
    Column("NAME", lambda sandbox: sandbox.name),
    Column("STATE", state_of),
    Column("NODE", node_of),
    Column("RUNTIME", lambda sandbox: runtime_name(sandbox.runtime)),
    Column("AGE", lambda sandbox: age(sandbox.create_time)),
    Column("REASON", _reason),
)


def facts(sandbox: pb.Sandbox) -> list[tuple[str, str]]:
    """Return what `sandbox info` says, as lines with titles."""
    spec = sandbox.spec
    lines = [("Name", sandbox.name), ("Id", sandbox.id), ("State", _state_in_words(sandbox))]
    lines += _placement(sandbox)
    if sandbox.node_id:
        lines.append(("Node", f"{node_of(sandbox)} ({sandbox.node_id})"))
    if sandbox.runtime:
        lines.append(("Runtime", runtime_name(sandbox.runtime)))
    lines += [("Image", spec.image or "host"), ("Limits", _limits(spec.limits))]
    if sandbox.HasField("usage"):
        lines.append(("Uses", usage_in_words(sandbox.usage)))
    lines += _times(sandbox)
    if spec.HasField("idle_timeout"):
        idle_s = spec.idle_timeout.ToTimedelta().total_seconds()
        lines.append(("Idle timeout", format_duration(idle_s)))
    for title, pairs in (
        ("Labels", spec.labels),
        ("Environment", spec.env),
        ("Node selector", spec.node_selector),
    ):
        for position, key in enumerate(sorted(pairs)):
            lines.append(("" if position else title, f"{key}={_value(pairs[key])}"))
    if spec.network.mode == pb.NETWORK_MODE_EGRESS:
        from prism_cli.networks import in_words

        for position, line in enumerate(in_words(spec.network)):
            lines.append(("" if position else "May reach", line))
    if spec.on_node_loss == pb.ON_NODE_LOSS_RESCHEDULE:
        lines.append(("On node loss", f"placed again, empty (generation {sandbox.generation})"))
    if spec.priority:
        lines.append(("Priority", str(spec.priority)))
    lines.append(("Revision", str(sandbox.revision)))
    return lines


def _value(text: str) -> str:
    return text if text.isprintable() and len(text) <= 200 else json.dumps(text)[:200]


def _state_in_words(sandbox: pb.Sandbox) -> str:
    words = ", ".join(part for part in (sandbox.reason, sandbox.message) if part)
    if sandbox.state == pb.SANDBOX_STATE_PENDING and not words:
        words = "no node is chosen yet"
    if sandbox.state == pb.SANDBOX_STATE_LOST:
        words = f"{words or 'its node is gone'}, last seen {when(sandbox.last_seen_time)}"
    return f"{state_of(sandbox)}: {words}" if words else state_of(sandbox)


def _placement(sandbox: pb.Sandbox) -> list[tuple[str, str]]:
    """Return, for each node, why it does not take a PENDING sandbox."""
    if sandbox.state != pb.SANDBOX_STATE_PENDING:
        return []
    if not sandbox.placement:
        return [("Waits for", "a node: none is known, or none was asked yet (prismctl node ls)")]
    return [
        ("" if position else "Waits for", f"{one.node_name or one.node_id}: {one.reason}")
        for position, one in enumerate(sandbox.placement)
    ]


def _limits(limits: pb.Limits) -> str:
    parts = []
    if limits.cpu_millicores:
        parts.append(f"cpu {format_cpu(limits.cpu_millicores)}")
    if limits.memory_bytes:
        parts.append(f"memory {format_bytes(limits.memory_bytes)}")
    if limits.disk_bytes:
        parts.append(f"disk {format_bytes(limits.disk_bytes)}")
    if limits.processes_max:
        parts.append(f"processes {limits.processes_max}")
    if limits.open_files_max:
        parts.append(f"open files {limits.open_files_max}")
    if limits.output_bytes_per_second:
        parts.append(f"output {format_bytes(limits.output_bytes_per_second)}/s")
    return ", ".join(parts) or "the defaults"


def usage_in_words(usage: pb.SandboxUsage) -> str:
    """Return what a sandbox uses, of what it may where that is known."""
    parts = []
    if usage.HasField("cpu_time"):
        parts.append(f"{usage.cpu_time.ToNanoseconds() / 1e9:.1f}s of CPU so far")
    for words, of in (
        ("memory", memory_of(usage)),
        ("disk", disk_of(usage)),
        ("processes", processes_of(usage)),
    ):
        if of != "-":
            parts.append(f"{words} {of}")
    if usage.oom_kills:
        parts.append(f"{usage.oom_kills} killed as memory was used up")
    return ", ".join(parts) or "not known: its node has no cgroups"


def memory_of(usage: pb.SandboxUsage) -> str:
    """Return memory in use and the limit."""
    return _of(usage, "memory_bytes", usage.limits.memory_bytes, format_bytes)


def disk_of(usage: pb.SandboxUsage) -> str:
    """Return what the files in /workspace take, and its size."""
    return _of(usage, "disk_bytes", usage.limits.disk_bytes, format_bytes)


def processes_of(usage: pb.SandboxUsage) -> str:
    """Return the number of processes and the limit."""
    return _of(usage, "processes", usage.limits.processes_max, str)


def _of(usage: pb.SandboxUsage, field: str, limit: int, show: Callable[[int], str]) -> str:
    if not usage.HasField(field):  # type: ignore[arg-type]
        return "-"
    used = show(getattr(usage, field))
    return f"{used}/{show(limit)}" if limit else used


def _times(sandbox: pb.Sandbox) -> list[tuple[str, str]]:
    lines = [("Created", when(sandbox.create_time))]
    for title, moment in (
        ("Ready", sandbox.ready_time),
        ("Ended", sandbox.end_time),
        ("Expires", sandbox.expire_time),
    ):
        if moment.seconds:
            lines.append((title, when(moment)))
    return lines
