"""Hands an exec over to the supervisor: its environment, its output, and its standard input."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent.exec_record import Exec
from prism_agent.shared_files import SharedFiles
from prism_agent.supervisor import protocol
from prism_agent.supervisor.client import SupervisorClient
from prism_agent.supervisor.protocol import Message, Request
from prism_agent.supervisor.ring import Ring

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What nearly every program knows; a client names its own terminal in env.
_TERM: Final = "xterm-256color"


def launch(
    each: Exec,
    start: sandbox_pb2.ExecStart,
    sandbox_env: Mapping[str, str],
    client: SupervisorClient,
    shared: SharedFiles | None,
    spare: Path | None = None,
) -> None:
    """Write the exec's record, then have the supervisor run it.

    Args:
        each: The exec; it has no files yet.
        start: What to run.
        sandbox_env: Variables that every exec of the sandbox has.
        client: Speaks to the supervisor.
        shared: What the exec comes in where no descriptor can be passed.
        spare: A ring that is to become its own; None: it is given a new one.

    Raises:
        SandboxGoneError: There is no supervisor any more.
        OSError: The disk takes no more.
    """
    spec = _spec_of(each, start, sandbox_env)
    descriptors: list[int] = []
    try:
        descriptors.append(os.memfd_create("exec", os.MFD_CLOEXEC))
        os.write(descriptors[0], spec)
        descriptors.append(_ring_of(each, spare).fileno())
        piped = start.stdin and not each.record.terminal and shared is None
        if piped:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            descriptors += [read_end, write_end]
            os.set_blocking(write_end, False)
        each.save()
        each.window = protocol.OVERWRITE if start.detach else each.ring_bytes
        if shared is not None:
            shared.put(each.record.number, spec, start.stdin)
        if piped:
            each.input.hold(os.dup(descriptors[3]))
        # The last thing that can fail: an exec that was sent runs, and must not be forgotten.
        client.send(
            Message(
                Request.EXEC, each.record.number, start.timeout.ToNanoseconds(), _flags_of(start)
            ),
            descriptors if shared is None else (),
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _ring_of(each: Exec, spare: Path | None) -> Ring:
    if spare is None:
        return Ring.create(each.ring_path, each.ring_bytes)
    return Ring.reuse(spare, each.ring_path, each.ring_bytes)


def _spec_of(each: Exec, start: sandbox_pb2.ExecStart, sandbox_env: Mapping[str, str]) -> bytes:
    env = {"PATH": _PATH, "HOME": "/workspace", "LANG": "C.UTF-8", **sandbox_env}
    if each.record.terminal:
        env["TERM"] = _TERM
    env.update(start.env)
    return protocol.encode_spec(start.cwd or "/workspace", list(start.argv), env)


def _flags_of(start: sandbox_pb2.ExecStart) -> int:
    flags = protocol.EXEC_STDIN if start.stdin else 0
    if start.detach:
        flags |= protocol.EXEC_OVERWRITE
    if start.HasField("terminal"):
        flags |= protocol.exec_terminal(start.terminal.rows, start.terminal.columns)
    return flags
