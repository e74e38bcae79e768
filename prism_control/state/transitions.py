"""The transition table of sandboxes, as data. What it lacks does not happen."""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import Final

from prism_control.state.model import ObservedState, SandboxState


class Cause(enum.IntEnum):
    """What can move a sandbox from one state to another."""

    #: The scheduler has chosen a node.
    PLACE = 0
    #: The user wants its processes ended.
    STOP = 1
    #: The user wants it started again.
    START = 2
    #: It shall go, and a node has to remove it.
    DELETE = 3
    #: It shall go, and no node has anything of it.
    REMOVE = 4
    #: Its node is gone, or has forgotten it.
    LOSE = 5
    #: The same, and its policy is to be placed again.
    RESCHEDULE = 6
    #: Its agent says that it is being made, …
    REPORT_STARTING = 7
    REPORT_READY = 8
    REPORT_STOPPING = 9
    REPORT_STOPPED = 10
    REPORT_FAILED = 11
    REPORT_DELETED = 12
    REPORT_PAUSED = 13
    #: The user wants its processes frozen.
    PAUSE = 14
    #: The user wants them thawed.
    RESUME = 15


_S = SandboxState
_C = Cause

#: A transition to the same state is "already so": nothing changes and nothing is refused.
#: A STOPPING or DELETING sandbox takes no report of what it was before: the agent had sent it
#: before it heard. LOST is an end: a node that comes back is told to remove its copy.
TRANSITIONS: Final = MappingProxyType(
    {
        (_S.PENDING, _C.PLACE): _S.SCHEDULED,
        (_S.PENDING, _C.REMOVE): _S.DELETED,
        #
        (_S.SCHEDULED, _C.STOP): _S.STOPPING,
        (_S.SCHEDULED, _C.DELETE): _S.DELETING,
        (_S.SCHEDULED, _C.LOSE): _S.LOST,
        (_S.SCHEDULED, _C.RESCHEDULE): _S.PENDING,
        (_S.SCHEDULED, _C.REPORT_STARTING): _S.STARTING,
        (_S.SCHEDULED, _C.REPORT_READY): _S.READY,
        (_S.SCHEDULED, _C.REPORT_PAUSED): _S.PAUSED,
        (_S.SCHEDULED, _C.REPORT_STOPPING): _S.STOPPING,
        (_S.SCHEDULED, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.SCHEDULED, _C.REPORT_FAILED): _S.FAILED,
        (_S.SCHEDULED, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.STARTING, _C.STOP): _S.STOPPING,
        (_S.STARTING, _C.DELETE): _S.DELETING,
        (_S.STARTING, _C.LOSE): _S.LOST,
        (_S.STARTING, _C.RESCHEDULE): _S.PENDING,
        (_S.STARTING, _C.REPORT_STARTING): _S.STARTING,
        (_S.STARTING, _C.REPORT_READY): _S.READY,
        (_S.STARTING, _C.REPORT_PAUSED): _S.PAUSED,
        (_S.STARTING, _C.REPORT_STOPPING): _S.STOPPING,
        (_S.STARTING, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.STARTING, _C.REPORT_FAILED): _S.FAILED,
        (_S.STARTING, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.READY, _C.STOP): _S.STOPPING,
        (_S.READY, _C.DELETE): _S.DELETING,
        (_S.READY, _C.LOSE): _S.LOST,
        (_S.READY, _C.RESCHEDULE): _S.PENDING,
        # Until its node has done it, one that shall be PAUSED or thawed stays what it was.
        (_S.READY, _C.PAUSE): _S.READY,
        (_S.READY, _C.RESUME): _S.READY,
        (_S.READY, _C.REPORT_READY): _S.READY,
        (_S.READY, _C.REPORT_PAUSED): _S.PAUSED,
        (_S.READY, _C.REPORT_STOPPING): _S.STOPPING,
        (_S.READY, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.READY, _C.REPORT_FAILED): _S.FAILED,
        (_S.READY, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.PAUSED, _C.PAUSE): _S.PAUSED,
        (_S.PAUSED, _C.RESUME): _S.PAUSED,
        (_S.PAUSED, _C.REPORT_READY): _S.READY,
        (_S.PAUSED, _C.REPORT_PAUSED): _S.PAUSED,
        (_S.PAUSED, _C.STOP): _S.STOPPING,
        (_S.PAUSED, _C.DELETE): _S.DELETING,
        (_S.PAUSED, _C.LOSE): _S.LOST,
        (_S.PAUSED, _C.RESCHEDULE): _S.PENDING,
        (_S.PAUSED, _C.REPORT_STOPPING): _S.STOPPING,
        (_S.PAUSED, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.PAUSED, _C.REPORT_FAILED): _S.FAILED,
        (_S.PAUSED, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.STOPPING, _C.STOP): _S.STOPPING,
        (_S.STOPPING, _C.DELETE): _S.DELETING,
        (_S.STOPPING, _C.LOSE): _S.LOST,
        (_S.STOPPING, _C.REPORT_STOPPING): _S.STOPPING,
        (_S.STOPPING, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.STOPPING, _C.REPORT_FAILED): _S.FAILED,
        (_S.STOPPING, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.STOPPED, _C.STOP): _S.STOPPED,
        (_S.STOPPED, _C.START): _S.STARTING,
        (_S.STOPPED, _C.DELETE): _S.DELETING,
        (_S.STOPPED, _C.LOSE): _S.LOST,
        (_S.STOPPED, _C.REPORT_STOPPED): _S.STOPPED,
        (_S.STOPPED, _C.REPORT_FAILED): _S.FAILED,
        (_S.STOPPED, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.FAILED, _C.DELETE): _S.DELETING,
        (_S.FAILED, _C.REMOVE): _S.DELETED,
        (_S.FAILED, _C.LOSE): _S.FAILED,
        (_S.FAILED, _C.REPORT_FAILED): _S.FAILED,
        (_S.FAILED, _C.REPORT_DELETED): _S.DELETED,
        #
        (_S.LOST, _C.REMOVE): _S.DELETED,
        #
        (_S.DELETING, _C.DELETE): _S.DELETING,
        (_S.DELETING, _C.LOSE): _S.DELETED,
        (_S.DELETING, _C.REPORT_DELETED): _S.DELETED,
    }
)

#: The same as rows by state and columns by cause: an index costs less than hashing two enums.
_MATRIX: Final[tuple[tuple[SandboxState | None, ...], ...]] = (
    (),  # states count from 1
    *(tuple(TRANSITIONS.get((state, cause)) for cause in Cause) for state in SandboxState),
)

CAUSE_OF_REPORT: Final[dict[ObservedState, Cause]] = {
    ObservedState.STARTING: Cause.REPORT_STARTING,
    ObservedState.READY: Cause.REPORT_READY,
    ObservedState.STOPPING: Cause.REPORT_STOPPING,
    ObservedState.STOPPED: Cause.REPORT_STOPPED,
    ObservedState.FAILED: Cause.REPORT_FAILED,
    ObservedState.DELETED: Cause.REPORT_DELETED,
    ObservedState.PAUSED: Cause.REPORT_PAUSED,
}


def next_state(state: SandboxState, cause: Cause) -> SandboxState | None:
    """Return the state that follows; None: the table has no such transition."""
    return _MATRIX[state][cause]
