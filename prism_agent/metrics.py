"""The agent's metrics. No label holds a sandbox's id or name."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from prism_agent.cgroups import CgroupUsage


class AgentMetrics:
    """What Prometheus reads on the metrics port, beside the calls' own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sandboxes = Gauge(
            "prism_agent_sandboxes", "Sandboxes on this node.", ("state",), registry=registry
        )
        self.start = Histogram(
            "prism_agent_start_seconds",
            "Time from the decision to start a sandbox to READY.",
            ("runtime",),
            registry=registry,
            buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20),
        )
        self.execs = Counter(
            "prism_agent_exec_total",
            "Execs that have ended: exited, signaled, timeout, out_of_memory, not_started, lost.",
            ("result",),
            registry=registry,
        )
        self.warm = Gauge(
            "prism_agent_warm", "Prepared sandboxes: ready, making.", ("state",), registry=registry
        )
        self.warm_starts = Counter(
            "prism_agent_warm_starts_total",
            "Starts with a pool, by where the sandbox is from: prepared, none_ready, unfit.",
            ("result",),
            registry=registry,
        )
        self.control_session = Gauge(
            "prism_agent_control_session",
            "1 while a session with the leader is open.",
            registry=registry,
        )


class UsageMetrics(Collector):
    """What all sandboxes of the node use together, read from their cgroups when it is asked for."""

    def __init__(self, registry: CollectorRegistry, total: Callable[[], CgroupUsage]) -> None:
        self._total = total
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Measure."""
        total = self._total()
        yield GaugeMetricFamily(
            "prism_agent_sandbox_memory_bytes",
            "Memory of all sandboxes, with their files and what the kernel keeps for them.",
            total.memory_bytes,
        )
        yield CounterMetricFamily(
            "prism_agent_sandbox_oom_kills",
            "Processes that the kernel has killed because their sandbox's memory was used up.",
            value=total.oom_kills,
        )
        if total.cpu_ns is not None:
            yield CounterMetricFamily(
                "prism_agent_sandbox_cpu_seconds",
                "Processor time of all sandboxes, of those that are gone too.",
                value=total.cpu_ns / 1e9,
            )
