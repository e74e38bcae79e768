"""When prepared sandboxes are made, given away, and removed. Pure."""

from dataclasses import dataclass
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

#: What a prepared sandbox takes of the node's memory: its supervisor, bwrap, and what the kernel
#: keeps for them. Measured: 0.7 MiB.
MEMBER_BYTES: Final = 1 << 20
#: So long no sandbox is started before the pool is filled: a start is followed by what it is for.
QUIET_S: Final = 0.05
#: Between two looks at the node's slots, of which nobody tells.
LOOK_S: Final = 1.0


def fits(spec: sandbox_pb2.SandboxSpec, is_first: bool, has_network: bool) -> bool:
    """Return whether a prepared sandbox can become one of this spec.

    Limits, name and environment are given to it then. Its files are new and its network is none.

    Args:
        spec: What is asked for.
        is_first: It was never started: one that was has files and a user already.
        has_network: A network was made for it.
    """
    return is_first and not has_network and spec.image in ("", "host")


@dataclass(frozen=True, slots=True)
class View:
    """What the pool knows when it decides.

    Attributes:
        size: Sandboxes to keep ready.
        ready: Those that there are.
        making: Being made.
        free_slots: Sandboxes that the node has room for, prepared ones not counted.
        starts: Real starts under way.
        quiet_s: Time since the last of them began or ended.
    """

    size: int
    ready: int
    making: int
    free_slots: int
    starts: int
    quiet_s: float


def decide(view: View) -> int:
    """Return how many to make (one at most) or, below 0, to remove now.

    A prepared sandbox only ever takes a slot that is free, so a full node has none. While starts
    are under way nothing is done: they may take what is there.
    """
    if view.starts:
        return 0
    wanted = max(0, min(view.size, view.free_slots))
    have = view.ready + view.making
    if have > wanted:
        return -min(view.ready, have - wanted)
    may_make = view.making == 0 and view.quiet_s >= QUIET_S
    return 1 if have < wanted and may_make else 0


def wait_s(view: View) -> float:
    """Return how long nothing is to be decided anew, unless a start ends before."""
    if view.starts or view.quiet_s >= QUIET_S:
        return LOOK_S
    return QUIET_S - view.quiet_s
