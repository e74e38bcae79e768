"""Assignments to the bytes of their message, for agents: put together from pieces (ADR 24)."""

import functools
from collections.abc import Iterable
from typing import Final

from prism.agent.v1 import agent_pb2

from prism_control.row_bytes import ENCODING, LENGTH_MAX, varint
from prism_control.rows import duration, spec_proto, timestamp
from prism_control.scheduler.assignments import Assignment
from prism_control.state.model import DesiredState, Spec

#: Their environments, labels and rules have bounds: 100 KiB each at most.
_SPECS_MAX: Final = 256
#: Sandboxes that one entry of the log has placed share their deadlines.
_WISHES_MAX: Final = 4096

_ID: Final = chr(agent_pb2.Assignment.SANDBOX_ID_FIELD_NUMBER << 3 | 2)
_NAME: Final = chr(agent_pb2.Assignment.NAME_FIELD_NUMBER << 3 | 2)
_ITEM: Final = chr(agent_pb2.AssignmentBatch.ASSIGNMENTS_FIELD_NUMBER << 3 | 2)
_BATCH: Final = chr(agent_pb2.SessionResponse.ASSIGNMENTS_FIELD_NUMBER << 3 | 2)


def _encoded(proto: agent_pb2.Assignment | agent_pb2.AssignmentBatch) -> str:
    return proto.SerializeToString().decode(ENCODING)


@functools.lru_cache(maxsize=_SPECS_MAX)
def _spec(spec: Spec) -> str:
    return _encoded(agent_pb2.Assignment(spec=spec_proto(spec)))


@functools.lru_cache(maxsize=_WISHES_MAX)
def _wish(
    generation: int, desired: DesiredState, expire_ms: int, grace_ms: int, start_count: int
) -> str:
    return _encoded(
        agent_pb2.Assignment(
            generation=generation,
            desired=agent_pb2.DesiredState.ValueType(desired),
            expire_time=timestamp(expire_ms),
            grace_period=duration(grace_ms),
            start_count=start_count,
        )
    )


def batch_bytes(term: int, assignments: Iterable[Assignment], *, complete: bool) -> bytes:
    """Return a SessionResponse with a batch of assignments, encoded.

    Args:
        term: The leader's.
        assignments: In this order.
        complete: Whether they, with those before them in the session, are all.
    """
    parts = [_encoded(agent_pb2.AssignmentBatch(term=term, complete=complete))]
    spec: Spec | None = None
    spec_text = ""
    for one in assignments:
        key, name = one.sandbox_id, one.name
        if one.spec is not spec:
            # Those beside one another mostly share it.
            spec = one.spec
            spec_text = "" if spec is None else _spec(spec)
        wish = _wish(one.generation, one.desired, one.expire_ms, one.grace_ms, one.start_count)
        if (
            key.isascii() and len(key) <= LENGTH_MAX and name.isascii() and len(name) <= LENGTH_MAX
        ):  # as they are made and checked now
            keys = f"{_ID}{chr(len(key))}{key}{_NAME}{chr(len(name))}{name}"
        else:
            keys = _encoded(agent_pb2.Assignment(sandbox_id=key, name=name))
        parts.append(
            f"{_ITEM}{varint(len(keys) + len(wish) + len(spec_text))}{keys}{wish}{spec_text}"
        )
    batch = "".join(parts)
    return f"{_BATCH}{varint(len(batch))}{batch}".encode(ENCODING)
