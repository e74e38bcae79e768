"""When a sandbox was last used, by this node's clock; what a supervisor says of it has bounds."""

import contextlib
import time
from collections.abc import Iterator


class Activity:
    """Of one sandbox, beside its execs that run."""

    def __init__(self) -> None:
        #: Invariant: not in the future of when it was set.
        self.last_s = time.time()
        #: Calls under way that run nothing, such as file calls: they too are a use of it.
        self._calls = 0

    @property
    def in_call(self) -> bool:
        """A call is under way."""
        return self._calls > 0

    def begin(self, since_s: float) -> None:
        """Forget what was before: it was last used then."""
        self.last_s = min(since_s, time.time())

    def touch(self) -> None:
        """It was used just now."""
        self.note(time.time())

    def note(self, at_s: float) -> None:
        """It was used then, says its supervisor, who may have been taken over: never in future."""
        self.last_s = max(self.last_s, min(at_s, time.time()))

    def idle_s(self) -> float:
        """Return for how long it was not used."""
        return max(0.0, time.time() - self.last_s)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the sandbox from being idle, for a call that runs nothing."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self.touch()
