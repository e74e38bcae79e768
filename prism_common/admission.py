"""Admission at the edge: how much one client, and all together, may have under way."""

import random
from dataclasses import dataclass
from typing import Final

from prism_common import limits
from prism_common.errors import TooManyCallsError

#: Long enough that some of what is under way has ended; drawn, so that not all come back at once.
_RETRY_AFTER_S: Final = (0.25, 0.75)


@dataclass(slots=True)
class _Use:
    calls: int = 0
    size: int = 0


class Admission:
    """Counts the calls under way and the bytes of their requests, by client and in all.

    A client is one connection. Its bounds leave room for others in every queue behind this edge;
    the bounds for all together keep the process's memory bounded.

    Args:
        calls_per_client_max: Of one client.
        calls_max: Of all clients.
        bytes_per_client_max: Of one client's requests.
        bytes_max: Of all requests.
    """

    def __init__(
        self,
        *,
        calls_per_client_max: int = limits.CALLS_PER_CLIENT_MAX,
        calls_max: int = limits.CALLS_MAX,
        bytes_per_client_max: int = limits.CALL_BYTES_PER_CLIENT_MAX,
        bytes_max: int = limits.CALL_BYTES_MAX,
    ) -> None:
        self._calls_per_client_max = calls_per_client_max
        self._calls_max = calls_max
        self._bytes_per_client_max = bytes_per_client_max
        self._bytes_max = bytes_max
        self._clients: dict[str, _Use] = {}
        self._all = _Use()

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._all.calls

    def enter(self, client: str, size: int) -> None:
        """Admit a call; `leave` must follow.

        Args:
            client: Whose it is.
            size: Bytes of its request; 0 for a stream, whose messages are bounded one by one.

        Raises:
            TooManyCallsError: Nothing was done; with when to try again.
        """
        use = self._clients.get(client)
        if use is None:
            use = self._clients[client] = _Use()
        everyone = self._all
        if use.calls >= self._calls_per_client_max:
            self._refuse(client, use, f"{use.calls} calls of this connection are under way")
        if everyone.calls >= self._calls_max:
            self._refuse(client, use, f"{everyone.calls} calls of all clients are under way")
        if use.calls and use.size + size > self._bytes_per_client_max:
            self._refuse(client, use, f"{use.size} bytes of this connection's requests wait")
        if everyone.calls and everyone.size + size > self._bytes_max:
            self._refuse(client, use, f"{everyone.size} bytes of all clients' requests wait")
        use.calls += 1
        use.size += size
        everyone.calls += 1
        everyone.size += size

    def leave(self, client: str, size: int) -> None:
        """Let go of a call that was admitted with the same arguments."""
        use = self._clients[client]
        use.calls -= 1
        use.size -= size
        self._all.calls -= 1
        self._all.size -= size
        if not use.calls:
            del self._clients[client]

    def _refuse(self, client: str, use: _Use, why: str) -> None:
        if not use.calls:
            del self._clients[client]
        raise TooManyCallsError(
            f"{why}, which is the bound: wait for some of them, or send batches",
            retry_after_s=random.uniform(*_RETRY_AFTER_S),  # noqa: S311
        )
