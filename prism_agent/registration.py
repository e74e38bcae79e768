"""A registration as messages: one, or parts before it where an agent has very many sandboxes."""

from typing import Final

from prism.agent.v1 import agent_pb2

from prism_common import limits

#: Far below a message's bound, and so many that all agents but the largest need one message, which
#: leaders of every release understand.
_REGISTER_BYTES_MAX: Final = 3 * limits.MIB
_PART_BYTES_MAX: Final = 1 * limits.MIB


def registration_messages(register: agent_pb2.Register) -> list[agent_pb2.SessionRequest]:
    """Return a registration as the first messages of a session, the last of which registers.

    The parts come first: a leader of a release that knows none refuses the session at once, instead
    of taking a part for all that there is, and what is missing for lost.
    """
    if register.ByteSize() <= _REGISTER_BYTES_MAX:
        return [agent_pb2.SessionRequest(register=register)]
    messages: list[agent_pb2.SessionRequest] = []
    part: list[agent_pb2.SandboxReport] = []
    size = 0
    for report in register.sandboxes:
        if size > _PART_BYTES_MAX:
            messages.append(_part(part))
            part, size = [], 0
        part.append(report)
        size += report.ByteSize()
    messages.append(_part(part))
    rest = agent_pb2.Register()
    rest.CopyFrom(register)
    del rest.sandboxes[:]
    messages.append(agent_pb2.SessionRequest(register=rest))
    return messages


def _part(sandboxes: list[agent_pb2.SandboxReport]) -> agent_pb2.SessionRequest:
    return agent_pb2.SessionRequest(register_part=agent_pb2.RegisterPart(sandboxes=sandboxes))
