"""A real agent and a sandbox to attack from inside."""

from tests.integration.agent.conftest import agent, gateway, needs_sandboxes, sandbox

__all__ = ["agent", "gateway", "needs_sandboxes", "sandbox"]
