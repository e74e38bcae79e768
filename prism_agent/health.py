"""Named checks of a node; the worst of them is the node's health."""

import time
from pathlib import Path

import psutil
from prism.node.v1 import node_pb2

from prism_agent.journal import Journal
from prism_agent.session import Session

_OK = node_pb2.HEALTH_STATUS_OK
_WARNING = node_pb2.HEALTH_STATUS_WARNING
_CRITICAL = node_pb2.HEALTH_STATUS_CRITICAL

#: A clock before this was never set: certificates and deadlines would be wrong.
_CLOCK_MIN_S = 1_700_000_000


def _check(name: str, status: node_pb2.HealthStatus.ValueType, text: str) -> node_pb2.HealthCheck:
    return node_pb2.HealthCheck(name=name, status=status, message=text)


class Health:
    """Runs the checks.

    Args:
        node_id: The node.
        data_dir: Whose file system counts.
        runtimes: How they were found at the start.
        cgroup: What limits sandboxes; and in words what is missing, empty if nothing is.
        journal: What it knows of its sandboxes.
        egress: Whether sandboxes can be given a network.
        session: The control session.
    """

    def __init__(
        self,
        node_id: str,
        data_dir: Path,
        runtimes: list[node_pb2.RuntimeStatus],
        cgroup: tuple[str, str],
        journal: Journal,
        egress: node_pb2.EgressStatus,
        session: Session | None,
    ) -> None:
        self._node_id = node_id
        self._data_dir = data_dir
        self._runtimes = runtimes
        self._cgroup = cgroup
        self._journal = journal
        self._egress = egress
        self._session = session

    def measure(self) -> node_pb2.GetHealthResponse:
        """Run every check now."""
        checks = [
            self._check_runtime(),
            self._check_cgroup(),
            self._check_disk(),
            self._check_journal(),
            self._check_network(),
            self._check_memory(),
            self._check_clock(),
            self._check_session(),
        ]
        return node_pb2.GetHealthResponse(
            node_id=self._node_id, status=max(each.status for each in checks), checks=checks
        )

    def _check_runtime(self) -> node_pb2.HealthCheck:
        ready = [each for each in self._runtimes if each.ready]
        text = ", ".join(
            f"{each.name} {each.version}".strip() + (f" ({each.message})" if each.message else "")
            for each in ready
        )
        real = any(each.name != "fake" for each in ready)
        return _check("runtime", _OK if real else _WARNING, text)

    def _check_cgroup(self) -> node_pb2.HealthCheck:
        found, missing = self._cgroup
        if missing:
            return _check("cgroup", _WARNING, missing)
        return _check("cgroup", _OK, found)

    def _check_disk(self) -> node_pb2.HealthCheck:
        usage = psutil.disk_usage(str(self._data_dir))
        text = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} GiB are free"
        share = usage.free / usage.total
        status = _CRITICAL if share < 0.02 else _WARNING if share < 0.1 else _OK
        return _check("disk", status, text)

    def _check_journal(self) -> node_pb2.HealthCheck:
        problem = self._journal.problem
        return _check("journal", _WARNING if problem else _OK, problem or "whole")

    def _check_network(self) -> node_pb2.HealthCheck:
        # Not a fault: a node without is used for sandboxes that ask for none.
        if not self._egress.ready:
            return _check("network", _OK, f"sandboxes are given none: {self._egress.message}")
        return _check("network", _OK, "egress over IPv4; IPv6 is denied to all sandboxes")

    def _check_memory(self) -> node_pb2.HealthCheck:
        memory = psutil.virtual_memory()
        text = f"{memory.available / 2**30:.1f} GiB of {memory.total / 2**30:.1f} GiB are free"
        stalled = _memory_stall()
        if stalled is not None:
            text += f"; tasks waited for memory {stalled:.1f} % of the last minute"
        share = memory.available / memory.total
        critical = share < 0.03 or (stalled or 0.0) > 40
        warning = share < 0.1 or (stalled or 0.0) > 10
        return _check(
            "memory_pressure", _CRITICAL if critical else _WARNING if warning else _OK, text
        )

    def _check_clock(self) -> node_pb2.HealthCheck:
        if time.time() < _CLOCK_MIN_S:
            return _check("clock", _CRITICAL, "the clock was never set: deadlines would be wrong")
        return _check("clock", _OK, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _check_session(self) -> node_pb2.HealthCheck:
        session = self._session
        if session is None:
            return _check("control_session", _WARNING, "no --control was given")
        if session.connected_to:
            return _check("control_session", _OK, f"with {session.connected_to}")
        return _check("control_session", _CRITICAL, f"none; sandboxes go on ({session.last_error})")


def _memory_stall() -> float | None:
    """Return the share of the last minute in which some task waited for memory, in per cent."""
    try:
        line = Path("/proc/pressure/memory").read_text(encoding="ascii").splitlines()[0]
        return float(line.split("avg60=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None
