"""Choosing a node for one sandbox: filter, score, and the better of a few.

With few nodes all are compared. With many, a handful are drawn at random and the best of them
taken: that spreads nearly as well as comparing all (the power of two choices), it costs the same
with ten nodes and with ten thousand, and leaders that follow each other do not all pile onto the
one node that was emptiest. Only where the draw finds nothing is the list of fitting nodes made.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from prism_control.scheduler.views import NodeView, Shape

#: Returns a random number, 0 ≤ x < 1; seeded by whoever wants the same choices again.
Uniform: TypeAlias = Callable[[], float]

#: Up to so many nodes all are compared.
_COMPARE_ALL_MAX: Final = 8
#: Nodes drawn from many.
_DRAWN: Final = 3


class Strategy(enum.Enum):
    """What makes a node better."""

    #: Much is free: sandboxes do not disturb each other.
    SPREAD = "spread"
    #: Little is free: whole nodes stay empty, for large sandboxes or to be switched off.
    PACK = "pack"


class Candidates:
    """Nodes that have room for one shape, as of when they were listed.

    While nodes only fill up, a node that does not fit once never fits again, and is dropped when
    it is met: placing N sandboxes costs N plus the nodes, not N times the nodes. Once any node has
    gained room the list must be made anew.
    """

    __slots__ = ("_nodes", "_strategy")

    def __init__(self, nodes: Sequence[NodeView], shape: Shape, strategy: Strategy) -> None:
        self._strategy = strategy
        self._nodes = [view for view in nodes if view.fits(shape)]
        if strategy is Strategy.PACK:
            # The fullest last, where it is cheap to drop. The id makes the order total.
            self._nodes.sort(key=_emptiest_first)

    def choose(self, shape: Shape, uniform: Uniform) -> NodeView | None:
        """Return a node with room; None: there is none any more."""
        if self._strategy is Strategy.PACK:
            return self._fullest(shape)
        first = self._draw(shape, uniform)
        if first is None:
            return None
        second = self._draw(shape, uniform)
        return first if second is None or first.score >= second.score else second

    def _fullest(self, shape: Shape) -> NodeView | None:
        nodes = self._nodes
        while nodes:
            if nodes[-1].fits(shape):
                return nodes[-1]
            nodes.pop()
        return None

    def _draw(self, shape: Shape, uniform: Uniform) -> NodeView | None:
        nodes = self._nodes
        while nodes:
            position = int(uniform() * len(nodes))
            view = nodes[position]
            if view.fits(shape):
                return view
            nodes[position] = nodes[-1]
            nodes.pop()
        return None


def choose_quickly(
    nodes: Sequence[NodeView], shape: Shape, uniform: Uniform
) -> tuple[NodeView | None, bool]:
    """Return a good node for one sandbox, to spread, without looking at more than a few.

    Args:
        nodes: Those that are open and suit the shape.
        shape: What it needs.
        uniform: Random numbers.

    Returns:
        The node, or None; and whether None means that no node has room.
    """
    count = len(nodes)
    if count <= _COMPARE_ALL_MAX:
        return _best(nodes, shape, uniform), True
    best: NodeView | None = None
    for _ in range(_DRAWN):
        view = nodes[int(uniform() * count)]
        if (best is None or view.score > best.score) and view.fits(shape):
            best = view
    return best, False


def _best(nodes: Sequence[NodeView], shape: Shape, uniform: Uniform) -> NodeView | None:
    """Return the node with the highest score; among equals, one by chance."""
    best: list[NodeView] = []
    for view in nodes:
        if (not best or view.score >= best[0].score) and view.fits(shape):
            if best and view.score > best[0].score:
                best.clear()
            best.append(view)
    if not best:
        return None
    return best[0] if len(best) == 1 else best[int(uniform() * len(best))]


def _emptiest_first(view: NodeView) -> tuple[float, str]:
    return -view.score, view.row.id
