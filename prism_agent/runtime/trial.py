"""One sandbox that shows whether a runtime works here: it is started, spoken to, and removed."""

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.journal import Journal
from prism_agent.record import Record
from prism_agent.runtime.base import Running, Runtime, StartError
from prism_agent.supervisor.client import SupervisorClient
from prism_common.errors import SandboxGoneError
from prism_common.names import generate_id


async def try_one(runtime: Runtime, journal: Journal) -> None:
    """Start a sandbox, have its supervisor answer, and remove it.

    Raises:
        StartError, OSError: It does not work here.
    """
    record = Record.unassigned(generate_id("probe"), "probe", runtime.name)
    running: Running | None = None
    client = SupervisorClient(lambda _: None, lambda: None)
    try:
        running = await runtime.start(record, sandbox_pb2.SandboxSpec())
        if running.control_socket is not None:
            await client.connect(running.control_socket)
    except SandboxGoneError:
        raise StartError(f"it did not start: {runtime.explain(record)}") from None
    finally:
        client.close()
        if running is not None:
            running.close()
        await runtime.delete(record)
        journal.remove(record.sandbox_id)
