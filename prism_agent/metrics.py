"""The agent's metrics. No label holds a sandbox's id or name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


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
        self.control_session = Gauge(
            "prism_agent_control_session",
            "1 while a session with the leader is open.",
            registry=registry,
        )
