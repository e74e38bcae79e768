"""Whether a history of one register is linearizable (Wing and Gong 1993, Lowe 2017).

The search takes, one after another, an operation that may come next (it was invoked before any
other that is left had returned) and whose answer is what a register would give; where it gets
stuck, it goes back. What makes it fast enough is Lowe's memory: a set of operations that
are done, with the value that they leave, is tried once.

An operation whose outcome nobody knows may take effect at any time after its invocation, or never.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN_END = math.inf


class Kind(enum.Enum):
    """What an operation does."""

    READ = "read"
    WRITE = "write"
    CAS = "cas"


@dataclass(frozen=True)
class Operation:
    """One operation on one register.

    Attributes:
        kind: What was asked.
        begin: When it was invoked.
        end: When its answer came; `UNKNOWN_END` if none did.
        value: WRITE and CAS: the new value. READ: what was read.
        expected: CAS: the old value that it wants.
        succeeded: CAS: whether it said that it has swapped.
    """

    kind: Kind
    begin: float
    end: float
    value: int
    expected: int = 0
    succeeded: bool = True

    def apply(self, value: int) -> int | None:
        """Return the register's value afterwards; None if the answer cannot be this one."""
        is_known = self.end != UNKNOWN_END
        if self.kind is Kind.READ:
            return value if not is_known or value == self.value else None
        if self.kind is Kind.WRITE:
            return self.value
        swaps = value == self.expected
        if is_known and swaps != self.succeeded:
            return None
        return self.value if swaps else value


class TooHardError(Exception):
    """The search takes more steps than allowed; nothing is known of the history."""


def is_linearizable(
    history: Sequence[Operation], initial: int = 0, steps_max: int = 200_000
) -> bool:
    """Return whether some order of `history` that respects time explains every answer.

    Args:
        history: Operations on one register, in any order.
        initial: Its value before all of them.
        steps_max: Bound on the search.

    Raises:
        TooHardError: The bound is reached.
    """
    # Reads without an answer tell nothing.
    operations = sorted(
        (op for op in history if op.kind is not Kind.READ or op.end != UNKNOWN_END),
        key=lambda op: (op.end, op.begin),
    )
    wanted = sum(1 << i for i, op in enumerate(operations) if op.end != UNKNOWN_END)
    seen: set[tuple[int, int]] = set()
    stack: list[tuple[int, int]] = [(0, initial)]
    steps = 0
    while stack:
        done, value = stack.pop()
        if done & wanted == wanted:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        steps += 1
        if steps > steps_max:
            raise TooHardError(f"{len(operations)} operations, {steps} steps")
        # Those that end first are tried first: they are pushed last.
        stack.extend(reversed(_next(operations, done, value)))
    return False


def _next(operations: Sequence[Operation], done: int, value: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    first_end = UNKNOWN_END
    # Ascending by end, so the first that is left has the least end of all that are left. Done
    # ones at the front are skipped in one step.
    front = (~done & (done + 1)).bit_length() - 1
    for i in range(front, len(operations)):
        if done >> i & 1:
            continue
        operation = operations[i]
        first_end = min(first_end, operation.end)
        if operation.begin <= first_end:
            after = operation.apply(value)
            if after is not None:
                found.append((done | 1 << i, after))
    return found
