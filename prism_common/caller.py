"""Who asked for what is being done: the client that a call is from, also where it was forwarded.

A client is one connection until there are identities. It is what queues are fair between, and what
has bounds of its own; to claim to be another gains nobody more than opening a connection does.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Final

#: Metadata of a forwarded call: the client of the first.
ORIGIN: Final = "prism-origin"
_LENGTH_MAX: Final = 128

#: The client of the call that is being served; empty: nobody's, this process works for itself.
client: ContextVar[str] = ContextVar("client", default="")


def origin_of(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """Return the client that a call was forwarded for; empty: it was not forwarded."""
    for key, value in metadata or ():
        if key == ORIGIN and isinstance(value, str):
            return value[:_LENGTH_MAX]
    return ""
